"""The language model around a Transformer's stack, built from its architecture."""

# mypy: disable-error-code="operator, union-attr, index"
# torch types every attribute of a module `Tensor | Module`, so that no submodule can be called.

from torch import Tensor, nn

from hypernas.search_spaces import layers
from hypernas.search_spaces.layers import TokenModel
from hypernas.search_spaces.lm import Arch
from hypernas.search_spaces.nets import transformer


class LanguageModel(TokenModel):
    """Byte (or token) embedding, the residual stack, a norm, logits."""

    def __init__(
        self,
        vocab: int,
        d_model: int,
        context: int,
        positions: nn.Module,
        stack: nn.Module,
        norm: nn.Module,
        head: nn.Module,
    ) -> None:
        super().__init__()
        self.vocab, self.d_model, self.context = vocab, d_model, context
        self.embedding = nn.Embedding(vocab, d_model)
        self.positions = positions
        self.stack = stack
        self.norm = norm
        self.head = head

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) integers, T at most `context` -> logits (B, T, vocab)."""
        x = self.positions(self.embedding(tokens))
        return self.head(self.norm(self.stack(x)), self.embedding.weight)


def build_model(arch: Arch) -> LanguageModel:
    """The module, initialised from torch's global generator."""
    model = LanguageModel(
        vocab=arch.vocab,
        d_model=arch.d_model,
        context=arch.context,
        positions=transformer.make_positions(arch, arch.context),
        stack=transformer.make_stack(arch, layers.Attention, arch.context),
        norm=transformer.make_norm(arch),
        head=layers.TiedHead() if arch.tied_head else layers.Head(arch.d_model, arch.vocab),
    )
    layers.initialise(model, branches=transformer.residual_writes(arch))
    return model
