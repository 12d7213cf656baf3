"""Cosine gates: a sublayer (or a residual block) runs only where it is predicted to say something new.

CosineGate (2512.22206) runs F where CIR = 1 - cos(h, F(h)) is high. CIR needs F(h), so as published nothing can be
skipped. Here a small controller predicts CIR from h alone, and F runs iff

    softplus(s) CIR^(h) + b > 0,     y = F(h) where it runs, else 0

so that a higher predicted CIR always speaks for running (the published notebook starts with the opposite sign). The
controller learns CIR and nothing else; s and b learn, under the task's loss and a penalty on the FLOPs executed, how
much of it is worth paying for. The last axis is the feature axis everywhere: h is (B, T, C) where tokens are gated
and (B, C) where images are.

The functions below the classes are for who trains: `start_step`, `gate_loss` and the execution rates.
"""

import math
from functools import lru_cache
from hashlib import sha256
from typing import ClassVar

import torch
from torch import Tensor, nn

from hypernas.kernels.cosine_gate import cosine_gate


class CosineGate(nn.Module):
    """One gate. `rate` is the share of tokens that should run, `cost` the FLOPs per token of what it gates.

    In training F runs for all tokens and `forward` gates its output; in evaluation `decide` says for which tokens F
    has to run at all. Straight through: forward uses the hard decision, backward the soft one.
    """

    hidden: ClassVar[tuple[int, ...]] = (16,)  # 32 C FLOPs a token: under 1 % of an FFN of ratio 4 from C = 256 on
    # b = bias_gain * bias. Adam moves a tensor by its learning rate a step, and b has to cross the range of CIR in
    # trials of 60 to 400 steps; 10 throttles layers before they have learnt anything, 1 misses the target.
    bias_gain: ClassVar[float] = 5.0

    def __init__(self, d_model: int, rate: float, cost: float):
        super().__init__()
        self.d_model, self.rate, self.cost = d_model, rate, cost
        output = nn.Linear(self.hidden[-1], 1)
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)  # CIR^ = 1: F(h) of an untrained net is orthogonal to h
        layers: list[nn.Module] = []
        for width in self.hidden:
            layers += [nn.Linear(d_model, width), nn.ReLU()]
            d_model = width
        self.controller = nn.Sequential(*layers, output)
        self.scale = nn.Parameter(torch.tensor(math.log(math.expm1(1.0))))  # softplus(s) = 1
        self.bias = nn.Parameter(torch.zeros(()))  # b = 0: whatever CIR^ comes to, gates start open
        self.temperature = 0.05
        self.noise_seed: int | None = None  # None: noise comes from torch's global generator
        self.terms: tuple[Tensor, Tensor, Tensor] | None = None  # (regression, rate, consistency) of the last forward
        self.counts: list[Tensor] | None = None  # [executed, seen], while rates are counted

    def predict(self, h: Tensor) -> Tensor:
        """CIR^ in (0, 2), (..., C) -> (...). The controller watches h and does not bend it: no gradient into h."""
        # In the streams' precision also where products are bfloat16: noise and thresholds are finer than its 8 bits.
        return 2.0 * self.controller(h.detach()).squeeze(-1).to(h.dtype).sigmoid()

    def logit(self, cir: Tensor) -> Tensor:
        """softplus(s) cir + b: F runs where this is positive."""
        return nn.functional.softplus(self.scale) * cir + self.bias_gain * self.bias

    def decide(self, h: Tensor) -> Tensor:
        """Where F has to run: h (..., C) -> bool (...). No noise; counted while rates are counted."""
        runs = self.logit(self.predict(h)) > 0
        if self.counts is not None:
            self.counts = [self.counts[0].to(h.device) + runs.sum(), self.counts[1].to(h.device) + runs.numel()]
        return runs

    def forward(self, h: Tensor, branch: Tensor, features: Tensor | None = None) -> Tensor:
        """y = g * branch for branch = F(h), both (..., D). In evaluation g is `decide`.

        The controller sees `features` (..., C), by default h itself; a block of images (B, C, H, W) hands its input,
        pooled, here and h and branch flattened.
        """
        features = h if features is None else features
        if not self.training:
            return branch * self.decide(features).unsqueeze(-1)
        predicted = self.predict(features)
        logit = self.logit(predicted.detach())
        gate = straight_through(logit / self.temperature + self.noise(logit))
        y, cir, distance = cosine_gate(h, branch.to(h.dtype), gate)
        self.terms = (
            (predicted - cir.detach()).square().mean(),
            straight_through(logit).mean(),  # without noise and at temperature 1: the rate inference will see
            distance.mean(),
        )
        return y

    def noise(self, like: Tensor) -> Tensor:
        """Standard logistic noise, the difference of two Gumbels; the same for the same `noise_seed`."""
        generator = None
        if self.noise_seed is not None:
            generator = torch.Generator(like.device).manual_seed(self.noise_seed)
        return torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype).logit(eps=1e-6)


class SteadyGate(CosineGate):
    """A gate with the paper's other consistency term, E ||f(x) - f(x + eps)||^2.

    f is the gated block, f(x) = x + g(x) F(x). f(x + eps) - f(x) has three parts: eps; g (F(x + eps) - F(x)), the
    smoothness of F, which every net has or lacks without gates; and (g(x + eps) - g(x)) F, the only one a gate causes,
    and the only one that does not vanish with eps: a decision near its threshold flips. The term is that third part,
    as the distance between the directions of h + g(x) F and h + g(x + eps) F, with the decisions that inference will
    take; so F is not run a second time.
    """

    perturbation: ClassVar[float] = 0.1  # standard deviation of eps, in units of the features' root mean square

    def forward(self, h: Tensor, branch: Tensor, features: Tensor | None = None) -> Tensor:
        y = super().forward(h, branch, features)
        if self.training and self.terms is not None:
            self.terms = (*self.terms[:2], self.unsteadiness(h, branch, h if features is None else features).mean())
        return y

    def unsteadiness(self, h: Tensor, branch: Tensor, features: Tensor) -> Tensor:
        """How far the gated output turns where a small change of the features flips the decision: (...)."""
        size = features.detach().square().mean(-1, keepdim=True).sqrt()
        deviation = math.pi / math.sqrt(3)  # of the noise
        moved = features + self.perturbation / deviation * size * self.noise(features)
        before, after = (straight_through(self.logit(self.predict(x).detach())) for x in (features, moved))
        return direction_distance(h + before.unsqueeze(-1) * branch, h + after.unsqueeze(-1) * branch)


GATES = {"distance": CosineGate, "perturbation": SteadyGate}  # by `gates.consistency`


def straight_through(logit: Tensor) -> Tensor:
    """1 where logit > 0, else 0, with the gradient of sigmoid(logit)."""
    soft = logit.sigmoid()
    return (logit > 0).to(soft.dtype) + (soft - soft.detach())


def direction_distance(a: Tensor, b: Tensor) -> Tensor:
    """||a / ||a|| - b / ||b|| ||^2 over the last axis, in 0 to 4: (..., D), (..., D) -> (...)."""
    return 2.0 - 2.0 * nn.functional.cosine_similarity(a, b, dim=-1)


# Noise scale in units of CIR. Annealed, because inference has no noise: a net trained to the end with noise wider than
# the spread of its gate values has never seen the decisions it will be measured with.
TEMPERATURE_START, TEMPERATURE_END = 0.3, 0.05  # at first 96 % of the tokens run: sigmoid(1 / .3)
PENALTY_RAMP = 0.16  # share of training until the penalty has full weight: 40 of 250 epochs in the authors' notebook
# Heavy enough that the rate asked for is the rate got: within .04 of .3, .5 and .8 on a 4-layer character model
# after 150 to 400 steps; 2.5, as in the notebook, left up to .13.
PENALTY_WEIGHT = 10.0
REGRESSION_WEIGHT = 1.0  # any weight does under Adam: it trains the controller alone
CONSISTENCY_WEIGHT = 0.05  # the authors' notebook


def gates_of(model: nn.Module) -> list[CosineGate]:
    """The gates of `model`, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, CosineGate)]


def start_step(model: nn.Module, seed: int, step: int, progress: float) -> None:
    """Prepares every gate for training step `step`; `progress` is the share of training done, 0 to 1.

    Noise is a function of (seed, step, layer) and of nothing else: a resumed run repeats it, and so does every
    forward within the step.
    """
    temperature = TEMPERATURE_START * (TEMPERATURE_END / TEMPERATURE_START) ** progress
    for layer, gate in enumerate(gates_of(model)):
        gate.temperature = temperature
        # Hashed, because torch's CPU generator reads 32 bits of its seed only.
        gate.noise_seed = int.from_bytes(sha256(f"{seed}/{step}/{layer}".encode()).digest()[:4], "big")


def gate_loss(model: nn.Module, progress: float) -> Tensor:
    """What the gates add to the task's loss, from the last training forward, whose terms it takes: a scalar.

    The penalty is the squared distance of the FLOP-weighted execution rate from the target, ramped up; regression
    and consistency are means over the gates. Raises RuntimeError where a gate saw no training forward.
    """
    gates = gates_of(model)
    if not gates:
        return torch.zeros(())
    terms = [gate.terms for gate in gates]
    taken = [term for term in terms if term is not None]
    if len(taken) < len(gates):
        raise RuntimeError(f"{len(gates) - len(taken)} of {len(gates)} gates saw no forward in training mode yet")
    for gate in gates:
        gate.terms = None  # they hold the graph
    regression, rates, consistency = (torch.stack(term) for term in zip(*taken, strict=True))
    costs = _constants(tuple(gate.cost for gate in gates), rates.dtype, rates.device)
    targets = _constants(tuple(gate.rate for gate in gates), rates.dtype, rates.device)
    excess = ((rates - targets) * costs).sum() / costs.sum()
    penalty = min(1.0, progress / PENALTY_RAMP) * excess.square()
    return PENALTY_WEIGHT * penalty + REGRESSION_WEIGHT * regression.mean() + CONSISTENCY_WEIGHT * consistency.mean()


@lru_cache(maxsize=16)
def _constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values as a tensor, made once: at every step a GPU would be waited for while they are copied to it."""
    return torch.tensor(values, dtype=dtype, device=device)


def reset_rates(model: nn.Module) -> None:
    """Starts counting, from zero, what `decide` lets through."""
    for gate in gates_of(model):
        gate.counts = [torch.zeros((), dtype=torch.long, device=gate.bias.device) for _ in range(2)]


def execution_rates(model: nn.Module) -> list[float]:
    """The share of decisions since `reset_rates` that said run, one number a gate. Raises RuntimeError without any."""
    rates = []
    for layer, gate in enumerate(gates_of(model)):
        if gate.counts is None or not gate.counts[1]:
            raise RuntimeError(f"gate {layer} decided nothing since reset_rates: evaluate the model in between")
        rates.append(gate.counts[0].item() / gate.counts[1].item())
    return rates
