"""LSTM language models as modules.

The cell is written out in matrix products, so that its FLOPs can be checked against a counter, which sees none inside
`nn.LSTM`.
"""

import math

import torch
from torch import Tensor, nn

from hypernas.search_spaces import layers
from hypernas.search_spaces.layers import TokenModel
from hypernas.search_spaces.lstm import Arch


class LSTM(nn.Module):
    """One layer, nn.LSTMCell at every token (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000).

    i, f, g, o = W x_t + U h_{t-1} + b;   c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g);   h_t = sigmoid(o) tanh(c_t)
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.input = nn.Linear(d_model, 4 * d_model)
        self.recurrent = nn.Linear(d_model, 4 * d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, d_model) -> (B, T, d_model), from a state of zeros."""
        h = c = torch.zeros_like(x[:, 0])
        outputs = []
        for driven in self.input(x).unbind(1):
            i, f, g, o = (driven + self.recurrent(h)).chunk(4, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs, dim=1)


class RecurrentLanguageModel(TokenModel):
    """Embedding, LSTM layers on top of each other, logits."""

    def __init__(self, vocab: int, d_model: int, context: int, recurrent: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.vocab, self.d_model, self.context = vocab, d_model, context
        self.embedding = nn.Embedding(vocab, d_model)
        self.recurrent = nn.ModuleList(recurrent)
        self.head = head

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) integers -> logits (B, T, vocab)."""
        x = self.embedding(tokens)
        for layer in self.recurrent:
            x = layer(x)
        return self.head(x, self.embedding.weight)


def build_model(arch: Arch) -> RecurrentLanguageModel:
    """The module, initialised from torch's global generator: weights uniform within 1 / sqrt(d_model), as torch's, and
    forget gates open (bias 1; Jozefowicz et al. 2015), so that gradients reach back through time from the start."""
    model = RecurrentLanguageModel(
        vocab=arch.vocab,
        d_model=arch.d_model,
        context=arch.context,
        recurrent=[LSTM(arch.d_model) for _ in range(arch.depth)],
        head=layers.TiedHead() if arch.tied_head else layers.Head(arch.d_model, arch.vocab),
    )
    layers.initialise(model, branches=1)
    bound = 1 / math.sqrt(arch.d_model)
    for name, parameter in model.recurrent.named_parameters():
        parameter.data.uniform_(-bound, bound)
        if name.endswith("input.bias"):
            parameter.data[arch.d_model : 2 * arch.d_model] = 1.0
    return model
