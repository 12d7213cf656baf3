"""A control for cosine gates: the space `lm` with gates that let through the same share of tokens, but by chance.

What a cosine gate is worth is what it does better than these. Parameters and FLOPs are counted as for cosine gates,
though a coin needs no controller, so that both stand at the same cost.
"""

import torch
from torch import Tensor, nn

from hypernas.search_spaces.gates import CosineGate
from hypernas.search_spaces.layers import GatedSublayer
from hypernas.search_spaces.lm import LanguageModels


class RandomGate(CosineGate):
    """Runs F for a random share `rate` of the tokens: new ones each training step, the same ones in evaluation."""

    def decide(self, h: Tensor) -> Tensor:
        generator = None if self.training else torch.Generator(h.device).manual_seed(0)
        if self.training and self.noise_seed is not None:
            generator = torch.Generator(h.device).manual_seed(self.noise_seed)
        runs = torch.rand(h.shape[:-1], generator=generator, device=h.device) < self.rate
        if self.counts is not None:
            self.counts = [self.counts[0] + runs.sum(), self.counts[1] + runs.numel()]
        return runs

    def forward(self, h: Tensor, branch: Tensor, features: Tensor | None = None) -> Tensor:
        runs = self.decide(h).unsqueeze(-1)
        nothing = h.new_zeros(())  # chance has nothing to learn
        self.terms = (nothing, nothing + self.rate, nothing)
        return branch * runs


class Space(LanguageModels):
    """The space `lm`, its gates replaced."""

    def build(self, arch: object) -> nn.Module:
        model = super().build(arch)
        for module in model.modules():
            if isinstance(module, GatedSublayer) and isinstance(module.gate, CosineGate):
                module.gate = RandomGate(module.gate.d_model, module.gate.rate, module.gate.cost)
        return model
