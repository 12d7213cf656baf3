"""Compute the residual streams after each of L boundaries in a row again, so that backward need not have kept them.

    X_l[S] = decay_l[S] X_{l-1}[S] + post_l[S] y_l,   l = 1 ... L     the writes of kernels/stream_boundary.py alone

X_0 ... X_L (..., n, C); y_1 ... y_L (..., C); coefficients_1 ... coefficients_L (..., 2 n) = post then decay, used in
float32 (float64 for float64 streams). Each X_l is rounded to the dtype of X_0 before the next is made from it, and has
the bits that stream_boundary wrote on the same back end. It runs inside of backward, so it has no gradients of its own.

Bytes: reads X_0 and every y, writes every X_l: (n + L (n + 1)) C elements a token. X stays in registers between layers.

`recomputing` is what uses it: a boundary saves X, y and coefficients for backward, (n + 1) C elements a token; with the
X of one boundary in L kept, a boundary keeps C + n C / L.
Source: mHC, 2512.24880, section 4.3.2, from which the choice of L is too.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from hypernas.kernels import cpu_library
from hypernas.kernels.dispatch import Op
from hypernas.kernels.triton_tools import accumulator, blocks, tl, triton


@torch.no_grad()
def stream_chain_reference(X: Tensor, ys: Sequence[Tensor], coefficients: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The definition."""
    exact = torch.float64 if X.dtype == torch.float64 else torch.float32
    out = []
    for y, numbers in zip(ys, coefficients, strict=True):
        post, decay = numbers.to(exact).unsqueeze(-1).chunk(2, -2)
        X = torch.addcmul(decay * X.to(exact), post, y.to(exact).unsqueeze(-2)).to(X.dtype)
        out.append(X)
    return tuple(out)


def stream_chain(X: Tensor, ys: Sequence[Tensor], coefficients: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """X_1 ... X_L. Raises ValueError naming the shape that does not fit."""
    *lead, n, C = X.shape
    if not ys or len(ys) != len(coefficients):
        raise ValueError(f"want as many ys as coefficients, one at least: got {len(ys)} and {len(coefficients)}")
    for name, shape, tensors in (("y", (*lead, C), ys), ("coefficients", (*lead, 2 * n), coefficients)):
        for tensor in tensors:
            if tensor.shape != shape:
                raise ValueError(f"want {name} {shape} for X {tuple(X.shape)}, got {tuple(tensor.shape)}")
    return _run(X, ys, coefficients, STREAM_CHAIN.backend_for(X.device.type, X.dtype))


@torch.no_grad()
def _run(X: Tensor, ys: Sequence[Tensor], coefficients: Sequence[Tensor], backend: str) -> tuple[Tensor, ...]:
    if backend == "reference":
        return stream_chain_reference(X, ys, coefficients)
    return tuple(torch.ops.hypernas.stream_chain(X, list(ys), list(coefficients), backend))


@torch.library.custom_op("hypernas::stream_chain", mutates_args=())
def _forward(X: Tensor, ys: Sequence[Tensor], coefficients: Sequence[Tensor], backend: str) -> list[Tensor]:
    out = _empty_outputs(X, ys, coefficients, backend)
    exact = torch.float64 if X.dtype == torch.float64 else torch.float32
    X = X.contiguous()
    branches = tuple(y.to(X.dtype).contiguous() for y in ys)
    numbers = tuple(c.to(exact).contiguous() for c in coefficients)
    n, C = X.shape[-2:]
    tokens, layers = numbers[0].numel() // (2 * n), len(out)
    if backend == "triton":
        tiles = {"C": C, "n": n, "LAYERS": layers, "ACC": accumulator(X.dtype), **TILE}
        grid = (blocks(tokens, TILE["BT"]), blocks(C, TILE["BC"]))
        stream_chain_forward_kernel[grid](X, branches, numbers, tuple(out), tokens, **tiles)
    else:
        cpu_library.call("stream_chain_forward", X.dtype, tokens, n, C, layers, X, branches, numbers, tuple(out))
    return out


@_forward.register_fake
def _empty_outputs(X: Tensor, ys: Sequence[Tensor], coefficients: Sequence[Tensor], backend: str) -> list[Tensor]:
    return [X.new_empty(X.shape) for _ in ys]


# Triton. A program owns BT tokens and BC of their channels. Streams are a run-time loop, in which each y is read n
# times, the first time from memory and then from the L1 cache: registers grow with neither n nor L.
TILE = {"BT": 16, "BC": 64, "num_warps": 4}


@triton.jit
def written(x, y, decay, post):
    """decay x + post y, with the one rounding between them said, so that every kernel that writes streams has the same
    bits."""
    return tl.fma(decay, x, post * y)


@triton.jit
def stream_chain_forward_kernel(
    X, YS, COEFFICIENTS, OUTS, T,
    C: tl.constexpr, n: tl.constexpr, LAYERS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    inside = t < T
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    here = inside[:, None] & (c < C)[None, :]
    for s in range(n):
        at = t[:, None] * (n * C) + s * C + c[None, :]
        x = tl.load(X + at, mask=here, other=0.0)
        for layer in tl.static_range(LAYERS):
            y = tl.load(YS[layer] + t[:, None] * C + c[None, :], mask=here, other=0.0).to(ACC)
            post = tl.load(COEFFICIENTS[layer] + t * (2 * n) + s, mask=inside, other=0.0)
            decay = tl.load(COEFFICIENTS[layer] + t * (2 * n) + n + s, mask=inside, other=0.0)
            x = written(x.to(ACC), y, decay[:, None], post[:, None]).to(X.dtype.element_ty)
            tl.store(OUTS[layer] + at, x, mask=here)


# ---- in a model --------------------------------------------------------------------------------------------------


def chain_length(n: int, boundaries: int) -> int:
    """Of how many boundaries in a row the first keeps its streams: sqrt(n boundaries / (n + 2)), 2 at least, so that
    what the chains' ends keep and what one chain holds while its gradients are computed are smallest together."""
    return max(2, round((n * boundaries / (n + 2)) ** 0.5))


class _Streams:
    """The streams after one boundary: absent after forward, there from their chain's first use in backward on.

    Autograd alone holds it, and lets it go after the last use.
    """

    def __init__(self, chain: "_Chain") -> None:
        self.chain = chain
        self.value: Tensor | None = None


class _Chain:
    """Boundaries in a row: the streams before the first, and what each wrote to them."""

    def __init__(self, X: Tensor) -> None:
        # Detached: a branch's graph would hold the boundaries before it, and through them this chain.
        self.X, self.ys, self.coefficients = X.detach(), list[Tensor](), list[Tensor]()
        self.streams: list[weakref.ref[_Streams]] = []
        self.backend = STREAM_CHAIN.backend_for(X.device.type, X.dtype)

    def append(self, y: Tensor, coefficients: Tensor) -> _Streams:
        streams = _Streams(self)
        self.streams.append(weakref.ref(streams))
        self.ys.append(y.detach())
        self.coefficients.append(coefficients.detach())
        return streams

    def recompute(self) -> None:
        """Gives all streams that are still wanted their values."""
        wanted = [reference() for reference in self.streams]
        count = max(index for index, streams in enumerate(wanted) if streams is not None) + 1
        values = _run(self.X, self.ys[:count], self.coefficients[:count], self.backend)
        for streams, value in zip(wanted, values, strict=False):
            if streams is not None:
                streams.value = value
        self.ys, self.coefficients = [], []


class _Saved:
    """One tensor that autograd saved: itself, or where it lies in streams that will be recomputed."""

    def __init__(self, tensor: Tensor) -> None:
        # Detached: what a node saves of its own outputs would hold the node.
        self.tensor: Tensor | None = tensor.detach()
        self.streams: _Streams | None = None
        self.place = tensor.shape, tensor.stride(), tensor.storage_offset()

    def unpack(self) -> Tensor:
        if self.streams is None:
            assert self.tensor is not None
            return self.tensor
        if self.streams.value is None:
            self.streams.chain.recompute()
        assert self.streams.value is not None
        return self.streams.value.as_strided(*self.place)


class _Recorder:
    """Follows the streams through forward passes, from boundary to boundary."""

    def __init__(self, boundaries: int) -> None:
        self.boundaries = boundaries
        self.last: Tensor | None = None  # what the last boundary gave
        self.chain: _Chain | None = None
        self.streams: _Streams | None = None  # stands for `last`, unless that is kept

    def follow(
        self,
        boundary: Callable[..., tuple[Tensor, Tensor, Tensor]],
        X: Tensor,
        y: Tensor | None,
        coefficients: Tensor | None,
        *rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """boundary(X, y, coefficients, *rest), without the streams that a chain can recompute for its backward."""
        saved: list[_Saved] = []

        def pack(tensor: Tensor) -> _Saved:
            saved.append(_Saved(tensor))
            return saved[-1]

        with saved_tensors_hooks(pack, _Saved.unpack):
            results = boundary(X, y, coefficients, *rest)
        if self.chain is None or X is not self.last:  # a forward pass begins
            self.chain, self.streams = _Chain(X), None
        _replace(saved, X, self.streams)
        self.last = results[0]
        if y is not None and coefficients is not None:
            if len(self.chain.streams) + 1 < chain_length(X.shape[-2], self.boundaries):
                self.streams = self.chain.append(y, coefficients)
            else:
                self.chain, self.streams = _Chain(results[0]), None
            _replace(saved, results[0], self.streams)
        return results


def _replace(saved: Sequence[_Saved], X: Tensor, streams: _Streams | None) -> None:
    """Has `streams` stand for X, and for views of it, in what was saved."""
    for entry in saved if streams is not None else ():
        if entry.tensor is not None and entry.tensor.untyped_storage().data_ptr() == X.untyped_storage().data_ptr():
            entry.tensor, entry.streams = None, streams


_recorder: ContextVar[_Recorder | None] = ContextVar("recorder", default=None)


def recorder() -> _Recorder | None:
    """Who follows the streams of this thread's forward pass, if anybody does and it may go backward. What torch.compile
    traces decides for itself what to keep."""
    return _recorder.get() if torch.is_grad_enabled() and not torch.compiler.is_compiling() else None


@contextmanager
def recomputing(boundaries: int) -> Iterator[None]:
    """Forward passes inside the block, through `boundaries` of them each, keep the streams for backward once in
    `chain_length` boundaries; backward, wherever it runs, computes the others again. Gradients keep their bits."""
    token = _recorder.set(_Recorder(boundaries))
    try:
        yield
    finally:
        _recorder.reset(token)


def example_arguments(
    tokens: int, n: int, C: int, layers: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Random X, y_1, coefficients_1, y_2, ...: X and, after it, `layers` pairs; for tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    out = [torch.randn(tokens, n, C, generator=generator).to(device, dtype)]
    for _ in range(layers):
        y, numbers = torch.randn(tokens, C, generator=generator), torch.rand(tokens, 2 * n, generator=generator)
        out += [y.to(device, dtype), numbers.to(device, exact)]
    return tuple(out)


def in_pairs(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """`function` of X, ys and coefficients, for arguments as `example_arguments` makes them."""
    return lambda X, *pairs: function(X, pairs[::2], pairs[1::2])


STREAM_CHAIN = Op(
    "stream_chain",
    in_pairs(stream_chain),
    in_pairs(stream_chain_reference),
    lambda *kind: example_arguments(37, 4, 50, 3, *kind),
    ("cpu", "triton"),
)
