"""RMSNorm over the last axis.

    out = x / sqrt(mean(x^2) + eps) * weight

x, out (..., C), weight (C,). Sums in float32 (float64 for float64). Bytes: forward reads x and writes out, 2 C
elements a token; backward reads x and the gradient and writes dx, 3 C, plus the sums for the weight.
Source: Zhang and Sennrich 2019, 1910.07467, equation 4.
"""

import torch
from torch import Tensor

from hypernas.kernels import cpu_library
from hypernas.kernels.dispatch import Op
from hypernas.kernels.triton_tools import accumulator, blocks, row_tile, tl, triton


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """The definition."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = x.to(exact)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.to(exact)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise the last axis of x. Raises ValueError when weight does not match it."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"want weight {tuple(x.shape[-1:])} for x {tuple(x.shape)}, got {tuple(weight.shape)}")
    backend = RMS_NORM.backend_for(x.device.type, x.dtype)
    if backend == "reference":
        return rms_norm_reference(x, weight, eps)
    return torch.ops.hypernas.rms_norm(x, weight, eps, backend)


@torch.library.custom_op("hypernas::rms_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
    out = _empty_output(x, weight, eps, backend)
    C = x.shape[-1]
    tokens = x.numel() // C
    if backend == "triton":
        tile = row_tile(C, x.dtype)
        grid = (blocks(tokens, tile["BT"]),)
        rms_norm_forward_kernel[grid](
            x.contiguous(), _exact(x, weight), out, tokens, eps, C=C, ACC=accumulator(x.dtype), **tile
        )
    else:
        cpu_library.call("rms_norm_forward", x.dtype, tokens, C, x.contiguous(), _exact(x, weight), eps, out)
    return out


@_forward.register_fake
def _empty_output(x: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("hypernas::rms_norm_backward", mutates_args=())
def _backward(g: Tensor, x: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    dx, dweight = _empty_gradients(g, x, weight, eps, backend)
    C = x.shape[-1]
    tokens = x.numel() // C
    arguments = (g.contiguous(), x.contiguous(), _exact(x, weight))
    if backend == "triton":
        tile = row_tile(C, x.dtype)
        programs = min(256, blocks(tokens, tile["BT"]))
        steps = blocks(tokens, programs * tile["BT"])
        partial = dweight.new_empty((programs, C))
        acc = accumulator(x.dtype)
        rms_norm_backward_kernel[(programs,)](*arguments, dx, partial, tokens, steps, eps, C=C, ACC=acc, **tile)
        torch.sum(partial, 0, out=dweight)
    else:
        cpu_library.call("rms_norm_backward", x.dtype, tokens, C, *arguments, eps, dx, dweight)
    return dx, dweight


@_backward.register_fake
def _empty_gradients(g: Tensor, x: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    dweight = weight.new_empty(weight.shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), dweight


def _exact(x: Tensor, weight: Tensor) -> Tensor:
    return weight.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()


@triton.jit
def rms_norm_forward_kernel(
    X, W, OUT, T, eps, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    c = tl.arange(0, BC)
    at, here = t[:, None] * C + c[None, :], (t < T)[:, None] & (c < C)[None, :]
    x = tl.load(X + at, mask=here, other=0.0).to(ACC)
    weight = tl.load(W + c, mask=c < C, other=0.0)
    r = 1.0 / tl.sqrt(tl.sum(x * x, 1) / C + eps)
    tl.store(OUT + at, (x * r[:, None] * weight[None, :]).to(OUT.dtype.element_ty), mask=here)


@triton.jit
def rms_norm_backward_kernel(
    G, X, W, DX, PARTIAL, T, STEPS, eps, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """dx, and in row `program` of PARTIAL the weight's gradient over this program's tokens."""
    c = tl.arange(0, BC)
    weight = tl.load(W + c, mask=c < C, other=0.0)
    dweight = tl.zeros((BC,), ACC)
    for step in range(STEPS):
        t = (tl.program_id(0).to(tl.int64) * STEPS + step) * BT + tl.arange(0, BT)
        at, here = t[:, None] * C + c[None, :], (t < T)[:, None] & (c < C)[None, :]
        x = tl.load(X + at, mask=here, other=0.0).to(ACC)
        g = tl.load(G + at, mask=here, other=0.0).to(ACC)
        r = 1.0 / tl.sqrt(tl.sum(x * x, 1) / C + eps)
        gw = g * weight[None, :]
        shrink = -tl.sum(gw * x, 1) * r * r * r / C
        tl.store(DX + at, (gw * r[:, None] + x * shrink[:, None]).to(DX.dtype.element_ty), mask=here)
        dweight += tl.sum(g * x * r[:, None], 0)
    tl.store(PARTIAL + tl.program_id(0) * C + c, dweight, mask=c < C)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def _autograd(ctx, g):
    x, weight = ctx.saved_tensors
    dx, dweight = torch.ops.hypernas.rms_norm_backward(g, x, weight, ctx.eps, ctx.backend)
    return dx, dweight.to(weight.dtype), None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def example_arguments(tokens: int, C: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random x and weight; for tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(tokens, C, generator=generator), 1 + 0.1 * torch.randn(C, generator=generator)
    return x.to(device, dtype), weight.to(device, torch.float64 if dtype == torch.float64 else torch.float32)


RMS_NORM = Op(
    "rms_norm", rms_norm, rms_norm_reference, lambda *kind: example_arguments(37, 50, *kind), ("cpu", "triton")
)
