"""Write a sublayer's output to the residual streams through a dense matrix a token: mHC, mHC-lite, hyper-connections.

    X' = H X + post y^T

X, X' (..., n, C), any n; y (..., C); H (..., n, n) and post (..., n), both used in float32 (float64 for float64).
Bytes: forward reads X, y and writes X', (2 n + 1) C elements a token; backward reads the gradient, X, y and writes
dX, dy, (3 n + 2) C. Where H is a product of 2 x 2
factors the Walsh form (kernels/stream_boundary.py) does with n products what takes n^2 here. Source: mHC, 2512.24880,
equation 1.
"""

import torch
from torch import Tensor

from hypernas.kernels import cpu_library
from hypernas.kernels.dispatch import Op
from hypernas.kernels.triton_tools import accumulator, blocks, tl, triton


def stream_mix_reference(X: Tensor, y: Tensor, H: Tensor, post: Tensor) -> Tensor:
    """The definition."""
    exact = torch.float64 if X.dtype == torch.float64 else torch.float32
    mixed = H.to(exact) @ X.to(exact)
    return torch.addcmul(mixed, post.to(exact).unsqueeze(-1), y.to(exact).unsqueeze(-2)).to(X.dtype)


def stream_mix(X: Tensor, y: Tensor, H: Tensor, post: Tensor) -> Tensor:
    """X' = H X + post y^T. Raises ValueError naming the shape that does not fit."""
    *lead, n, C = X.shape
    want = {"y": (*lead, C), "H": (*lead, n, n), "post": (*lead, n)}
    for (name, shape), tensor in zip(want.items(), (y, H, post), strict=True):
        if tensor.shape != shape:
            raise ValueError(f"want {name} {shape} for X {tuple(X.shape)}, got {tuple(tensor.shape)}")
    backend = STREAM_MIX.backend_for(X.device.type, X.dtype)
    if backend == "reference":
        return stream_mix_reference(X, y, H, post)
    return torch.ops.hypernas.stream_mix(X, y, H, post, backend)


@torch.library.custom_op("hypernas::stream_mix", mutates_args=())
def _forward(X: Tensor, y: Tensor, H: Tensor, post: Tensor, backend: str) -> Tensor:
    out = _empty_output(X, y, H, post, backend)
    n, C = X.shape[-2:]
    tokens, inputs = post.numel() // n, _plain(X, y, H, post)
    if backend == "triton":
        stream_mix_forward_kernel[_grid(tokens, C)](*inputs, out, tokens, C=C, n=n, ACC=accumulator(X.dtype), **TILE)
    else:
        cpu_library.call("stream_mix_forward", X.dtype, tokens, n, C, *inputs, out)
    return out


@_forward.register_fake
def _empty_output(X: Tensor, y: Tensor, H: Tensor, post: Tensor, backend: str) -> Tensor:
    return torch.empty_like(X, memory_format=torch.contiguous_format)


@torch.library.custom_op("hypernas::stream_mix_backward", mutates_args=())
def _backward(
    g: Tensor, X: Tensor, y: Tensor, H: Tensor, post: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _empty_gradients(g, X, y, H, post, backend)
    n, C = X.shape[-2:]
    tokens, inputs = post.numel() // n, (g.contiguous(), *_plain(X, y, H, post))
    if backend == "triton":
        sums = {"ACC": accumulator(X.dtype), "NN": triton.next_power_of_2(n * n), "N": triton.next_power_of_2(n)}
        stream_mix_backward_kernel[_grid(tokens)](*inputs, *outputs, tokens, C=C, n=n, **sums, **TILE)
    else:
        cpu_library.call("stream_mix_backward", X.dtype, tokens, n, C, *inputs, *outputs)
    return outputs


@_backward.register_fake
def _empty_gradients(
    g: Tensor, X: Tensor, y: Tensor, H: Tensor, post: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    exact = torch.float64 if X.dtype == torch.float64 else torch.float32
    dX, dy = (X.new_empty(t.shape) for t in (X, y))
    dH, dpost = (X.new_empty(t.shape, dtype=exact) for t in (H, post))
    return dX, dy, dH, dpost


def _plain(X: Tensor, y: Tensor, H: Tensor, post: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    exact = torch.float64 if X.dtype == torch.float64 else torch.float32
    return X.contiguous(), y.to(X.dtype).contiguous(), H.to(exact).contiguous(), post.to(exact).contiguous()


# Triton. A program owns BT tokens, and forward BC of their channels. Streams are run-time loops, so registers do not
# grow with n; each row is read n times, the first time from memory and then from the L1 cache.
TILE = {"BT": 16, "BC": 64, "num_warps": 4}


def _grid(tokens: int, C: int | None = None) -> tuple[int, ...]:
    return blocks(tokens, TILE["BT"]), 1 if C is None else blocks(C, TILE["BC"])


@triton.jit
def stream_mix_forward_kernel(
    X, Y, H, POST, OUT, T, C: tl.constexpr, n: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = t < T
    here = inside[:, None] & (c < C)[None, :]
    row = t[:, None] * (n * C) + c[None, :]
    y = tl.load(Y + t[:, None] * C + c[None, :], mask=here, other=0.0).to(ACC)
    for i in range(n):
        total = tl.load(POST + t * n + i, mask=inside, other=0.0)[:, None] * y
        for j in range(n):
            h = tl.load(H + (t * n + i) * n + j, mask=inside, other=0.0)
            total += h[:, None] * tl.load(X + row + j * C, mask=here, other=0.0).to(ACC)
        tl.store(OUT + row + i * C, total.to(OUT.dtype.element_ty), mask=here)


@triton.jit
def stream_mix_backward_kernel(
    G, X, Y, H, POST, DX, DY, DH, DPOST, T, C: tl.constexpr, n: tl.constexpr, NN: tl.constexpr, N: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    inside = t < T
    entries, streams = tl.arange(0, NN), tl.arange(0, N)
    dh, dpost = tl.zeros((BT, NN), ACC), tl.zeros((BT, N), ACC)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        here = inside[:, None] & (c < C)[None, :]
        row = t[:, None] * (n * C) + c[None, :]
        y = tl.load(Y + t[:, None] * C + c[None, :], mask=here, other=0.0).to(ACC)
        dy = tl.zeros((BT, BC), ACC)
        for i in range(n):
            g = tl.load(G + row + i * C, mask=here, other=0.0).to(ACC)
            dy += tl.load(POST + t * n + i, mask=inside, other=0.0)[:, None] * g
            dpost += tl.where(streams[None, :] == i, tl.sum(g * y, 1)[:, None], 0.0)
            for j in range(n):
                x = tl.load(X + row + j * C, mask=here, other=0.0).to(ACC)
                dh += tl.where(entries[None, :] == i * n + j, tl.sum(g * x, 1)[:, None], 0.0)
        tl.store(DY + t[:, None] * C + c[None, :], dy.to(DY.dtype.element_ty), mask=here)
        for j in range(n):
            dx = tl.zeros((BT, BC), ACC)
            for i in range(n):
                h = tl.load(H + (t * n + i) * n + j, mask=inside, other=0.0)
                dx += h[:, None] * tl.load(G + row + i * C, mask=here, other=0.0).to(ACC)
            tl.store(DX + row + j * C, dx.to(DX.dtype.element_ty), mask=here)
    tl.store(DH + t[:, None] * (n * n) + entries[None, :], dh, mask=inside[:, None] & (entries < n * n)[None, :])
    tl.store(DPOST + t[:, None] * n + streams[None, :], dpost, mask=inside[:, None] & (streams < n)[None, :])


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, g):
    gradients = torch.ops.hypernas.stream_mix_backward(g, *ctx.saved_tensors, ctx.backend)
    return *(gradient.to(t.dtype) for gradient, t in zip(gradients, ctx.saved_tensors, strict=True)), None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def example_arguments(
    tokens: int, n: int, C: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random X, y, a matrix with rows of sum 1, and post; for tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    X, y = torch.randn(tokens, n, C, generator=generator), torch.randn(tokens, C, generator=generator)
    H = torch.randn(tokens, n, n, generator=generator).softmax(-1)
    post = 2 * torch.rand(tokens, n, generator=generator)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return X.to(device, dtype), y.to(device, dtype), H.to(device, exact), post.to(device, exact)


STREAM_MIX = Op(
    "stream_mix", stream_mix, stream_mix_reference, lambda *kind: example_arguments(37, 3, 50, *kind), ("cpu", "triton")
)
