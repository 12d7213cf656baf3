"""Sinkhorn's iteration: a positive matrix a token to an (almost) doubly stochastic one.

    M_0 = exp(logits);   M_t = rows(columns(M_(t-1))),   t = 1 .. iterations

`columns` divides each column by its sum, `rows` each row; rows come last and sum to 1 exactly. After the first column
step 1e-30 keeps a row of underflowed entries from 0 / 0. logits, M (..., n, n) in float32 (float64 for float64).
Backward recomputes the iterations instead of reading 40 matrices a token; each tensor crosses the memory bus once,
2 n^2 elements a token forward and 3 n^2 backward. Source: mHC, 2512.24880, equation 9.
"""

from typing import Any

import torch
from torch import Tensor

from hypernas.kernels import cpu_library
from hypernas.kernels.dispatch import Op
from hypernas.kernels.triton_tools import accumulator, blocks, tl, triton


def sinkhorn_reference(logits: Tensor, iterations: int = 20) -> Tensor:
    """The definition. Tokens go last inside, so that a sum over n runs at vector speed."""
    n = logits.shape[-1]
    matrix = logits.reshape(-1, n, n).movedim(0, -1).softmax(0) + 1e-30
    matrix = matrix / matrix.sum(1, keepdim=True)
    for _ in range(iterations - 1):
        matrix = matrix / matrix.sum(0, keepdim=True)
        matrix = matrix / matrix.sum(1, keepdim=True)
    return matrix.movedim(-1, 0).reshape(logits.shape)


def sinkhorn(logits: Tensor, iterations: int = 20) -> Tensor:
    """M_iterations. Raises ValueError for matrices that are not square, other dtypes or no iterations."""
    if logits.shape[-1] != logits.shape[-2] or iterations < 1:
        raise ValueError(f"want (..., n, n) and at least 1 iteration, got {tuple(logits.shape)} and {iterations}")
    if logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"want float32 or float64 logits, got {logits.dtype}: 40 steps in less drift from 1")
    backend = SINKHORN.backend_for(logits.device.type, logits.dtype)
    if backend == "reference":
        return sinkhorn_reference(logits, iterations)
    return torch.ops.hypernas.sinkhorn(logits, iterations, backend)


@torch.library.custom_op("hypernas::sinkhorn", mutates_args=())
def _forward(logits: Tensor, iterations: int, backend: str) -> Tensor:
    out = _empty_output(logits, iterations, backend)
    n = logits.shape[-1]
    tokens = logits.numel() // (n * n)
    if backend == "triton":
        tiles = _tiles(logits)
        sinkhorn_forward_kernel[(blocks(tokens, tiles["BT"]),)](logits.contiguous(), out, tokens, iterations, **tiles)
    else:
        cpu_library.call("sinkhorn_forward", logits.dtype, tokens, n, iterations, logits.contiguous(), out)
    return out


@_forward.register_fake
def _empty_output(logits: Tensor, iterations: int, backend: str) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("hypernas::sinkhorn_backward", mutates_args=())
def _backward(g: Tensor, logits: Tensor, iterations: int, backend: str) -> Tensor:
    dlogits = _empty_gradient(g, logits, iterations, backend)
    n = logits.shape[-1]
    tokens, inputs = logits.numel() // (n * n), (g.contiguous(), logits.contiguous())
    if backend == "triton":
        tiles = _tiles(logits)
        sinkhorn_backward_kernel[(blocks(tokens, tiles["BT"]),)](*inputs, dlogits, tokens, iterations, **tiles)
    else:
        cpu_library.call("sinkhorn_backward", logits.dtype, tokens, n, iterations, *inputs, dlogits)
    return dlogits


@_backward.register_fake
def _empty_gradient(g: Tensor, logits: Tensor, iterations: int, backend: str) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


# Triton. A program owns BT tokens, their matrices as [BT, N, N] tiles with zeros outside n x n. Backward holds no
# history: for each iteration, last to first, it computes the matrix before it anew, iterations^2 / 2 steps on numbers
# in registers in place of 2 iterations n^2 numbers a token in memory.


@triton.jit
def _columns(m, valid):
    """Each column divided by its sum, and the sums."""
    sums = tl.sum(m, 1)[:, None, :]
    return tl.where(valid, m / sums, 0.0), sums


@triton.jit
def _rows(m, valid):
    sums = tl.sum(m, 2)[:, :, None]
    return tl.where(valid, m / sums, 0.0), sums


@triton.jit
def _first_columns(LOGITS, T, n: tl.constexpr, N: tl.constexpr, BT: tl.constexpr, ACC: tl.constexpr):
    """Addresses, which of them exist, and the matrices after the first column step."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    row, col = tl.arange(0, N)[None, :, None], tl.arange(0, N)[None, None, :]
    at = t[:, None, None] * (n * n) + row * n + col
    valid = (t < T)[:, None, None] & (row < n) & (col < n)
    logits = tl.load(LOGITS + at, mask=valid, other=-1e30).to(ACC)
    top = tl.max(logits, 1)[:, None, :]
    softmax, _ = _columns(tl.where(valid, tl.exp(logits - top), 0.0), valid)
    return at, valid, softmax


@triton.jit
def sinkhorn_forward_kernel(
    LOGITS, OUT, T, ITERATIONS, n: tl.constexpr, N: tl.constexpr, BT: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    at, valid, softmax = _first_columns(LOGITS, T, n, N, BT, ACC)
    m, _ = _rows(tl.where(valid, softmax + 1e-30, 0.0), valid)
    for _ in range(1, ITERATIONS):
        m, _ = _columns(m, valid)
        m, _ = _rows(m, valid)
    tl.store(OUT + at, m.to(OUT.dtype.element_ty), mask=valid)


@triton.jit
def sinkhorn_backward_kernel(
    G, LOGITS, DLOGITS, T, ITERATIONS, n: tl.constexpr, N: tl.constexpr, BT: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    at, valid, softmax = _first_columns(LOGITS, T, n, N, BT, ACC)
    start = tl.where(valid, softmax + 1e-30, 0.0)
    g = tl.load(G + at, mask=valid, other=0.0).to(ACC)
    for back in range(1, ITERATIONS):
        before, _ = _rows(start, valid)
        after, column_sums = _columns(before, valid)
        for _ in range(1, ITERATIONS - back):
            before, _ = _rows(after, valid)
            after, column_sums = _columns(before, valid)
        last, row_sums = _rows(after, valid)
        g = tl.where(valid, (g - tl.sum(g * last, 2)[:, :, None]) / row_sums, 0.0)
        g = tl.where(valid, (g - tl.sum(g * after, 1)[:, None, :]) / column_sums, 0.0)
    last, row_sums = _rows(start, valid)
    g = tl.where(valid, (g - tl.sum(g * last, 2)[:, :, None]) / row_sums, 0.0)
    g = softmax * (g - tl.sum(g * softmax, 1)[:, None, :])
    tl.store(DLOGITS + at, g.to(DLOGITS.dtype.element_ty), mask=valid)


def _tiles(logits: Tensor) -> dict[str, Any]:
    """Compile-time arguments: 1024 numbers a program, eight a thread."""
    n = logits.shape[-1]
    N = triton.next_power_of_2(n)
    return {"n": n, "N": N, "BT": max(1, 1024 // (N * N)), "ACC": accumulator(logits.dtype), "num_warps": 4}


def _setup_context(ctx, inputs, output) -> None:
    logits, ctx.iterations, ctx.backend = inputs
    ctx.save_for_backward(logits)


def _autograd(ctx, g):
    return torch.ops.hypernas.sinkhorn_backward(g, *ctx.saved_tensors, ctx.iterations, ctx.backend), None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def example_arguments(tokens: int, n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor]:
    """Logits near where training starts: 0 on the diagonal, lower elsewhere; for tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, n, n, generator=generator) - 2 * (1 - torch.eye(n))
    return (logits.to(device, torch.float64 if dtype == torch.float64 else torch.float32),)


SINKHORN = Op(
    "sinkhorn", sinkhorn, sinkhorn_reference, lambda *kind: example_arguments(37, 4, *kind), ("cpu", "triton")
)
