"""stream_read(X, phi, bias, eps=1e-24) -> (u, logits): read a sublayer's input from the residual streams, dense forms.

    logits = (phi . vec X) / sqrt(mean(X^2) + eps) + bias        projection after RMSNorm over all n C
    u      = sum_i sigmoid(logits[i]) X[i],  i < n               H_pre X, not normalised

X (..., n, C), any n; phi (m, n C) with the norm's gain and alpha multiplied in, m >= n, its first n rows those of
H_pre; bias (m,); u (..., C) in X's dtype, logits (..., m) in float32 (float64 for float64 streams). What the rows
from n on mean is the caller's: for mHC, mHC-lite and KromHC with factors of 3 and 4 they are n of H_post / 2 and the
logits of H_res. Together with stream_mix this is the dense counterpart of stream_boundary.

Bytes: forward reads X and writes u, (n + 1) C elements a token; backward reads gu and X and writes dX, (2 n + 1) C.
Source: mHC, 2512.24880, equations 5 to 7.
"""

from typing import Any

import torch
from torch import Tensor

from hypernas.kernels import cpu_library
from hypernas.kernels.dispatch import Op
from hypernas.kernels.triton_tools import accumulator, blocks, long_precision, precision, tl, triton


def stream_read_reference(X: Tensor, phi: Tensor, bias: Tensor, eps: float = 1e-24) -> tuple[Tensor, Tensor]:
    """The definition. Sums in float32, or float64 for float64 streams."""
    exact = torch.float64 if X.dtype == torch.float64 else torch.float32
    streams = X.to(exact)
    flat = streams.flatten(-2)
    r = torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)
    logits = flat @ phi.to(exact).T * r + bias.to(exact)
    pre = logits[..., : X.shape[-2]].sigmoid()
    return (pre.unsqueeze(-1) * streams).sum(-2).to(X.dtype), logits


def stream_read(X: Tensor, phi: Tensor, bias: Tensor, eps: float = 1e-24) -> tuple[Tensor, Tensor]:
    """u and the logits. Raises ValueError naming the shape that does not fit."""
    n, C = X.shape[-2:]
    m = phi.shape[0]
    if m < n or phi.shape != (m, n * C) or bias.shape != (m,):
        raise ValueError(
            f"want phi (m, {n * C}) with m >= {n} and bias (m,) for X {tuple(X.shape)}, "
            f"got {tuple(phi.shape)} and {tuple(bias.shape)}"
        )
    backend = STREAM_READ.backend_for(X.device.type, X.dtype)
    if backend == "reference":
        return stream_read_reference(X, phi, bias, eps)
    u, logits, _, _ = torch.ops.hypernas.stream_read(X, phi, bias, eps, backend)
    return u, logits


@torch.library.custom_op("hypernas::stream_read", mutates_args=())
def _forward(X: Tensor, phi: Tensor, bias: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, logits, and what backward needs: z = logits - bias (..., m) and r = 1 / RMS (..., 1)."""
    outputs = u, logits, z, r = _empty_outputs(X, phi, bias, eps, backend)
    X, phi, bias = _plain(X, phi, bias)
    n, C = X.shape[-2:]
    tokens, m = r.numel(), len(bias)
    if backend == "triton":
        tiles = _tiles(X, m) | {"PRECISION": long_precision(X.dtype)}
        grid = (blocks(tokens, tiles["BT"]), blocks(m, tiles["M"]))
        stream_read_forward_kernel[grid](X, phi.to(X.dtype), bias, u, logits, z, r, tokens, m, eps, **tiles)
    else:
        cpu_library.call("stream_read_forward", X.dtype, tokens, n, C, m, X, phi, bias, eps, *outputs)
    return outputs


@_forward.register_fake
def _empty_outputs(
    X: Tensor, phi: Tensor, bias: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *lead, _, C = X.shape
    exact = torch.float64 if X.dtype == torch.float64 else torch.float32
    logits, z, r = (X.new_empty((*lead, size), dtype=exact) for size in (phi.shape[0], phi.shape[0], 1))
    return X.new_empty((*lead, C)), logits, z, r


@torch.library.custom_op("hypernas::stream_read_backward", mutates_args=())
def _backward(
    gu: Tensor,
    glogits: Tensor,
    X: Tensor,
    phi: Tensor,
    bias: Tensor,
    logits: Tensor,
    z: Tensor,
    r: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of X, phi and bias."""
    outputs = _empty_gradients(gu, glogits, X, phi, bias, logits, z, r, backend)
    X, phi, bias = _plain(X, phi, bias)
    inputs = (gu.contiguous(), glogits.contiguous(), X, phi, logits, z, r)
    if backend == "triton":
        _launch_backward(*inputs, *outputs)
    else:
        cpu_library.call("stream_read_backward", X.dtype, r.numel(), *X.shape[-2:], len(bias), *inputs, *outputs)
    return outputs


@_backward.register_fake
def _empty_gradients(
    gu: Tensor,
    glogits: Tensor,
    X: Tensor,
    phi: Tensor,
    bias: Tensor,
    logits: Tensor,
    z: Tensor,
    r: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(X, memory_format=torch.contiguous_format), z.new_empty(phi.shape), z.new_empty(bias.shape)


def _plain(X: Tensor, phi: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    exact = torch.float64 if X.dtype == torch.float64 else torch.float32
    return X.contiguous(), phi.to(exact).contiguous(), bias.to(exact).contiguous()


# Triton. A program owns BT tokens and M of the m rows, and walks over the channels; the one with the first rows then
# reads u, whose inputs come from the L1 or L2 cache. Up to 64 rows (mHC up to n = 6) that is every row, and X leaves
# memory once; above, once for each 64 rows.


@triton.jit
def _column(tile, index, columns):
    return tl.sum(tl.where(columns[None, :] == index, tile, 0.0), 1)


@triton.jit
def stream_read_forward_kernel(
    X, PHI, BIAS, U, LOGITS, Z, R, T, m, eps,
    C: tl.constexpr, n: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    inside = t < T
    columns = tl.program_id(1) * M + tl.arange(0, M)
    squares = tl.zeros((BT, BC), ACC)
    z = tl.zeros((BT, M), ACC)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        here = inside[:, None] & (c < C)[None, :]
        for s in range(n):
            x = tl.load(X + t[:, None] * (n * C) + s * C + c[None, :], mask=here, other=0.0)
            wide = x.to(ACC)
            squares += wide * wide
            rows = columns[None, :] * (n * C) + s * C + c[:, None]
            phi = tl.load(PHI + rows, mask=(columns < m)[None, :] & (c < C)[:, None], other=0.0)
            z = tl.dot(x, phi, z, input_precision=PRECISION, out_dtype=ACC)
    r = 1.0 / tl.sqrt(tl.sum(squares, 1) / (n * C) + eps)
    z = z * r[:, None]
    logits = z + tl.load(BIAS + columns, mask=columns < m, other=0.0)[None, :]
    small = inside[:, None] & (columns < m)[None, :]
    tl.store(Z + t[:, None] * m + columns[None, :], z, mask=small)
    tl.store(LOGITS + t[:, None] * m + columns[None, :], logits, mask=small)
    if tl.program_id(1) == 0:
        tl.store(R + t, r, mask=inside)
        pre = 1.0 / (1.0 + tl.exp(-logits))
        for first in range(0, C, BC):
            c = first + tl.arange(0, BC)
            here = inside[:, None] & (c < C)[None, :]
            u = tl.zeros((BT, BC), ACC)
            for s in range(n):
                x = tl.load(X + t[:, None] * (n * C) + s * C + c[None, :], mask=here, other=0.0).to(ACC)
                u += _column(pre, s, columns)[:, None] * x
            tl.store(U + t[:, None] * C + c[None, :], u.to(U.dtype.element_ty), mask=here)


@triton.jit
def stream_read_backward_kernel(
    GU, GLOGITS, X, PHI, LOGITS, Z, R, DX, WEIGHTS, T, m,
    C: tl.constexpr, n: tl.constexpr, M: tl.constexpr, CHUNKS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each M rows are a chunk; those of H_pre, whose gradient comes through u too, are all in the first."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    inside = t < T
    columns = tl.arange(0, M)
    along = tl.zeros((BT, M), ACC)  # <gu, X[s]> in column s
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        here = inside[:, None] & (c < C)[None, :]
        gu = tl.load(GU + t[:, None] * C + c[None, :], mask=here, other=0.0).to(ACC)
        for s in range(n):
            x = tl.load(X + t[:, None] * (n * C) + s * C + c[None, :], mask=here, other=0.0).to(ACC)
            along += tl.where(columns[None, :] == s, tl.sum(gu * x, 1)[:, None], 0.0)
    r = tl.load(R + t, mask=inside, other=0.0)
    own = t[:, None] * m + columns[None, :]
    small = inside[:, None] & (columns < m)[None, :]
    logits = tl.load(LOGITS + own, mask=small, other=0.0)
    pre = tl.where((columns < n)[None, :], 1.0 / (1.0 + tl.exp(-logits)), 0.0)
    dz = tl.load(GLOGITS + own, mask=small, other=0.0) + along * pre * (1.0 - pre)
    inner = tl.sum(dz * tl.load(Z + own, mask=small, other=0.0), 1)
    weights = dz * r[:, None]
    tl.store(WEIGHTS + own, weights, mask=small)
    weights = weights.to(X.dtype.element_ty)
    for chunk in range(1, CHUNKS):
        more = inside[:, None] & (chunk * M + columns < m)[None, :]
        dz = tl.load(GLOGITS + own + chunk * M, mask=more, other=0.0)
        inner += tl.sum(dz * tl.load(Z + own + chunk * M, mask=more, other=0.0), 1)
        tl.store(WEIGHTS + own + chunk * M, dz * r[:, None], mask=more)
    shrink = -inner * r * r / (n * C)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        here = inside[:, None] & (c < C)[None, :]
        gu = tl.load(GU + t[:, None] * C + c[None, :], mask=here, other=0.0).to(ACC)
        for s in range(n):
            at = t[:, None] * (n * C) + s * C + c[None, :]
            x = tl.load(X + at, mask=here, other=0.0).to(ACC)
            G = _column(pre, s, columns)[:, None] * gu + shrink[:, None] * x
            rows = columns[:, None] * (n * C) + s * C + c[None, :]
            phi = tl.load(PHI + rows, mask=(columns < m)[:, None] & (c < C)[None, :], other=0.0)
            G = tl.dot(weights, phi, G, input_precision=PRECISION, out_dtype=ACC)
            for chunk in range(1, CHUNKS):
                later = chunk * M + columns
                dz = tl.load(GLOGITS + own + chunk * M, mask=inside[:, None] & (later < m)[None, :], other=0.0)
                phi = tl.load(PHI + rows + chunk * M * n * C, mask=(later < m)[:, None] & (c < C)[None, :], other=0.0)
                G = tl.dot((dz * r[:, None]).to(phi.dtype), phi, G, input_precision=PRECISION, out_dtype=ACC)
            tl.store(DX + at, G.to(DX.dtype.element_ty), mask=here)


@triton.jit
def stream_read_projection_kernel(
    X, WEIGHTS, PARTIAL, T, m, STEPS,
    D: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """PARTIAL[split] = weights^T vec X over the split's tokens, M rows and BC of the D = n C columns a program."""
    d = tl.program_id(0) * BC + tl.arange(0, BC)
    columns = tl.program_id(1) * M + tl.arange(0, M)
    split = tl.program_id(2)
    total = tl.zeros((M, BC), ACC)
    for step in range(STEPS):
        t = (split.to(tl.int64) * STEPS + step) * BT + tl.arange(0, BT)
        x = tl.load(X + t[:, None] * D + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
        small = (t < T)[None, :] & (columns < m)[:, None]
        weights = tl.load(WEIGHTS + t[None, :] * m + columns[:, None], mask=small, other=0.0)
        total = tl.dot(weights.to(x.dtype), x, total, input_precision=PRECISION, out_dtype=ACC)
    to = PARTIAL + (split * m + columns[:, None]) * D + d[None, :]
    tl.store(to, total, mask=(columns < m)[:, None] & (d < D)[None, :])


def _tiles(X: Tensor, m: int) -> dict[str, Any]:
    """Compile-time arguments; at most 64 of the m rows at once. The tiles that spill nothing (docs/kernels.md)."""
    n, C = X.shape[-2:]
    rows = 16 if m <= 16 else 32 if m <= 32 else 64
    channels = 128 // X.element_size() if rows == 32 else 64
    warps = 8 if rows == 64 and X.dtype == torch.bfloat16 else 4
    sums = {"ACC": accumulator(X.dtype), "PRECISION": precision(X.dtype)}
    return {"C": C, "n": n, "M": rows, "BT": 16, "BC": channels, "num_warps": warps, "num_stages": 2, **sums}


def _launch_backward(gu, glogits, X, phi, logits, z, r, dX, dphi, dbias):
    tokens, m = r.numel(), phi.shape[0]
    tiles = _tiles(X, m)
    chunks, weights = blocks(m, tiles["M"]), torch.empty_like(z)
    stream_read_backward_kernel[(blocks(tokens, tiles["BT"]),)](
        gu, glogits, X, phi.to(X.dtype), logits, z, r, dX, weights, tokens, m, CHUNKS=chunks, **tiles
    )
    torch.sum((weights / r).reshape(-1, m), 0, out=dbias)
    # Partial sums in a fixed order rather than atomics: the same bits every run.
    splits = max(1, min(64, tokens // 512))
    D = tiles.pop("n") * tiles.pop("C")
    tiles |= {"BC": 128 // X.element_size(), "num_warps": 4}
    partial = z.new_empty((splits, m, D))
    steps = blocks(blocks(tokens, splits), tiles["BT"])
    stream_read_projection_kernel[(blocks(D, tiles["BC"]), chunks, splits)](
        X, weights, partial, tokens, m, steps, D=D, **tiles
    )
    torch.sum(partial, 0, out=dphi)


def _setup_context(ctx, inputs, output) -> None:
    X, phi, bias, _, ctx.backend = inputs
    ctx.save_for_backward(X, phi, bias, *output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, gu, glogits, gz, gr):
    X, phi, bias, logits, z, r = ctx.saved_tensors
    gu = X.new_zeros((*X.shape[:-2], X.shape[-1])) if gu is None else gu
    glogits = torch.zeros_like(logits) if glogits is None else glogits
    dX, dphi, dbias = torch.ops.hypernas.stream_read_backward(gu, glogits, X, phi, bias, logits, z, r, ctx.backend)
    return dX, dphi.to(phi.dtype), dbias.to(bias.dtype), None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def example_arguments(
    tokens: int, n: int, C: int, dtype: torch.dtype, device: torch.device, m: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Random X, phi and bias at the scale of a model in training, by default m = 2 n + n^2 as in mHC; for tests and
    benchmarks."""
    generator = torch.Generator().manual_seed(0)
    m = 2 * n + n * n if m is None else m
    X = torch.randn(tokens, n, C, generator=generator)
    phi = torch.randn(m, n * C, generator=generator) * (n * C) ** -0.5
    bias = torch.randn(m, generator=generator)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return X.to(device, dtype), phi.to(device, exact), bias.to(device, exact)


STREAM_READ = Op(
    "stream_read",
    stream_read,
    stream_read_reference,
    lambda *kind: example_arguments(37, 3, 50, *kind),
    ("cpu", "triton"),
)
