"""Sinkhorn's iteration: a positive matrix a token to an (almost) doubly stochastic one.

    M_0 = exp(logits);   M_t = rows(columns(M_(t-1))),   t = 1 .. iterations

`columns` divides each column by its sum, `rows` each row; rows come last and sum to 1 exactly. After the first column
step 1e-30 keeps a row of underflowed entries from 0 / 0. logits, M (..., n, n) in float32 (float64 for float64).
Backward recomputes every iteration, 2 n^2 numbers each, instead of keeping 40 matrices a token; each tensor crosses the
memory bus once, (2 n^2, then 3 n^2) elements a token. Source: mHC, 2512.24880, equation 9.
"""

import torch
from torch import Tensor

from kernels import _cpu
from kernels._dispatch import Op, choose


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
    backend = choose(SINKHORN, logits.device.type, logits.dtype)
    if backend == "reference":
        return sinkhorn_reference(logits, iterations)
    return torch.ops.hypernas.sinkhorn(logits, iterations)


@torch.library.custom_op("hypernas::sinkhorn", mutates_args=())
def _forward(logits: Tensor, iterations: int) -> Tensor:
    out = _empty_output(logits, iterations)
    n = logits.shape[-1]
    _cpu.call("sinkhorn_forward", logits.dtype, logits.numel() // (n * n), n, iterations, logits.contiguous(), out)
    return out


@_forward.register_fake
def _empty_output(logits: Tensor, iterations: int) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("hypernas::sinkhorn_backward", mutates_args=())
def _backward(g: Tensor, logits: Tensor, iterations: int) -> Tensor:
    dlogits = _empty_gradient(g, logits, iterations)
    n = logits.shape[-1]
    inputs = (g.contiguous(), logits.contiguous())
    _cpu.call("sinkhorn_backward", logits.dtype, logits.numel() // (n * n), n, iterations, *inputs, dlogits)
    return dlogits


@_backward.register_fake
def _empty_gradient(g: Tensor, logits: Tensor, iterations: int) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    logits, ctx.iterations = inputs
    ctx.save_for_backward(logits)


def _autograd(ctx, g):
    return torch.ops.hypernas.sinkhorn_backward(g, *ctx.saved_tensors, ctx.iterations), None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def example_arguments(tokens: int, n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor]:
    """Logits near where training starts: 0 on the diagonal, lower elsewhere; for tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, n, n, generator=generator) - 2 * (1 - torch.eye(n))
    return (logits.to(device, torch.float64 if dtype == torch.float64 else torch.float32),)


SINKHORN = Op("sinkhorn", sinkhorn, sinkhorn_reference, lambda *kind: example_arguments(37, 4, *kind), ("cpu",))
