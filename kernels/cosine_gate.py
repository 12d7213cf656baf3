"""Gate a sublayer's output F, and measure how much it had to say: one pass over its input x and F.

    out      = gate * F
    cir      = 1 - cos(x, F)                              the cosine incompatibility, 0 to 2
    distance = 2 - 2 cos(x + gate F, x + F)               of the gated from the ungated output, both normalised

x, F, out (..., C); gate, cir, distance (...), in float32 (float64 for float64). All three outputs are differentiable
in x, F and gate: both cosines follow from x . x, x . F and F . F, so backward is one pass too. cos(p, q) = p . q over
the root of max(|p|^2 |q|^2, 1e-30).

Bytes: forward reads x, F and writes out, 3 C elements a token; backward reads x, F and the gradient and writes dx, dF,
5 C. Source: CosineGate, 2512.22206.
"""

import torch
from torch import Tensor

from hypernas.kernels import cpu_library
from hypernas.kernels.dispatch import Op
from hypernas.kernels.triton_tools import accumulator, blocks, row_tile, tl, triton


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
    backend = COSINE_GATE.backend_for(x.device.type, x.dtype)
    if backend == "reference":
        return cosine_gate_reference(x, branch, gate)
    return torch.ops.hypernas.cosine_gate(x, branch, gate, backend)[:3]


@torch.library.custom_op("hypernas::cosine_gate", mutates_args=())
def _forward(x: Tensor, branch: Tensor, gate: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, cir, distance, and for backward the dot products (..., 3) x . x, x . F, F . F."""
    outputs = _empty_outputs(x, branch, gate, backend)
    inputs = (x.contiguous(), branch.contiguous(), gate.to(outputs[1].dtype).contiguous())
    tokens, C = gate.numel(), x.shape[-1]
    if backend == "triton":
        tile = row_tile(C, x.dtype)
        grid = (blocks(tokens, tile["BT"]),)
        cosine_gate_forward_kernel[grid](*inputs, *outputs, tokens, C=C, ACC=accumulator(x.dtype), **tile)
    else:
        cpu_library.call("cosine_gate_forward", x.dtype, tokens, C, *inputs, *outputs)
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
    tokens, C = gate.numel(), x.shape[-1]
    if backend == "triton":
        tile = row_tile(C, x.dtype)
        grid = (blocks(tokens, tile["BT"]),)
        cosine_gate_backward_kernel[grid](*gradients, *inputs, *outputs, tokens, C=C, ACC=accumulator(x.dtype), **tile)
    else:
        cpu_library.call("cosine_gate_backward", x.dtype, tokens, C, *gradients, *inputs, *outputs)
    return outputs


@_backward.register_fake
def _empty_gradients(
    g: Tensor, gcir: Tensor, gdistance: Tensor, x: Tensor, branch: Tensor, gate: Tensor, dots: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dbranch = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    return dx, dbranch, dots.new_empty(gate.shape)


@triton.jit
def _cosine(p, q, s):
    """cos = p / sqrt(q s), and its derivatives by p, q and s."""
    product = tl.maximum(q * s, 1e-30)
    dp = 1.0 / tl.sqrt(product)
    half = tl.where(q * s > 1e-30, -0.5 * p * dp / product, 0.0)
    return p * dp, dp, half * s, half * q


@triton.jit
def cosine_gate_forward_kernel(
    X, F, GATE, OUT, CIR, DISTANCE, DOTS, T, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    c = tl.arange(0, BC)
    inside = t < T
    at, here = t[:, None] * C + c[None, :], inside[:, None] & (c < C)[None, :]
    x = tl.load(X + at, mask=here, other=0.0).to(ACC)
    f = tl.load(F + at, mask=here, other=0.0).to(ACC)
    g = tl.load(GATE + t, mask=inside, other=0.0)
    tl.store(OUT + at, (f * g[:, None]).to(OUT.dtype.element_ty), mask=here)
    xx, xf, ff = tl.sum(x * x, 1), tl.sum(x * f, 1), tl.sum(f * f, 1)
    tl.store(DOTS + 3 * t, xx, mask=inside)
    tl.store(DOTS + 3 * t + 1, xf, mask=inside)
    tl.store(DOTS + 3 * t + 2, ff, mask=inside)
    incompatible, _, _, _ = _cosine(xf, xx, ff)
    consistent, _, _, _ = _cosine(xx + (1.0 + g) * xf + g * ff, xx + 2.0 * g * xf + g * g * ff, xx + 2.0 * xf + ff)
    tl.store(CIR + t, 1.0 - incompatible, mask=inside)
    tl.store(DISTANCE + t, 2.0 - 2.0 * consistent, mask=inside)


@triton.jit
def cosine_gate_backward_kernel(
    GOUT, GCIR, GDISTANCE, X, F, GATE, DOTS, DX, DF, DGATE, T,
    C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    c = tl.arange(0, BC)
    inside = t < T
    at, here = t[:, None] * C + c[None, :], inside[:, None] & (c < C)[None, :]
    g = tl.load(GATE + t, mask=inside, other=0.0)
    xx = tl.load(DOTS + 3 * t, mask=inside, other=0.0)
    xf = tl.load(DOTS + 3 * t + 1, mask=inside, other=0.0)
    ff = tl.load(DOTS + 3 * t + 2, mask=inside, other=0.0)
    on_cos = -tl.load(GCIR + t, mask=inside, other=0.0)
    on_turn = -2.0 * tl.load(GDISTANCE + t, mask=inside, other=0.0)
    _, ap, aq, az = _cosine(xf, xx, ff)
    _, bp, bq, bz = _cosine(xx + (1.0 + g) * xf + g * ff, xx + 2.0 * g * xf + g * g * ff, xx + 2.0 * xf + ff)
    on_xx = 2.0 * (on_cos * aq + on_turn * (bp + bq + bz))
    on_xf = on_cos * ap + on_turn * (bp * (1.0 + g) + bq * 2.0 * g + bz * 2.0)
    on_ff = 2.0 * (on_cos * az + on_turn * (bp * g + bq * g * g + bz))
    turn = on_turn * (bp * (xf + ff) + bq * 2.0 * (xf + g * ff))
    x = tl.load(X + at, mask=here, other=0.0).to(ACC)
    f = tl.load(F + at, mask=here, other=0.0).to(ACC)
    gout = tl.load(GOUT + at, mask=here, other=0.0).to(ACC)
    tl.store(DX + at, (x * on_xx[:, None] + f * on_xf[:, None]).to(DX.dtype.element_ty), mask=here)
    df = gout * g[:, None] + x * on_xf[:, None] + f * on_ff[:, None]
    tl.store(DF + at, df.to(DF.dtype.element_ty), mask=here)
    tl.store(DGATE + t, tl.sum(gout * f, 1) + turn, mask=inside)


def _setup_context(ctx, inputs, output) -> None:
    x, branch, gate, ctx.backend = inputs
    ctx.save_for_backward(x, branch, gate, output[3])


def _autograd(ctx, g, gcir, gdistance, _):
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
    "cosine_gate", cosine_gate, cosine_gate_reference, lambda *kind: example_arguments(37, 50, *kind), ("cpu", "triton")
)
