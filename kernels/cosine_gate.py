"""Gate a sublayer's output F, and measure how much it had to say: one pass over its input x and F.

    out      = gate * F
    cir      = 1 - cos(x, F)                              the cosine incompatibility, 0 to 2
    distance = 2 - 2 cos(x + gate F, x + F)               of the gated from the ungated output, both normalised

x, F, out (..., C); gate, cir, distance (...), in float32 (float64 for float64). All three outputs are differentiable in x,
F and gate: both cosines follow from x . x, x . F and F . F, so backward is one pass too. cos(p, q) = p . q over the root of
max(|p|^2 |q|^2, 1e-30).

Bytes: forward reads x, F and writes out, 3 C elements a token; backward reads x, F and the gradient and writes dx, dF,
5 C. The same by `cosine_similarity` moves about 25 C and 50 C. Source: CosineGate, 2512.22206.
"""

import torch
from torch import Tensor

from kernels import _cpu
from kernels._dispatch import Op, choose


def cosine_gate_reference(x: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The definition."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide, f, g = x.to(exact), branch.to(exact), gate.to(exact).unsqueeze(-1)

    def cosine(p: Tensor, q: Tensor) -> Tensor:
        product = p.square().sum(-1) * q.square().sum(-1)
        return (p * q).sum(-1) * torch.rsqrt(product.clamp_min(1e-30))

    return (g * f).to(x.dtype), 1 - cosine(wide, f), 2 - 2 * cosine(wide + g * f, wide + f)


def cosine_gate(x: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(gate * branch, cir, distance). Raises ValueError naming the shape or dtype that does not fit."""
    if branch.shape != x.shape or gate.shape != x.shape[:-1] or branch.dtype != x.dtype:
        raise ValueError(
            f"want branch like x, {tuple(x.shape)} {x.dtype}, and gate {tuple(x.shape[:-1])};"
            f" got {tuple(branch.shape)} {branch.dtype} and {tuple(gate.shape)}"
        )
    backend = choose(COSINE_GATE, x.device.type, x.dtype)
    if backend == "reference":
        return cosine_gate_reference(x, branch, gate)
    return torch.ops.hypernas.cosine_gate(x, branch, gate, backend)[:3]


@torch.library.custom_op("hypernas::cosine_gate", mutates_args=())
def _forward(x: Tensor, branch: Tensor, gate: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, cir, distance, and for backward the dot products (..., 3) x . x, x . F, F . F."""
    outputs = _empty_outputs(x, branch, gate, backend)
    inputs = (x.contiguous(), branch.contiguous(), gate.to(outputs[1].dtype).contiguous())
    _cpu.call("cosine_gate_forward", x.dtype, gate.numel(), x.shape[-1], *inputs, *outputs)
    return outputs


@_forward.register_fake
def _empty_outputs(x: Tensor, branch: Tensor, gate: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    lead = x.shape[:-1]
    cir, distance, dots = (x.new_empty(shape, dtype=exact) for shape in (lead, lead, (*lead, 3)))
    return torch.empty_like(x, memory_format=torch.contiguous_format), cir, distance, dots


@torch.library.custom_op("hypernas::cosine_gate_backward", mutates_args=())
def _backward(
    g: Tensor, gcir: Tensor, gdistance: Tensor, x: Tensor, branch: Tensor, gate: Tensor, dots: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _empty_gradients(g, gcir, gdistance, x, branch, gate, dots, backend)
    gradients = (g.contiguous(), gcir.contiguous(), gdistance.contiguous())
    inputs = (x.contiguous(), branch.contiguous(), gate.to(dots.dtype).contiguous(), dots)
    _cpu.call("cosine_gate_backward", x.dtype, gate.numel(), x.shape[-1], *gradients, *inputs, *outputs)
    return outputs


@_backward.register_fake
def _empty_gradients(
    g: Tensor, gcir: Tensor, gdistance: Tensor, x: Tensor, branch: Tensor, gate: Tensor, dots: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dbranch = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    return dx, dbranch, dots.new_empty(gate.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, branch, gate, ctx.backend = inputs
    ctx.save_for_backward(x, branch, gate, output[3])


def _autograd(ctx, g, gcir, gdistance, _):  # type: ignore[no-untyped-def]
    x, branch, gate, dots = ctx.saved_tensors
    gradients = torch.ops.hypernas.cosine_gate_backward(g, gcir, gdistance, x, branch, gate, dots, ctx.backend)
    dx, dbranch, dgate = gradients
    return dx, dbranch, dgate.to(gate.dtype), None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def example_arguments(tokens: int, C: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random x, branch and gate; for tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    x, branch = (torch.randn(tokens, C, generator=generator).to(device, dtype) for _ in range(2))
    gate = torch.rand(tokens, generator=generator)
    return x, branch, gate.to(device, torch.float64 if dtype == torch.float64 else torch.float32)


COSINE_GATE = Op(
    "cosine_gate", cosine_gate, cosine_gate_reference, lambda *kind: example_arguments(37, 50, *kind), ("cpu",)
)
