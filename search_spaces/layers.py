"""Layers shared by the spaces: norms, positions, attention, feed-forward nets, and the sublayer that joins them.

Two rules make a trained model exportable as readable source. Every class does one thing, with no branch on the
architecture (the builder chooses classes); and every constructor argument is kept as an attribute of the same name.

What they cost is in `costs.py`, which needs no torch.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypernas.kernels.gather_scatter import gather_scatter
from hypernas.kernels.rms_norm import rms_norm
from hypernas.kernels.swiglu import swiglu

# ---- norms ---------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias over the last axis (Ba et al. 2016, arXiv 1607.06450)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.d_model,), self.weight, self.bias, eps=1e-5)


class NoNorm(nn.Module):
    """x as it is, where another place normalises."""

    def forward(self, x: Tensor) -> Tensor:
        return x


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


# ---- positions -----------------------------------------------------------------------------------------------


class Rotary(nn.Module):
    """Rotates pairs of channels by their position (Su et al. 2021, arXiv 2104.09864), base 10,000."""

    def __init__(self, head_dim: int, context: int) -> None:
        super().__init__()
        self.head_dim, self.context = head_dim, context
        frequency = 10_000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angle = torch.arange(context, dtype=torch.float64)[:, None] * frequency  # (context, head_dim / 2)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, T, head_dim) -> the same shape; position t is row t."""
        return rotate(x, self.cos[: x.shape[-2]], self.sin[: x.shape[-2]])

    def at(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B, H, Q, head_dim) -> the same shape; row q of sequence b stands at positions[b, q]."""
        return rotate(x, self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channels i and i + head_dim / 2 as a pair, turned by the angle in column i of cos and sin (..., head_dim / 2)."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    even, odd = x.chunk(2, dim=-1)
    return torch.cat([even * cos - odd * sin, even * sin + odd * cos], dim=-1)


class NoRotation(nn.Module):
    """Queries and keys as they are: positions were added to the embedding."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def at(self, x: Tensor, positions: Tensor) -> Tensor:
        return x


class NoPositions(nn.Module):
    """Embeddings as they are: attention rotates queries and keys instead."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class LearnedPositions(nn.Module):
    """Adds one learned vector a position."""

    def __init__(self, d_model: int, context: int) -> None:
        super().__init__()
        self.d_model, self.context = d_model, context
        self.weight = nn.Parameter(torch.empty(context, d_model).normal_(std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight[: x.shape[1]]


class SinusoidalPositions(nn.Module):
    """Adds fixed sines and cosines (Vaswani et al. 2017, section 3.5), scaled to the embedding's size."""

    def __init__(self, d_model: int, context: int) -> None:
        super().__init__()
        self.d_model, self.context = d_model, context
        frequency = 10_000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
        angle = torch.arange(context, dtype=torch.float64)[:, None] * frequency
        table = torch.cat([angle.sin(), angle.cos()], dim=-1)[:, :d_model]
        self.register_buffer("table", (0.02 * table).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[: x.shape[1]].to(x.dtype)


POSITIONS = {"rope": NoPositions, "learned": LearnedPositions, "sinusoidal": SinusoidalPositions}


# ---- attention -----------------------------------------------------------------------------------------------


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Scaled dot-product attention, (B, H, Q, d), (B, H, T, d), (B, H, T, d) -> (B, H, Q, d).

    On a CPU in float32 where products are bfloat16: PyTorch's bfloat16 form is slower there, with matrix units too
    (`nas bench train` times them).
    """
    if value.device.type == "cpu" and value.dtype is torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            return attention(query.float(), key.float(), value.float(), mask, is_causal).to(value.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal)


class Attention(nn.Module):
    """Causal multi-head self-attention; its width may differ from the residual stream's (arXiv 2602.06471)."""

    causal: ClassVar[bool] = True
    block: ClassVar[int] = 32  # selected queries attended together

    def __init__(self, d_model: int, width: int, head_dim: int, rotary: nn.Module) -> None:
        super().__init__()
        self.d_model, self.width, self.head_dim, self.rotary = d_model, width, head_dim, rotary
        self.query = nn.Linear(d_model, width, bias=False)
        self.key = nn.Linear(d_model, width, bias=False)
        self.value = nn.Linear(d_model, width, bias=False)
        self.out = nn.Linear(width, d_model, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, H, T, head_dim)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, d_model) -> (B, T, d_model)."""
        query, key = self.rotary(self.heads(self.query(x))), self.rotary(self.heads(self.key(x)))
        mixed = attention(query, key, self.heads(self.value(x)), is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(-2))

    def selected(self, x: Tensor, mask: Tensor) -> Tensor:
        """The rows of `forward(x)` where mask (B, T) is true, zero elsewhere: the other queries are not computed.

        Keys and values are needed for every token, since a later one may attend to a skipped one.
        """
        key, value = self.rotary(self.heads(self.key(x))), self.heads(self.value(x))
        out = torch.zeros_like(x)
        counts = mask.sum(1, keepdim=True)
        most = int(counts.max())
        if not most:
            return out
        # The chosen queries of each sequence in order, then as many others as the fullest sequence has more.
        positions = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        chosen = torch.arange(most, device=x.device) < counts
        query = torch.zeros(*positions.shape, self.width, dtype=x.dtype, device=x.device)
        query[chosen] = self.query(x[mask]).to(x.dtype)
        query = self.rotary.at(self.heads(query), positions)
        mixed = self.attend(query, key, value, positions)
        out[mask] = self.out(mixed.transpose(1, 2).flatten(-2)[chosen]).to(x.dtype)
        return out

    def attend(self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
        """Attention of the queries (B, H, Q, head_dim) that stand at ascending positions (B, Q) of T tokens.

        Block by block, so that early queries are not multiplied with keys that come after them.
        """
        tokens, parts = torch.arange(key.shape[-2], device=key.device), []
        for first in range(0, query.shape[-2], self.block):
            block = slice(first, first + self.block)
            at = positions[:, block, None]
            seen = int(at.max()) + 1
            rows = query[:, :, block], key[:, :, :seen], value[:, :, :seen]
            parts.append(attention(*rows, mask=(tokens[:seen] <= at).unsqueeze(1)))
        return torch.cat(parts, dim=-2)


class BidirectionalAttention(Attention):
    """Self-attention in which every token sees every other: for images."""

    causal: ClassVar[bool] = False

    def attend(self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
        return attention(query, key, value)


# ---- feed-forward nets ---------------------------------------------------------------------------------------


class SwiGLU(nn.Module):
    """W_out (silu(W_gate x) * W_in x) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.d_model, self.d_hidden = d_model, d_hidden
        self.gate_up = nn.Linear(d_model, 2 * d_hidden, bias=False)  # [W_gate; W_in], one product
        self.out = nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(swiglu(self.gate_up(x)))


class TwoMatrixNet(nn.Module):
    """The weights of W_out f(W_in x), for a pointwise f."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.d_model, self.d_hidden = d_model, d_hidden
        self.linear = nn.Linear(d_model, d_hidden, bias=False)
        self.out = nn.Linear(d_hidden, d_model, bias=False)


class GELUNet(TwoMatrixNet):
    """W_out gelu(W_in x)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.linear(x)))


class ReLUNet(TwoMatrixNet):
    """W_out relu(W_in x)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.linear(x)))


ACTIVATIONS = {"swiglu": SwiGLU, "gelu": GELUNet, "relu": ReLUNet}


class Hourglass(nn.Module):
    """A stack of narrow nets with residual adds between them: wide, narrow, wide (arXiv 2602.06471).

        h_i = h_{i-1} + net_i(h_{i-1}),   h_0 = x

    Returns h_K - x, since the residual stream adds its own x. Each net brings its own norm (papers disagree).
    """

    def __init__(self, nets: Sequence[nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_model) -> (..., d_model)."""
        total = self.nets[0](x)
        for net in self.nets[1:]:
            total = total + net(x + total)
        return total

    def selected(self, x: Tensor, mask: Tensor) -> Tensor:
        """The rows of `forward(x)` where mask (B, T) is true, zero elsewhere; other rows are not computed."""
        return gather_scatter(x, mask, self)


# ---- sublayers -----------------------------------------------------------------------------------------------


class PreNorm(nn.Module):
    """layer(norm(x))."""

    def __init__(self, norm: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.norm, self.layer = norm, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x))


class PreNormAttention(PreNorm):
    """Attention behind its norm, with a form that computes selected queries only."""

    def selected(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.layer.selected(self.norm(x), mask)


class PreNormFFN(PreNorm):
    """A feed-forward net behind its norm, with a form that computes selected tokens only."""

    def selected(self, x: Tensor, mask: Tensor) -> Tensor:
        return gather_scatter(x, mask, self)


class Sublayer(nn.Module):
    """One branch on the residual streams: h = H_pre X (B, T, C) -> y, for its connection to write."""

    def __init__(self, connection: nn.Module, branch: nn.Module) -> None:
        super().__init__()
        self.connection, self.branch = connection, branch

    def forward(self, h: Tensor) -> Tensor:
        return self.branch(h)


class GatedSublayer(nn.Module):
    """A branch that a cosine gate may skip, token by token (arXiv 2512.22206, its defects mended).

    In training the branch runs for every token and the gate scales it; afterwards a skipped token is not computed.
    """

    def __init__(self, connection: nn.Module, branch: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.connection, self.branch, self.gate = connection, branch, gate

    def forward(self, h: Tensor) -> Tensor:
        return self.gate(h, self.branch(h)) if self.training else self.branch.selected(h, self.gate.decide(h))


class ResidualStack(nn.Module):
    """Sublayers one after another on the residual streams: x (B, T, C) -> (B, T, C).

    Each write is one step with the read that follows it, so that a fused kernel passes over the streams once.
    """

    def __init__(self, sublayers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.sublayers = nn.ModuleList(sublayers)

    def forward(self, x: Tensor) -> Tensor:
        connection: Any = self.sublayers[0].connection
        streams = connection.expand(x)
        h, coefficients = connection.read(streams)
        for sublayer, following in pairwise(self.sublayers):
            y = sublayer(h)
            streams, h, coefficients = following.connection.advance(streams, y, coefficients)
        last = self.sublayers[-1]
        return last.connection.finish(streams, last(h), coefficients)


# ---- whole models ---------------------------------------------------------------------------------------------------


class TokenModel(nn.Module):
    """What every language model does beside `forward`: tokens (B, T), at most `context` of them, -> logits."""

    context: int

    @torch.no_grad()
    def generate(self, tokens: Tensor, count: int, temperature: float, generator: torch.Generator | None) -> Tensor:
        """tokens (B, T) continued by `count` sampled ones -> (B, T + count); the last `context` tokens are seen."""
        self.eval()
        for _ in range(count):
            logits = self(tokens[:, -self.context :])[:, -1] / max(temperature, 1e-6)
            following = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, following], dim=1)
        return tokens


class TiedHead(nn.Module):
    """Logits from the embedding's own weights."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return F.linear(x, embedding)


class Head(nn.Module):
    """Logits from weights of their own."""

    def __init__(self, d_model: int, vocab: int) -> None:
        super().__init__()
        self.d_model, self.vocab = d_model, vocab
        self.linear = nn.Linear(d_model, vocab, bias=False)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.linear(x)


def initialise(model: nn.Module, branches: int) -> None:
    """Draws the weights from torch's global generator.

    Linear layers have standard deviation 1 / sqrt(inputs); those that write to the residual stream (named `out`)
    are divided by sqrt(branches), so that the stream's variance does not grow with depth (GPT-2's rule). Embeddings
    and heads have 0.02.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.data.normal_(std=0.02)
        elif isinstance(module, Head):
            module.linear.weight.data.normal_(std=0.02)
        elif isinstance(module, (Attention, *ACTIVATIONS.values())):
            for name, linear in module.named_children():
                if isinstance(linear, nn.Linear):
                    inputs = linear.in_features * (branches if name == "out" else 1)
                    linear.weight.data.normal_(std=1 / math.sqrt(inputs))
