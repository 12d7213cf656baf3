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
for float64 streams); phi (2 n + K, n C); bias (2 n + K,). Rows of phi: n for H_pre, n for H_post, K for the factors,
each already in the Walsh basis and with the norm's gain and alpha multiplied in; a factor's row is the difference of
its two softmax columns (z_0 - z_1), and so is its bias. Without y (the first layer) X' is X.

Bytes: forward reads X, y and writes X', u, (2 n + 2) C elements a token; backward reads gX', gu, X, y and writes dX,
dy, (3 n + 3) C, with X' recomputed.
Sources: KromHC, 2601.21579, equations 10 and 14; hyper-connections' kernels, 2512.24880, section 4.3; the Walsh
form is ours (tests/kernels/test_stream_boundary.py derives it from the matrices in float64).
"""

from typing import Any

import torch
from torch import Tensor

from hypernas.kernels import cpu_library
from hypernas.kernels.dispatch import Op
from hypernas.kernels.stream_chain import recorder, written
from hypernas.kernels.triton_tools import accumulator, blocks, long_precision, precision, tl, triton


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
    """X', u and the coefficients for the next write. Raises ValueError naming the shape that does not fit.

    Inside `stream_chain.recomputing` X is kept for backward at some boundaries only.
    """
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
    following = recorder()
    if following is None:
        return _boundary(X, y, coefficients, phi, bias, eps)
    return following.follow(_boundary, X, y, coefficients, phi, bias, eps)


def _boundary(
    X: Tensor, y: Tensor | None, coefficients: Tensor | None, phi: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    backend = STREAM_BOUNDARY.backend_for(X.device.type, X.dtype)
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
    n, C = X.shape[-2:]
    if backend == "triton":
        _launch_forward(*inputs, eps, *outputs)
    else:
        written = None if y is None else streams
        cpu_library.call("stream_boundary_forward", X.dtype, r.numel(), n, C, *inputs, eps, written, u, following, z, r)
    return outputs


@_forward.register_fake
def _empty_outputs(
    X: Tensor, y: Tensor | None, coefficients: Tensor | None, phi: Tensor, bias: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *lead, n, C = X.shape
    exact = torch.float64 if X.dtype == torch.float64 else torch.float32
    streams = X.new_empty((0,) if y is None else X.shape)
    following, z, r = (X.new_empty((*lead, size), dtype=exact) for size in (2 * n, phi.shape[0], 1))
    return streams, X.new_empty((*lead, C)), following, z, r


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
    inputs = _plain(X, y, coefficients, phi, bias)
    gradients = (None if gX is None else gX.contiguous(), gu.contiguous(), gfollowing.contiguous())
    n, C = X.shape[-2:]
    if backend == "triton":
        _launch_backward(*gradients, *inputs, z, r, *outputs)
    else:
        cpu_library.call("stream_boundary_backward", X.dtype, r.numel(), n, C, *gradients, *inputs, z, r, *outputs)
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
    dy = X.new_empty((0,) if y is None else y.shape)
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


# Triton. A program owns BT tokens and walks over the channels twice: once to write X' and project it, once to read u,
# whose inputs then come from the L1 or L2 cache. Streams are a run-time loop, so registers do not grow with n.
# Numbers a token are [BT, M] tiles, M = 16 or 32 columns: n of H_pre, n of H_post, K factors.


@triton.jit
def _column(tile, index, columns):
    return tl.sum(tl.where(columns[None, :] == index, tile, 0.0), 1)


@triton.jit
def _walsh_blocks(columns, n: tl.constexpr, M: tl.constexpr, ACC: tl.constexpr):
    """[M, M]: the orthonormal Walsh matrix on the columns [0, n) and again on [n, 2 n), zero elsewhere."""
    row, col = columns[:, None], columns[None, :]
    shared = row & col & (n - 1)
    parity = (shared ^ (shared >> 1) ^ (shared >> 2) ^ (shared >> 3)) & 1
    same_block = ((row < n) & (col < n)) | ((row >= n) & (row < 2 * n) & (col >= n) & (col < 2 * n))
    scale = 1.0 / tl.sqrt(tl.full((M, M), n, ACC))
    return tl.where(same_block, tl.where(parity == 1, -scale, scale), 0.0)


@triton.jit
def _gates(z, bias_ptr, columns, m: tl.constexpr, ACC: tl.constexpr):
    bias = tl.load(bias_ptr + columns, mask=columns < m, other=0.0).to(ACC)
    return tl.where(columns[None, :] < m, 1.0 / (1.0 + tl.exp(-(z + bias[None, :]))), 0.0)


@triton.jit
def stream_boundary_forward_kernel(
    X, Y, COEFFICIENTS, PHI, BIAS, OUT, U, FOLLOWING, Z, R, T, eps,
    C: tl.constexpr, n: tl.constexpr, K: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    WRITE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m: tl.constexpr = 2 * n + K
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    inside = t < T
    columns = tl.arange(0, M)
    squares = tl.zeros((BT, BC), ACC)
    z = tl.zeros((BT, M), ACC)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        here = inside[:, None] & (c < C)[None, :]
        if WRITE:
            y = tl.load(Y + t[:, None] * C + c[None, :], mask=here, other=0.0).to(ACC)
        for s in range(n):
            at = t[:, None] * (n * C) + s * C + c[None, :]
            x = tl.load(X + at, mask=here, other=0.0)
            if WRITE:
                post = tl.load(COEFFICIENTS + t * (2 * n) + s, mask=inside, other=0.0)
                decay = tl.load(COEFFICIENTS + t * (2 * n) + n + s, mask=inside, other=0.0)
                x = written(x.to(ACC), y, decay[:, None], post[:, None]).to(OUT.dtype.element_ty)
                tl.store(OUT + at, x, mask=here)
            wide = x.to(ACC)
            squares += wide * wide
            rows = columns[None, :] * (n * C) + s * C + c[:, None]
            phi = tl.load(PHI + rows, mask=(columns < m)[None, :] & (c < C)[:, None], other=0.0)
            z = tl.dot(x, phi.to(x.dtype), z, input_precision=PRECISION, out_dtype=ACC)
    r = 1.0 / tl.sqrt(tl.sum(squares, 1) / (n * C) + eps)
    z = z * r[:, None]
    small = inside[:, None] & (columns < m)[None, :]
    tl.store(R + t, r, mask=inside)
    tl.store(Z + t[:, None] * m + columns[None, :], z, mask=small)
    gates = _gates(z, BIAS, columns, m, ACC)
    mixed = tl.dot(gates, _walsh_blocks(columns, n, M, ACC), input_precision="ieee", out_dtype=ACC)
    own = t[:, None] * (2 * n) + columns[None, :]
    is_post = inside[:, None] & ((columns >= n) & (columns < 2 * n))[None, :]
    tl.store(FOLLOWING + own - n, 2.0 * mixed, mask=is_post)
    decay_row = tl.full((BT, M), 1.0, ACC)
    for k in tl.static_range(K):
        e = 2.0 * _column(gates, 2 * n + k, columns) - 1.0
        decay_row = tl.where((((columns >> (K - 1 - k)) & 1) == 1)[None, :], decay_row * e[:, None], decay_row)
    tl.store(FOLLOWING + own + n, decay_row, mask=inside[:, None] & (columns < n)[None, :])
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        here = inside[:, None] & (c < C)[None, :]
        u = tl.zeros((BT, BC), ACC)
        if WRITE:
            y = tl.load(Y + t[:, None] * C + c[None, :], mask=here, other=0.0).to(ACC)
        for s in range(n):
            x = tl.load(X + t[:, None] * (n * C) + s * C + c[None, :], mask=here, other=0.0).to(ACC)
            if WRITE:
                post = tl.load(COEFFICIENTS + t * (2 * n) + s, mask=inside, other=0.0)
                decay = tl.load(COEFFICIENTS + t * (2 * n) + n + s, mask=inside, other=0.0)
                x = decay[:, None] * x + post[:, None] * y
            u += _column(mixed, s, columns)[:, None] * x
        tl.store(U + t[:, None] * C + c[None, :], u.to(U.dtype.element_ty), mask=here)


@triton.jit
def stream_boundary_backward_kernel(
    GX, GU, GFOLLOWING, X, Y, COEFFICIENTS, PHI, BIAS, Z, R, DX, DY, DCOEFFICIENTS, WEIGHTS, T,
    C: tl.constexpr, n: tl.constexpr, K: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    WRITE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m: tl.constexpr = 2 * n + K
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    inside = t < T
    columns = tl.arange(0, M)
    streams = inside[:, None] & (columns < n)[None, :]
    along = tl.zeros((BT, M), ACC)  # <gu, X'[S]> in column S
    along_y = tl.zeros((BT,), ACC)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        here = inside[:, None] & (c < C)[None, :]
        gu = tl.load(GU + t[:, None] * C + c[None, :], mask=here, other=0.0).to(ACC)
        if WRITE:
            along_y += tl.sum(gu * tl.load(Y + t[:, None] * C + c[None, :], mask=here, other=0.0).to(ACC), 1)
        for s in range(n):
            x = tl.load(X + t[:, None] * (n * C) + s * C + c[None, :], mask=here, other=0.0).to(ACC)
            along += tl.where(columns[None, :] == s, tl.sum(gu * x, 1)[:, None], 0.0)
    own = t[:, None] * (2 * n) + columns[None, :]
    if WRITE:
        post_row = tl.load(COEFFICIENTS + own, mask=streams, other=0.0)
        along = along * tl.load(COEFFICIENTS + own + n, mask=streams, other=0.0) + along_y[:, None] * post_row
    is_post = inside[:, None] & ((columns >= n) & (columns < 2 * n))[None, :]
    along += 2.0 * tl.load(GFOLLOWING + own - n, mask=is_post, other=0.0)
    walsh = _walsh_blocks(columns, n, M, ACC)
    dgates = tl.dot(along, walsh, input_precision="ieee", out_dtype=ACC)
    small = inside[:, None] & (columns < m)[None, :]
    z = tl.load(Z + t[:, None] * m + columns[None, :], mask=small, other=0.0)
    gates = _gates(z, BIAS, columns, m, ACC)
    gdecay = tl.load(GFOLLOWING + own + n, mask=streams, other=0.0)
    for k in tl.static_range(K):
        others = tl.where((((columns >> (K - 1 - k)) & 1) == 1)[None, :], gdecay, 0.0)
        for j in tl.static_range(K):
            if j != k:
                e = 2.0 * _column(gates, 2 * n + j, columns) - 1.0
                others = tl.where((((columns >> (K - 1 - j)) & 1) == 1)[None, :], others * e[:, None], others)
        dgates += tl.where(columns[None, :] == 2 * n + k, 2.0 * tl.sum(others, 1)[:, None], 0.0)
    dz = dgates * gates * (1.0 - gates)
    r = tl.load(R + t, mask=inside, other=0.0)
    shrink = -tl.sum(dz * z, 1) * r * r / (n * C)
    weights = dz * r[:, None]
    tl.store(WEIGHTS + t[:, None] * m + columns[None, :], weights, mask=small)
    weights = weights.to(X.dtype.element_ty)
    mixed = tl.dot(gates, walsh, input_precision="ieee", out_dtype=ACC)
    dcoefficients = tl.zeros((BT, M), ACC)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        here = inside[:, None] & (c < C)[None, :]
        gu = tl.load(GU + t[:, None] * C + c[None, :], mask=here, other=0.0).to(ACC)
        dy = tl.zeros((BT, BC), ACC)
        if WRITE:
            y = tl.load(Y + t[:, None] * C + c[None, :], mask=here, other=0.0).to(ACC)
        for s in range(n):
            at = t[:, None] * (n * C) + s * C + c[None, :]
            x = tl.load(X + at, mask=here, other=0.0).to(ACC)
            rows = columns[:, None] * (n * C) + s * C + c[None, :]
            phi = tl.load(PHI + rows, mask=(columns < m)[:, None] & (c < C)[None, :], other=0.0)
            G = _column(mixed, s, columns)[:, None] * gu
            G = tl.dot(weights, phi.to(weights.dtype), G, input_precision=PRECISION, out_dtype=ACC)
            if WRITE:
                post = tl.load(COEFFICIENTS + t * (2 * n) + s, mask=inside, other=0.0)
                decay = tl.load(COEFFICIENTS + t * (2 * n) + n + s, mask=inside, other=0.0)
                G += tl.load(GX + at, mask=here, other=0.0).to(ACC)
                G += shrink[:, None] * (decay[:, None] * x + post[:, None] * y)
                dcoefficients += tl.where(columns[None, :] == s, tl.sum(G * y, 1)[:, None], 0.0)
                dcoefficients += tl.where(columns[None, :] == n + s, tl.sum(G * x, 1)[:, None], 0.0)
                dy += post[:, None] * G
                tl.store(DX + at, (decay[:, None] * G).to(DX.dtype.element_ty), mask=here)
            else:
                tl.store(DX + at, (G + shrink[:, None] * x).to(DX.dtype.element_ty), mask=here)
        if WRITE:
            tl.store(DY + t[:, None] * C + c[None, :], dy.to(DY.dtype.element_ty), mask=here)
    if WRITE:
        tl.store(DCOEFFICIENTS + own, dcoefficients, mask=inside[:, None] & (columns < 2 * n)[None, :])


@triton.jit
def stream_boundary_projection_kernel(
    X, Y, COEFFICIENTS, WEIGHTS, PARTIAL, T, STEPS,
    C: tl.constexpr, n: tl.constexpr, m: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    WRITE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """PARTIAL[split] = sum over the split's tokens of weights^T X', one stream and BC channels a program."""
    s, split = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    columns = tl.arange(0, M)
    total = tl.zeros((M, BC), ACC)
    for step in range(STEPS):
        t = (split.to(tl.int64) * STEPS + step) * BT + tl.arange(0, BT)
        inside = t < T
        here = inside[:, None] & (c < C)[None, :]
        x = tl.load(X + t[:, None] * (n * C) + s * C + c[None, :], mask=here, other=0.0)
        if WRITE:
            y = tl.load(Y + t[:, None] * C + c[None, :], mask=here, other=0.0).to(ACC)
            post = tl.load(COEFFICIENTS + t * (2 * n) + s, mask=inside, other=0.0)
            decay = tl.load(COEFFICIENTS + t * (2 * n) + n + s, mask=inside, other=0.0)
            x = (decay[:, None] * x.to(ACC) + post[:, None] * y).to(X.dtype.element_ty)
        weights = tl.load(
            WEIGHTS + t[None, :] * m + columns[:, None], mask=inside[None, :] & (columns < m)[:, None], other=0.0
        )
        total = tl.dot(weights.to(x.dtype), x, total, input_precision=PRECISION, out_dtype=ACC)
    to = PARTIAL + (split * m + columns[:, None]) * (n * C) + s * C + c[None, :]
    tl.store(to, total, mask=(columns < m)[:, None] & (c < C)[None, :])


def _tiles(X: Tensor, y: Tensor | None) -> dict[str, Any]:
    """Compile-time arguments. 16 tokens by so many channels spill nothing on an H100 (docs/kernels.md)."""
    n, C = X.shape[-2:]
    if X.dtype == torch.bfloat16:
        channels, warps = (64, 4) if n <= 4 else (128, 8)
    else:
        channels, warps = 64 if n in (2, 4) else 32, 4
    columns = 16 if 2 * n + n.bit_length() - 1 <= 16 else (32 if n <= 8 else 64)
    sums = {"ACC": accumulator(X.dtype), "PRECISION": precision(X.dtype)}
    return {
        "C": C,
        "n": n,
        "M": columns,
        "BT": 16,
        "BC": channels,
        "WRITE": y is not None,
        "num_warps": warps,
        "num_stages": 2,
        **sums,
    }


def _launch_forward(X, y, coefficients, phi, bias, eps, *outputs):
    tokens, tiles = outputs[4].numel(), _tiles(X, y) | {"PRECISION": long_precision(X.dtype)}
    K = X.shape[-2].bit_length() - 1
    grid = (blocks(tokens, tiles["BT"]),)
    stream_boundary_forward_kernel[grid](X, y, coefficients, phi.to(X.dtype), bias, *outputs, tokens, eps, K=K, **tiles)


def _launch_backward(gX, gu, gfollowing, X, y, coefficients, phi, bias, z, r, dX, dy, dcoefficients, dphi, dbias):
    tokens, tiles = r.numel(), _tiles(X, y)
    n, C = X.shape[-2:]
    m = len(bias)
    weights = torch.empty_like(z)
    inputs = (gX, gu, gfollowing, X, y, coefficients, phi.to(X.dtype), bias, z, r)
    stream_boundary_backward_kernel[(blocks(tokens, tiles["BT"]),)](
        *inputs, dX, dy, dcoefficients, weights, tokens, K=n.bit_length() - 1, **tiles
    )
    torch.sum((weights / r).reshape(-1, m), 0, out=dbias)
    # Partial sums in a fixed order rather than atomics: the same bits every run.
    splits = max(1, min(64, tokens // 512))
    partial = z.new_empty((splits, m, n * C))
    steps = blocks(blocks(tokens, splits), tiles["BT"])
    grid = (n, blocks(C, tiles["BC"]), splits)
    stream_boundary_projection_kernel[grid](X, y, coefficients, weights, partial, tokens, steps, m=m, **tiles)
    torch.sum(partial, 0, out=dphi)


def _setup_context(ctx, inputs, output) -> None:
    X, y, coefficients, phi, bias, _, ctx.backend = inputs
    ctx.save_for_backward(X, y, coefficients, phi, bias, *output[3:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, gX, gu, gfollowing, gz, gr):
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
        dy, dcoefficients = dy.to(y.dtype), dcoefficients.to(coefficients.dtype)
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
    coefficients, phi, bias = (t.to(device, exact) for t in (coefficients, phi, bias))
    return X.to(device, dtype), y.to(device, dtype), coefficients, phi, bias


STREAM_BOUNDARY = Op("stream_boundary", stream_boundary, stream_boundary_reference, _example, ("cpu", "triton"))
