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

import torch
from torch import Tensor

from kernels import _cpu
from kernels._dispatch import Op, choose


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
    backend = choose(STREAM_READ, X.device.type, X.dtype)
    if backend == "reference":
        return stream_read_reference(X, phi, bias, eps)
    u, logits, _, _ = torch.ops.hypernas.stream_read(X, phi, bias, eps)
    return u, logits


@torch.library.custom_op("hypernas::stream_read", mutates_args=())
def _forward(X: Tensor, phi: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, logits, and what backward needs: z = logits - bias (..., m) and r = 1 / RMS (..., 1)."""
    outputs = _empty_outputs(X, phi, bias, eps)
    X, phi, bias = _plain(X, phi, bias)
    _cpu.call("stream_read_forward", X.dtype, outputs[3].numel(), *X.shape[-2:], len(bias), X, phi, bias, eps, *outputs)
    return outputs


@_forward.register_fake
def _empty_outputs(X: Tensor, phi: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *lead, _, C = X.shape
    logits, z, r = (X.new_empty((*lead, size), dtype=torch.float32) for size in (phi.shape[0], phi.shape[0], 1))
    return X.new_empty((*lead, C)), logits, z, r


@torch.library.custom_op("hypernas::stream_read_backward", mutates_args=())
def _backward(
    gu: Tensor, glogits: Tensor, X: Tensor, phi: Tensor, bias: Tensor, logits: Tensor, z: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of X, phi and bias."""
    outputs = _empty_gradients(gu, glogits, X, phi, bias, logits, z, r)
    X, phi, bias = _plain(X, phi, bias)
    inputs = (gu.contiguous(), glogits.contiguous(), X, phi, logits, z, r)
    _cpu.call("stream_read_backward", X.dtype, r.numel(), *X.shape[-2:], len(bias), *inputs, *outputs)
    return outputs


@_backward.register_fake
def _empty_gradients(
    gu: Tensor, glogits: Tensor, X: Tensor, phi: Tensor, bias: Tensor, logits: Tensor, z: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(X, memory_format=torch.contiguous_format), z.new_empty(phi.shape), z.new_empty(bias.shape)


def _plain(X: Tensor, phi: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return X.contiguous(), phi.float().contiguous(), bias.float().contiguous()


def _setup_context(ctx, inputs, output) -> None:
    X, phi, bias, _ = inputs
    ctx.save_for_backward(X, phi, bias, *output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, gu, glogits, gz, gr):
    X, phi, bias, logits, z, r = ctx.saved_tensors
    gu = X.new_zeros((*X.shape[:-2], X.shape[-1])) if gu is None else gu
    glogits = torch.zeros_like(logits) if glogits is None else glogits
    dX, dphi, dbias = torch.ops.hypernas.stream_read_backward(gu, glogits, X, phi, bias, logits, z, r)
    return dX, dphi.to(phi.dtype), dbias.to(bias.dtype), None


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
    "stream_read", stream_read, stream_read_reference, lambda *kind: example_arguments(37, 3, 50, *kind), ("cpu",)
)
