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

from kernels import _cpu
from kernels._dispatch import Op, choose


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
    backend = choose(STREAM_MIX, X.device.type, X.dtype)
    if backend == "reference":
        return stream_mix_reference(X, y, H, post)
    return torch.ops.hypernas.stream_mix(X, y, H, post)


@torch.library.custom_op("hypernas::stream_mix", mutates_args=())
def _forward(X: Tensor, y: Tensor, H: Tensor, post: Tensor) -> Tensor:
    out = _empty_output(X, y, H, post)
    n, C = X.shape[-2:]
    _cpu.call("stream_mix_forward", X.dtype, post.numel() // n, n, C, *_plain(X, y, H, post), out)
    return out


@_forward.register_fake
def _empty_output(X: Tensor, y: Tensor, H: Tensor, post: Tensor) -> Tensor:
    return torch.empty_like(X, memory_format=torch.contiguous_format)


@torch.library.custom_op("hypernas::stream_mix_backward", mutates_args=())
def _backward(g: Tensor, X: Tensor, y: Tensor, H: Tensor, post: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _empty_gradients(g, X, y, H, post)
    n, C = X.shape[-2:]
    _cpu.call("stream_mix_backward", X.dtype, post.numel() // n, n, C, g.contiguous(), *_plain(X, y, H, post), *outputs)
    return outputs


@_backward.register_fake
def _empty_gradients(g: Tensor, X: Tensor, y: Tensor, H: Tensor, post: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dX, dy = (X.new_empty(t.shape) for t in (X, y))
    dH, dpost = (X.new_empty(t.shape, dtype=torch.float32) for t in (H, post))
    return dX, dy, dH, dpost


def _plain(X: Tensor, y: Tensor, H: Tensor, post: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return X.contiguous(), y.to(X.dtype).contiguous(), H.float().contiguous(), post.float().contiguous()


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, g):
    gradients = torch.ops.hypernas.stream_mix_backward(g, *ctx.saved_tensors)
    return tuple(gradient.to(t.dtype) for gradient, t in zip(gradients, ctx.saved_tensors, strict=True))


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
    "stream_mix", stream_mix, stream_mix_reference, lambda *kind: example_arguments(37, 3, 50, *kind), ("cpu",)
)
