"""A residual SwiGLU sub-MLP whose hidden layer is narrower than its input: the step of an hourglass FFN.

    n = x / sqrt(mean(x^2) + eps) * norm
    out = x + (silu(n Wg^T) * (n Wu^T)) Wd^T

x, out (..., D); norm (D,); gate_up (2 H, D) = [Wg; Wu]; down (D, H). Bytes: with its hidden layer on chip, forward
reads x and writes out, 2 D elements a token and the weights once. The normalisation's
division comes after the products, on 2 H numbers. Backward recomputes the hidden layer and is made of matrix products.
On a CPU the products are the library's; the norm and the gating around them are this package's.
Source: hourglass FFN, 2602.06471; SwiGLU, 2002.05202.
"""

import torch
from torch import Tensor

from kernels._dispatch import Op
from kernels._triton import accumulator, blocks, precision, tl, triton
from kernels.rms_norm import rms_norm
from kernels.swiglu import swiglu


def narrow_mlp_reference(x: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor, eps: float = 1e-6) -> Tensor:
    """The definition. The norm and the gating in float32 (float64 for float64), the products in the dtype of x."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = x.to(exact)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normalised = (wide * scale * norm.to(exact)).to(x.dtype)
    gate, up = torch.nn.functional.linear(normalised, gate_up.to(x.dtype)).to(exact).chunk(2, -1)
    hidden = (torch.nn.functional.silu(gate) * up).to(x.dtype)
    return x + torch.nn.functional.linear(hidden, down.to(x.dtype))


def narrow_mlp(x: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor, eps: float = 1e-6) -> Tensor:
    """One sub-MLP with its norm and residual. Raises ValueError naming the shape that does not fit."""
    D, H = x.shape[-1], down.shape[-1]
    want = {"norm": (D,), "gate_up": (2 * H, D), "down": (D, H)}
    for (name, shape), tensor in zip(want.items(), (norm, gate_up, down), strict=True):
        if tensor.shape != shape:
            raise ValueError(f"want {name} {shape} for x {tuple(x.shape)}, got {tuple(tensor.shape)}")
    backend = NARROW_MLP.backend_for(x.device.type, x.dtype)
    if backend == "reference":
        return narrow_mlp_reference(x, norm, gate_up, down, eps)
    if backend == "triton" and H <= WIDEST:
        return torch.ops.hypernas.narrow_mlp(x, norm, gate_up, down, eps)
    return _products(x, norm, gate_up, down, eps)


WIDEST = 256  # hidden units that fit in registers (docs/kernels.md has the table)


def _products(x: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor, eps: float) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    hidden = swiglu(rms_norm(flat, norm, eps) @ gate_up.to(x.dtype).mT)
    return torch.addmm(flat, hidden, down.to(x.dtype).mT).reshape(x.shape)


@torch.library.custom_op("hypernas::narrow_mlp", mutates_args=())
def _forward(x: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor, eps: float) -> Tensor:
    out = _empty_output(x, norm, gate_up, down, eps)
    D, H = x.shape[-1], down.shape[-1]
    tokens = x.numel() // D
    # The norm's weight goes into the projection; the transposes make both products read along rows.
    inward = (gate_up * norm).to(x.dtype).mT.contiguous()
    # Tensor cores hold bfloat16's tiles; float32's products are made in the threads' own registers.
    narrow = x.dtype == torch.bfloat16
    tile = {"BT": 64 if narrow else 32, "BD": 32 if narrow else 16, "num_warps": 4 if narrow and H <= 64 else 8}
    tile["BH"] = 1 << max(H - 1, 15).bit_length()
    sums = {"ACC": accumulator(x.dtype), "PRECISION": precision(x.dtype)}
    outward = down.to(x.dtype).mT.contiguous()
    grid = (blocks(tokens, tile["BT"]),)
    _forward_kernel[grid](x.contiguous(), inward, outward, out, tokens, eps, D=D, H=H, **tile, **sums)
    return out


@_forward.register_fake
def _empty_output(x: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@triton.jit
def _forward_kernel(
    X, INWARD, OUTWARD, OUT, T, eps,
    D: tl.constexpr, H: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BT tokens a program, the hidden layer [BT, BH] in registers; INWARD (D, 2 H), OUTWARD (H, D)."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    h = tl.arange(0, BH)
    gate, up = tl.zeros((BT, BH), ACC), tl.zeros((BT, BH), ACC)
    squares = tl.zeros((BT, BD), ACC)
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        x = tl.load(X + t[:, None] * D + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
        wide = x.to(ACC)
        squares += wide * wide
        at, inside = d[:, None] * (2 * H) + h[None, :], (d < D)[:, None] & (h < H)[None, :]
        w = tl.load(INWARD + at, mask=inside, other=0.0)
        gate = tl.dot(x, w, gate, input_precision=PRECISION, out_dtype=ACC)
        w = tl.load(INWARD + at + H, mask=inside, other=0.0)
        up = tl.dot(x, w, up, input_precision=PRECISION, out_dtype=ACC)
    r = 1.0 / tl.sqrt(tl.sum(squares, 1) / D + eps)
    gate = gate * r[:, None]
    hidden = (gate * up * r[:, None] / (1.0 + tl.exp(-gate))).to(X.dtype.element_ty)
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        at, here = t[:, None] * D + d[None, :], (t < T)[:, None] & (d < D)[None, :]
        out = tl.load(X + at, mask=here, other=0.0).to(ACC)
        w = tl.load(OUTWARD + h[:, None] * D + d[None, :], mask=(h < H)[:, None] & (d < D)[None, :], other=0.0)
        out = tl.dot(hidden, w, out, input_precision=PRECISION, out_dtype=ACC)
        tl.store(OUT + at, out.to(OUT.dtype.element_ty), mask=here)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, g):
    x, norm, gate_up, down = ctx.saved_tensors
    flat, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, x.shape[-1])
    inward, outward = gate_up.to(x.dtype), down.to(x.dtype)
    normalised = torch.ops.hypernas.rms_norm(flat, norm, ctx.eps, "triton")
    both = normalised @ inward.mT
    hidden = torch.ops.hypernas.swiglu(both, "triton")
    dboth = torch.ops.hypernas.swiglu_backward(g @ outward, both, "triton")
    dx, dnorm = torch.ops.hypernas.rms_norm_backward(dboth @ inward, flat, norm, ctx.eps, "triton")
    dweights = ((dboth.mT @ normalised).to(gate_up.dtype), (g.mT @ hidden).to(down.dtype))
    return (dx + g).reshape(x.shape), dnorm.to(norm.dtype), *dweights, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def example_arguments(
    tokens: int, D: int, H: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random x, norm, gate_up and down at the scale of an initialised model; for tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    x, norm = torch.randn(tokens, D, generator=generator), 1 + 0.1 * torch.randn(D, generator=generator)
    gate_up = torch.randn(2 * H, D, generator=generator) * D**-0.5
    down = torch.randn(D, H, generator=generator) * H**-0.5
    # Rounded first, so that a float64 reference sees the weights that the products see.
    gate_up, down = gate_up.to(dtype), down.to(dtype)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    norm, gate_up, down = (t.to(device, exact) for t in (norm, gate_up, down))
    return x.to(device, dtype), norm, gate_up, down


NARROW_MLP = Op(
    "narrow_mlp",
    narrow_mlp,
    narrow_mlp_reference,
    lambda *kind: example_arguments(37, 50, 20, *kind),
    ("cpu", "triton"),
)
