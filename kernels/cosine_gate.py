"""What a cosine gate needs of a sublayer's input x and output F: the gated output, and three dot products.

    out = gate * F,   dots = (x . x, x . F, F . F)

From `dots` follow, on one number a token, the cosine incompatibility 1 - x . F / sqrt(x . x  F . F) and every norm and
cosine of sums of x and F, such as the consistency term's cos(x + gate F, x + F); no further pass over C is needed.

x, F, out (..., C); gate (...), dots (..., 3) in float32 (float64 for float64). Bytes: forward reads x, F and writes out,
3 C elements a token; backward reads x, F and the gradient and writes dx, dF, 5 C. The same from `cosine_similarity`
moves about 20 C and 40 C. Source: CosineGate, 2512.22206.
"""

import torch
from torch import Tensor

from kernels import _cpu
from kernels._dispatch import Op, choose


def cosine_gate_reference(x: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """The definition."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide, f = x.to(exact), branch.to(exact)
    dots = torch.stack(((wide * wide).sum(-1), (wide * f).sum(-1), (f * f).sum(-1)), -1)
    return (gate.to(exact).unsqueeze(-1) * f).to(x.dtype), dots


def cosine_gate(x: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """(gate * branch, dots). Raises ValueError naming the shape or dtype that does not fit."""
    if branch.shape != x.shape or gate.shape != x.shape[:-1] or branch.dtype != x.dtype:
        raise ValueError(
            f"want branch like x, {tuple(x.shape)} {x.dtype}, and gate {tuple(x.shape[:-1])};"
            f" got {tuple(branch.shape)} {branch.dtype} and {tuple(gate.shape)}"
        )
    backend = choose(COSINE_GATE, x.device.type, x.dtype)
    if backend == "reference":
        return cosine_gate_reference(x, branch, gate)
    return torch.ops.hypernas.cosine_gate(x, branch, gate, backend)


@torch.library.custom_op("hypernas::cosine_gate", mutates_args=())
def _forward(x: Tensor, branch: Tensor, gate: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    out, dots = _empty_outputs(x, branch, gate, backend)
    arguments = (x.contiguous(), branch.contiguous(), gate.to(dots.dtype).contiguous())
    _cpu.call("cosine_gate_forward", x.dtype, gate.numel(), x.shape[-1], *arguments, out, dots)
    return out, dots


@_forward.register_fake
def _empty_outputs(x: Tensor, branch: Tensor, gate: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, x.new_empty((*x.shape[:-1], 3), dtype=exact)


@torch.library.custom_op("hypernas::cosine_gate_backward", mutates_args=())
def _backward(
    g: Tensor, gdots: Tensor, x: Tensor, branch: Tensor, gate: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dbranch, dgate = _empty_gradients(g, gdots, x, branch, gate, backend)
    gradients = (g.contiguous(), gdots.contiguous())
    arguments = (x.contiguous(), branch.contiguous(), gate.to(gdots.dtype).contiguous())
    _cpu.call("cosine_gate_backward", x.dtype, gate.numel(), x.shape[-1], *gradients, *arguments, dx, dbranch, dgate)
    return dx, dbranch, dgate


@_backward.register_fake
def _empty_gradients(
    g: Tensor, gdots: Tensor, x: Tensor, branch: Tensor, gate: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    like_x = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2)]
    return *like_x, gdots.new_empty(gate.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, branch, gate, ctx.backend = inputs
    ctx.save_for_backward(x, branch, gate)


def _autograd(ctx, g, gdots):  # type: ignore[no-untyped-def]
    x, branch, gate = ctx.saved_tensors
    dx, dbranch, dgate = torch.ops.hypernas.cosine_gate_backward(g, gdots, x, branch, gate, ctx.backend)
    return dx, dbranch, dgate.to(gate.dtype), None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def example_arguments(
    tokens: int, C: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Random x, branch and gate; for tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    x, branch = (torch.randn(tokens, C, generator=generator).to(device, dtype) for _ in range(2))
    gate = torch.rand(tokens, generator=generator)
    return x, branch, gate.to(device, torch.float64 if dtype == torch.float64 else torch.float32)


COSINE_GATE = Op(
    "cosine_gate", cosine_gate, cosine_gate_reference, lambda *kind: example_arguments(37, 50, *kind), ("cpu",)
)
