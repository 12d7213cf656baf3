"""SwiGLU's elementwise half: what lies between the two matrix products of a gated FFN.

    out = silu(x[..., :H]) * x[..., H:],   silu(a) = a / (1 + e^-a)

x (..., 2 H), one product for gate and up projections; out (..., H). Computed in float32 (float64 for float64). Bytes:
forward reads 2 H and writes H elements a token, backward reads 3 H and writes 2 H.
Source: Shazeer 2020, 2002.05202, equation 5.
"""

from typing import Any

import torch
from torch import Tensor

from hypernas.kernels import cpu_library
from hypernas.kernels.dispatch import Op
from hypernas.kernels.triton_tools import accumulator, blocks, tl, triton


def swiglu_reference(x: Tensor) -> Tensor:
    """The definition."""
    gate, up = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def swiglu(x: Tensor) -> Tensor:
    """Gate the second half of the last axis with the first. Raises ValueError when that axis is odd."""
    if x.shape[-1] % 2:
        raise ValueError(f"want gate and up projections side by side, an even last axis; got x {tuple(x.shape)}")
    backend = SWIGLU.backend_for(x.device.type, x.dtype)
    if backend == "reference":
        return swiglu_reference(x)
    return torch.ops.hypernas.swiglu(x, backend)


@torch.library.custom_op("hypernas::swiglu", mutates_args=())
def _forward(x: Tensor, backend: str) -> Tensor:
    out = _empty_output(x, backend)
    H = out.shape[-1]
    tokens = x.numel() // (2 * H)
    if backend == "triton":
        grid, tile = _tiles(x, tokens, H)
        swiglu_forward_kernel[grid](x.contiguous(), out, tokens, H=H, **tile)
    else:
        cpu_library.call("swiglu_forward", x.dtype, tokens, H, x.contiguous(), out)
    return out


@_forward.register_fake
def _empty_output(x: Tensor, backend: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@torch.library.custom_op("hypernas::swiglu_backward", mutates_args=())
def _backward(g: Tensor, x: Tensor, backend: str) -> Tensor:
    dx = _empty_gradient(g, x, backend)
    H = g.shape[-1]
    tokens = x.numel() // (2 * H)
    if backend == "triton":
        grid, tile = _tiles(x, tokens, H)
        swiglu_backward_kernel[grid](g.contiguous(), x.contiguous(), dx, tokens, H=H, **tile)
    else:
        cpu_library.call("swiglu_backward", x.dtype, tokens, H, g.contiguous(), x.contiguous(), dx)
    return dx


@_backward.register_fake
def _empty_gradient(g: Tensor, x: Tensor, backend: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@triton.jit
def swiglu_forward_kernel(X, OUT, T, H: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, ACC: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    here = (t < T)[:, None] & (h < H)[None, :]
    at = t[:, None] * (2 * H) + h[None, :]
    gate = tl.load(X + at, mask=here, other=0.0).to(ACC)
    up = tl.load(X + at + H, mask=here, other=0.0).to(ACC)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(OUT + t[:, None] * H + h[None, :], out.to(OUT.dtype.element_ty), mask=here)


@triton.jit
def swiglu_backward_kernel(G, X, DX, T, H: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, ACC: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    here = (t < T)[:, None] & (h < H)[None, :]
    at = t[:, None] * (2 * H) + h[None, :]
    gate = tl.load(X + at, mask=here, other=0.0).to(ACC)
    up = tl.load(X + at + H, mask=here, other=0.0).to(ACC)
    g = tl.load(G + t[:, None] * H + h[None, :], mask=here, other=0.0).to(ACC)
    s = 1.0 / (1.0 + tl.exp(-gate))
    tl.store(DX + at, (g * up * s * (1.0 + gate * (1.0 - s))).to(DX.dtype.element_ty), mask=here)
    tl.store(DX + at + H, (g * gate * s).to(DX.dtype.element_ty), mask=here)


def _tiles(x: Tensor, tokens: int, H: int) -> tuple[tuple[int, int], dict[str, Any]]:
    BH = min(256, 1 << max(H - 1, 15).bit_length())
    tile = {"BT": 2048 // BH, "BH": BH, "ACC": accumulator(x.dtype), "num_warps": 4}
    return (blocks(tokens, 2048 // BH), blocks(H, BH)), tile


def _setup_context(ctx, inputs, output) -> None:
    x, ctx.backend = inputs
    ctx.save_for_backward(x)


def _autograd(ctx, g):
    return torch.ops.hypernas.swiglu_backward(g, *ctx.saved_tensors, ctx.backend), None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def example_arguments(tokens: int, H: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor]:
    """Random x, with values far out on both sides; for tests and benchmarks."""
    return (3 * torch.randn(tokens, 2 * H, generator=torch.Generator().manual_seed(0)).to(device, dtype),)


SWIGLU = Op("swiglu", swiglu, swiglu_reference, lambda *kind: example_arguments(37, 50, *kind), ("cpu", "triton"))
