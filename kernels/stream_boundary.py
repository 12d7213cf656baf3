"""Write one sublayer's output to the residual streams and read the next sublayer's input, for KromHC with factors of 2.

All 2 x 2 doubly stochastic matrices commute, so KromHC's mixing is diagonal in the Walsh-Hadamard basis. The streams
live there from embedding to head (X holds W X, W orthonormal), and mixing costs one product a stream:

    X'[S]  = decay[S] X[S] + post[S] y                           write: H_res X + H_post^T y
    z      = (phi . X') / sqrt(mean(X'^2) + eps)                 projection after RMSNorm over all n C
    g      = sigmoid(z + bias)                                   n of H_pre, n of H_post / 2, K of the factors
    u      = sum_S (W g_pre)[S] X'[S]                            read: H_pre X', not normalised
    post'  = W (2 g_post),   decay'[S] = prod_{k in S} (2 p[k] - 1),   p = g_factors

The first factor is the outermost, H_res = U^1 (x) ... (x) U^K: it mixes the streams that differ in their highest bit.

X, X' (..., n, C), n = 2^K; y, u (..., C); coefficients, coefficients' (..., 2 n) = post then decay, in float32 (float64
for float64 streams); phi (2 n + K, n C); bias (2 n + K,). Rows of phi: n for H_pre, n for H_post, K for the factors, each
already in the Walsh basis and with the norm's gain and alpha multiplied in; a factor's row is the difference of its two
softmax columns (z_0 - z_1), and so is its bias. Without y (the first layer) X' is X.

Bytes: forward reads X, y and writes X', u, (2 n + 2) C elements a token; backward reads gX', gu, X, y and writes dX, dy,
(3 n + 3) C, with X' recomputed. Eager PyTorch in the streams' own basis moves about (11 n + 6) C and (20 n + 12) C.
Sources: KromHC, 2601.21579, equations 10 and 14; hyper-connections' kernels, 2512.24880, section 4.3; the Walsh
form is ours (tests/kernels/test_stream_boundary.py derives it from the matrices in float64).
"""

import torch
from torch import Tensor

from kernels import _cpu
from kernels._dispatch import Op, choose


def stream_boundary_reference(
    X: Tensor, y: Tensor | None, coefficients: Tensor | None, phi: Tensor, bias: Tensor, eps: float = 1e-24
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition. Sums in float32, or float64 for float64 streams."""
    exact = torch.float64 if X.dtype == torch.float64 else torch.float32
    n, factors = X.shape[-2], X.shape[-2].bit_length() - 1

    def walsh(x: Tensor) -> Tensor:
        for k in range(factors):
            low, high = x.unflatten(-1, (-1, 2, 2**k)).unbind(-2)
            x = torch.stack((low + high, low - high), -2).flatten(-3)
        return x / n**0.5

    streams = X.to(exact)
    if y is not None and coefficients is not None:
        post, decay = coefficients.to(exact).unsqueeze(-1).chunk(2, -2)
        streams = torch.addcmul(decay * streams, post, y.to(exact).unsqueeze(-2))
    flat = streams.flatten(-2)
    r = torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)
    gates = torch.sigmoid(flat @ phi.to(exact).T * r + bias.to(exact))
    u = (walsh(gates[..., :n]).unsqueeze(-1) * streams).sum(-2)
    decay = torch.ones_like(r)
    for k in reversed(range(factors)):
        decay = torch.cat((decay, decay * (2 * gates[..., 2 * n + k, None] - 1)), -1)
    following = torch.cat((walsh(2 * gates[..., n : 2 * n]), decay), -1)
    return (X if y is None else streams.to(X.dtype)), u.to(X.dtype), following


def stream_boundary(
    X: Tensor, y: Tensor | None, coefficients: Tensor | None, phi: Tensor, bias: Tensor, eps: float = 1e-24
) -> tuple[Tensor, Tensor, Tensor]:
    """X', u and the coefficients for the next write. Raises ValueError naming the shape that does not fit."""
    n, C = X.shape[-2:]
    m = 2 * n + n.bit_length() - 1
    if n & (n - 1):
        raise ValueError(f"want a power of two of streams, got X {tuple(X.shape)}: other factors take the dense path")
    if phi.shape != (m, n * C) or bias.shape != (m,):
        raise ValueError(f"want phi {(m, n * C)} and bias {(m,)}, got {tuple(phi.shape)} and {tuple(bias.shape)}")
    if (y is None) != (coefficients is None):
        raise ValueError("want y and coefficients together, or neither (the first layer)")
    if y is not None and y.shape != (*X.shape[:-2], C):
        raise ValueError(f"want y {(*X.shape[:-2], C)}, got {tuple(y.shape)}")
    if coefficients is not None and coefficients.shape != (*X.shape[:-2], 2 * n):
        raise ValueError(f"want coefficients {(*X.shape[:-2], 2 * n)}, got {tuple(coefficients.shape)}")
    backend = choose(STREAM_BOUNDARY, X.device.type, X.dtype)
    if backend == "reference":
        return stream_boundary_reference(X, y, coefficients, phi, bias, eps)
    streams, u, following, _, _ = torch.ops.hypernas.stream_boundary(X, y, coefficients, phi, bias, eps, backend)
    return (X if y is None else streams), u, following


@torch.library.custom_op("hypernas::stream_boundary", mutates_args=())
def _forward(
    X: Tensor, y: Tensor | None, coefficients: Tensor | None, phi: Tensor, bias: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """X' (empty without y), u, coefficients', and what backward needs: z (..., m) and r (..., 1)."""
    outputs = streams, u, following, z, r = _empty_outputs(X, y, coefficients, phi, bias, eps, backend)
    inputs = _plain(X, y, coefficients, phi, bias)
    written = None if y is None else streams
    n, C = X.shape[-2:]
    _cpu.call("stream_boundary_forward", X.dtype, r.numel(), n, C, *inputs, eps, written, u, following, z, r)
    return outputs


@_forward.register_fake
def _empty_outputs(
    X: Tensor, y: Tensor | None, coefficients: Tensor | None, phi: Tensor, bias: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *lead, n, C = X.shape
    exact = torch.float64 if X.dtype == torch.float64 else torch.float32
    streams = X.new_empty((0,) if y is None else X.shape)
    small = [X.new_empty((*lead, size), dtype=exact) for size in (2 * n, phi.shape[0], 1)]
    return streams, X.new_empty((*lead, C)), *small


@torch.library.custom_op("hypernas::stream_boundary_backward", mutates_args=())
def _backward(
    gX: Tensor | None,
    gu: Tensor,
    gfollowing: Tensor,
    X: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    phi: Tensor,
    bias: Tensor,
    z: Tensor,
    r: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of X, y, coefficients, phi and bias; those of y and coefficients are empty without y."""
    outputs = _empty_gradients(gX, gu, gfollowing, X, y, coefficients, phi, bias, z, r, backend)
    dX, dy, dcoefficients, dphi, dbias = outputs
    inputs = _plain(X, y, coefficients, phi, bias)
    gradients = (None if gX is None else gX.contiguous(), gu.contiguous(), gfollowing.contiguous())
    n, C = X.shape[-2:]
    _cpu.call(
        "stream_boundary_backward", X.dtype, r.numel(), n, C, *gradients, *inputs, z, r,
        dX, dy, dcoefficients, dphi, dbias,
    )  # fmt: skip
    return outputs


@_backward.register_fake
def _empty_gradients(
    gX: Tensor | None,
    gu: Tensor,
    gfollowing: Tensor,
    X: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    phi: Tensor,
    bias: Tensor,
    z: Tensor,
    r: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dX = torch.empty_like(X, memory_format=torch.contiguous_format)
    dy = X.new_empty((0,)) if y is None else torch.empty_like(y, memory_format=torch.contiguous_format)
    dcoefficients = z.new_empty((0,) if coefficients is None else coefficients.shape)
    return dX, dy, dcoefficients, z.new_empty(phi.shape), z.new_empty(bias.shape)


def _plain(
    X: Tensor, y: Tensor | None, coefficients: Tensor | None, phi: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """Contiguous, the small ones in the dtype of the sums."""
    exact = torch.float64 if X.dtype == torch.float64 else torch.float32
    y = None if y is None else y.to(X.dtype).contiguous()
    coefficients = None if coefficients is None else coefficients.to(exact).contiguous()
    return X.contiguous(), y, coefficients, phi.to(exact).contiguous(), bias.to(exact).contiguous()


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    X, y, coefficients, phi, bias, _, ctx.backend = inputs
    ctx.save_for_backward(X, y, coefficients, phi, bias, *output[3:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, gX, gu, gfollowing, gz, gr):  # type: ignore[no-untyped-def]
    X, y, coefficients, phi, bias, z, r = ctx.saved_tensors
    n, C = X.shape[-2:]
    if gX is None and y is not None:
        gX = torch.zeros_like(X)
    gu = X.new_zeros((*X.shape[:-2], C)) if gu is None else gu
    gfollowing = z.new_zeros((*X.shape[:-2], 2 * n)) if gfollowing is None else gfollowing
    dX, dy, dcoefficients, dphi, dbias = torch.ops.hypernas.stream_boundary_backward(
        None if y is None else gX, gu, gfollowing, X, y, coefficients, phi, bias, z, r, ctx.backend
    )
    if y is None:
        dy = dcoefficients = None
    else:
        dcoefficients = dcoefficients.to(coefficients.dtype)
    return dX, dy, dcoefficients, dphi.to(phi.dtype), dbias.to(bias.dtype), None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _example(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return example_arguments(37, 4, 50, dtype, device)


def example_arguments(
    tokens: int, n: int, C: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Random X, y, coefficients, phi and bias at the scale of a model in training; for tests and benchmarks."""
    generator = torch.Generator().manual_seed(seed)
    factors = n.bit_length() - 1
    m = 2 * n + factors
    X, y = torch.randn(tokens, n, C, generator=generator), torch.randn(tokens, C, generator=generator)
    decay = torch.ones(tokens, 1)
    for _ in range(factors):
        decay = torch.cat((decay, decay * (2 * torch.rand(tokens, 1, generator=generator) - 1)), -1)
    coefficients = torch.cat((torch.rand(tokens, n, generator=generator), decay), -1)
    phi = torch.randn(m, n * C, generator=generator) * (n * C) ** -0.5
    bias = torch.randn(m, generator=generator)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    small = (t.to(device, exact) for t in (coefficients, phi, bias))
    return X.to(device, dtype), y.to(device, dtype), *small


STREAM_BOUNDARY = Op("stream_boundary", stream_boundary, stream_boundary_reference, _example, ("cpu",))
