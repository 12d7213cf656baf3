"""`nas bench kernels`: each op against eager PyTorch, torch.compile and a copy of the bytes it must move.

A row is timed only after the op agrees with its float64 definition. The rows of one op are timed in turn, round by
round, and a ratio is the median over rounds of (naive / this row), because a shared machine's speed drifts between runs
but little within a round.

On a CPU everything runs in one thread and time is `thread_time`, so that another process on the core does not count.

On a GPU many calls are one CUDA graph, `hypernas.bench.timing`. What a graph cannot hold is timed as a loop of single
calls, and its row says so.

`python -m hypernas.bench.kernels` prints the table of docs/kernels.md.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hypernas.bench.device import device_name, device_of, versions
from hypernas.bench.request import DTYPE_NAMES, TORCH_OPS, check_dtype, check_op, token_counts
from hypernas.bench.timing import buffers, copying, make_rotation, median_ratio, prepare, time_candidates
from hypernas.kernels import (
    OPS,
    cosine_gate,
    dispatch,
    processor,
    rms_norm,
    sinkhorn,
    stream_boundary,
    stream_chain,
    stream_mix,
    stream_read,
    swiglu,
)
from hypernas.kernels import block_diagonal_linear as block_diagonal
from hypernas.kernels import gather_scatter as gather

DTYPES = {name: getattr(torch, name) for name in DTYPE_NAMES}
LAYERS = 4  # of stream_chain
DRAWN = 4096  # tokens that are drawn for a GPU: drawing a quarter of a million on a CPU would take longer than timing


@dataclass(frozen=True, slots=True)
class Case:
    """One op at one shape: what to time, and the bytes that forward and backward must move at least.

    `op` is None for ops made of PyTorch's own operators, which have no back ends to choose from; `backward_bytes` is 0
    for an op without a backward of its own.
    """

    op: dispatch.Op | None
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    naive: Callable[..., Any]
    naive_arguments: tuple[Any, ...]
    forward_bytes: int
    backward_bytes: int


def naive_kromhc(
    X: Tensor, y: Tensor, factors: Tensor, post: Tensor, phi: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KromHC as published: streams in their own basis, H_res built as a Kronecker product and multiplied."""
    n = X.shape[1]
    X = naive_stream_mix(X, y, naive_kronecker(factors), post)
    flat = X.flatten(1)
    normalised = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6)
    gates = (normalised @ phi.mT + bias).sigmoid()
    u = (gates[:, :n].unsqueeze(-1) * X).sum(1)
    return X, u, 2 * gates[:, n : 2 * n], gates[:, 2 * n :]


def naive_kronecker(factors: Tensor) -> Tensor:
    """H_res (T, n, n) from the first entries (T, log2 n) of its 2 x 2 factors."""
    T = factors.shape[0]
    H = factors.new_ones(T, 1, 1)
    for p in factors.unbind(-1):
        U = torch.stack((torch.stack((p, 1 - p), -1), torch.stack((1 - p, p), -1)), -2)
        H = torch.einsum("tij,tkl->tikjl", H, U).reshape(T, 2 * H.shape[1], -1)
    return H


def naive_stream_chain(X: Tensor, *writes: Tensor) -> tuple[Tensor, ...]:
    """y, factors and post of each layer in turn -> the streams after each."""
    out = []
    for y, factors, post in zip(writes[::3], writes[1::3], writes[2::3], strict=True):
        X = naive_stream_mix(X, y, naive_kronecker(factors), post)
        out.append(X)
    return tuple(out)


def naive_cosine_gate(x: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gated = gate.unsqueeze(-1) * branch
    distance = 2 - 2 * F.cosine_similarity(x + gated, x + branch, dim=-1)
    return gated, 1 - F.cosine_similarity(x, branch, dim=-1), distance


def naive_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def naive_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def naive_stream_mix(X: Tensor, y: Tensor, H: Tensor, post: Tensor) -> Tensor:
    return H @ X + post.unsqueeze(-1) * y.unsqueeze(-2)


def naive_stream_read(X: Tensor, phi: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    flat = X.flatten(1)
    logits = naive_rms_norm(flat, flat.new_ones(())) @ phi.mT + bias
    return (logits[:, : X.shape[1]].sigmoid().unsqueeze(-1) * X).sum(1), logits


def naive_sinkhorn(logits: Tensor) -> Tensor:
    matrix = logits.exp()
    for _ in range(20):
        matrix = matrix / matrix.sum(-2, keepdim=True)
        matrix = matrix / matrix.sum(-1, keepdim=True)
    return matrix


def case_of(op: str, n: int, C: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Case:
    """The op's arguments and its yardsticks. Raises ValueError for an unknown op."""
    check_op(op)
    size, T = dtype.itemsize, tokens
    arguments: tuple[Any, ...]
    if op == "stream_boundary":
        X, y, coefficients, phi, bias = stream_boundary.example_arguments(T, n, C, dtype, device)
        factors, post = torch.rand(T, n.bit_length() - 1).to(X), torch.rand(T, n).to(X)
        naive = (X, y, factors, post, phi.to(dtype), bias.to(dtype))
        arguments = (X, y, coefficients, phi, bias)
        elements = ((2 * n + 2) * C, (3 * n + 3) * C)
        known, function, baseline = stream_boundary.STREAM_BOUNDARY, stream_boundary.stream_boundary, naive_kromhc
        return _case(known, function, arguments, baseline, naive, T * size, elements)
    if op == "stream_chain":
        arguments = stream_chain.example_arguments(T, n, C, LAYERS, dtype, device)
        mixing, post = torch.rand(T, n.bit_length() - 1), torch.rand(T, n)
        writes = [t.to(arguments[0]) for y in arguments[1::2] for t in (y, mixing, post)]
        elements = ((n + LAYERS * (n + 1)) * C, 0)
        known, naive_arguments = stream_chain.STREAM_CHAIN, (arguments[0], *writes)
        return _case(known, known.function, arguments, naive_stream_chain, naive_arguments, T * size, elements)
    if op == "stream_mix":
        arguments = stream_mix.example_arguments(T, n, C, dtype, device)
        elements = ((2 * n + 1) * C, (3 * n + 2) * C)
        return _simple(stream_mix.STREAM_MIX, arguments, naive_stream_mix, T * size, elements)
    if op == "stream_read":
        arguments = stream_read.example_arguments(T, n, C, dtype, device)
        return _simple(stream_read.STREAM_READ, arguments, naive_stream_read, T * size, ((n + 1) * C, (2 * n + 1) * C))
    if op == "sinkhorn":
        logits = sinkhorn.example_arguments(T, n, torch.float32, device)
        return _simple(sinkhorn.SINKHORN, logits, naive_sinkhorn, T * 4, (2 * n * n, 3 * n * n))
    if op == "cosine_gate":
        arguments = cosine_gate.example_arguments(T, C, dtype, device)
        return _simple(cosine_gate.COSINE_GATE, arguments, naive_cosine_gate, T * size, (3 * C, 5 * C))
    if op == "swiglu":
        arguments = swiglu.example_arguments(T, C, dtype, device)
        return _simple(swiglu.SWIGLU, arguments, naive_swiglu, T * size, (3 * C, 5 * C))
    if op == "rms_norm":
        arguments = rms_norm.example_arguments(T, C, dtype, device)
        return _simple(rms_norm.RMS_NORM, arguments, naive_rms_norm, T * size, (2 * C, 3 * C))
    return _torch_case(op, C, T, dtype, device)


def _torch_case(op: str, C: int, T: int, dtype: torch.dtype, device: torch.device) -> Case:
    size = dtype.itemsize
    x = torch.randn(T, C).to(device, dtype)
    arguments: tuple[Any, ...]
    if op == "gather_scatter":
        keep = (torch.arange(T) % 2 == 0).to(device)
        arguments = (x, keep, torch.Tensor.clone)
        reference = gather.gather_scatter_reference
        return _case(None, gather.gather_scatter, arguments, reference, arguments, T * size, (3 * C, 3 * C))
    if op == "block_diagonal_linear":
        weights = tuple((torch.randn(C // 4, C // 4) * C**-0.5).to(device, dtype) for _ in range(4))

        def blocks(x: Tensor, *weights: Tensor) -> Tensor:
            return block_diagonal.block_diagonal_linear(x, weights)

        def dense(x: Tensor, *weights: Tensor) -> Tensor:
            return block_diagonal.dense_linear(x, weights)

        return _case(None, blocks, (x, *weights), dense, (x, *weights), T * size, (2 * C, 4 * C))
    raise AssertionError(f"no case of {op}")


def _case(
    op: dispatch.Op | None,
    function: Callable[..., Any],
    arguments: Sequence[Any],
    naive: Callable[..., Any],
    naive_arguments: Sequence[Any],
    unit: int,
    elements: tuple[int, int],
) -> Case:
    forward, backward = (count * unit for count in elements)
    return Case(op, function, tuple(arguments), naive, tuple(naive_arguments), forward, backward)


def _simple(
    op: dispatch.Op, arguments: Sequence[Any], naive: Callable[..., Any], unit: int, elements: tuple[int, int]
) -> Case:
    """An op whose naive form takes the same arguments, all in the dtype of the first."""
    dtype = arguments[0].dtype
    return _case(op, op.function, arguments, naive, [a.to(dtype) for a in arguments], unit, elements)


def run_all(
    op: str, n: int, C: int, tokens: str, dtypes: str, backend: str | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """`run` for every one of several numbers of tokens and dtypes, each a list with commas; where there are several,
    they stand in the rows' names. Raises ValueError as `run` does, and for a list that it cannot read."""
    combinations = list(product(token_counts(tokens), map(str.strip, dtypes.split(","))))
    rows = []
    for count, dtype in combinations:
        result = run(op, n, C, count, dtype, backend, device)
        several = f" {dtype} T={count}" if len(combinations) > 1 else ""
        rows += [row | {"name": row["name"] + several} for row in result["rows"]]
        if len(combinations) > 1 and backend in (None, "compile"):
            torch.compiler.reset()  # it compiles one function for a few shapes and then no more
    return result | {"rows": rows}


def run(
    op: str, n: int, C: int, tokens: int, dtype: str, backend: str | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Times of one op. `backend` keeps only that row beside naive and floor: compile, cpu, triton, or torch (ops that
    PyTorch's own operators compute). Raises ValueError for what it does not know, BackendError for a wrong result."""
    check_dtype(dtype)
    where = device_of(device)
    if where.type == "cpu":
        processor.keep_freed_memory()
    case = (case_of if where.type == "cpu" else grown_case)(op, n, C, tokens, DTYPES[dtype], where)
    fast = "torch" if case.op is None else {"cpu": "cpu", "cuda": "triton"}[where.type]
    if backend not in (None, fast, "compile", "naive", "floor"):
        raise ValueError(f"--backend {backend}: for {op} on {device} wanted compile or {fast}")
    if case.op is not None:
        dispatch.self_test(case.op, fast, DTYPES[dtype], where)
    rows = []
    threads = torch.get_num_threads()
    try:
        if where.type == "cpu":
            torch.set_num_threads(1)
        for phase in _phases(case):
            rows += _rows(op, case, phase, fast, backend, where)
    finally:
        torch.set_num_threads(threads)
    rows = [row | {"tokens": tokens, "dtype": dtype} for row in rows]
    return {"device": device_name(where), "versions": versions(), "rows": rows}


def grown_case(op: str, n: int, C: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Case:
    """`case_of`, with DRAWN tokens drawn and further ones their copies, made on the device. Raises ValueError."""
    if tokens <= DRAWN:
        return case_of(op, n, C, tokens, dtype, device)
    case, other = (case_of(op, n, C, count, dtype, device) for count in (DRAWN, 8))

    def grown(argument: Any, fewer: Any) -> Any:
        if not isinstance(argument, Tensor) or argument.shape == fewer.shape:
            return argument  # weights, which have no tokens
        copies = -(-tokens // DRAWN)
        return argument.repeat(copies, *[1] * (argument.ndim - 1))[:tokens]

    return replace(
        case,
        arguments=tuple(map(grown, case.arguments, other.arguments)),
        naive_arguments=tuple(map(grown, case.naive_arguments, other.naive_arguments)),
        forward_bytes=case.forward_bytes * tokens // DRAWN,
        backward_bytes=case.backward_bytes * tokens // DRAWN,
    )


def bytes_moved(op: str, n: int, C: int, tokens: int, dtype: str) -> dict[str, int]:
    """What `run` calls the floor, in bytes, by the names of its rows."""
    case = case_of(op, n, C, tokens, DTYPES[dtype], torch.device("meta"))
    return {f"{op}/{phase}": _bytes(case, phase) for phase in _phases(case)}


def _phases(case: Case) -> tuple[str, ...]:
    return ("forward", "forward+backward") if case.backward_bytes else ("forward",)


def _bytes(case: Case, phase: str) -> int:
    return case.forward_bytes + (case.backward_bytes if phase != "forward" else 0)


def _rows(op: str, case: Case, phase: str, fast: str, only: str | None, device: torch.device) -> list[dict[str, Any]]:
    moved = _bytes(case, phase)
    functions = {"naive": (case.naive, case.naive_arguments)}
    if only in (None, "compile") and case.op is not None:  # without an op it would be the same operators again
        functions["compile"] = (torch.compile(case.naive, dynamic=False), case.naive_arguments)
    if only in (None, fast):
        functions[fast] = (case.function, case.arguments)
    with dispatch.use_backend("auto" if fast == "torch" else fast):
        candidates = {
            name: make_rotation(partial(prepare, function, phase=phase), arguments, moved, device)
            for name, (function, arguments) in functions.items()
        }
        candidates["floor"] = make_rotation(copying, buffers(moved, device), moved, device)
        taken = time_candidates({name: each.run for name, each in candidates.items()}, device)
    times = {name: [time / candidates[name].calls for time in taken[name]] for name in candidates}
    gpu = device.type == "cuda"
    typical = {name: statistics.median(each) if gpu else min(each) for name, each in times.items()}
    return [
        {
            "name": f"{op}/{phase}",
            "backend": name,
            "value": round(1e3 * typical[name], 2) if gpu else round(typical[name], 4),
            "unit": "us" if gpu else "ms",
            "baseline": "naive",
            "ratio": round(median_ratio(times["naive"], times[name]), 2),
            "op": op,
            "phase": phase,
            "GB/s": round(moved / max(typical[name], 1e-6) / 1e6, 3),
            "share_of_copy": round(median_ratio(times["floor"], times[name]), 3),
            "timed": each.timed,
            "calls": each.calls,
            "sets": each.sets,
        }
        for name, each in candidates.items()
    ]


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown, one op and phase a line: the bytes it must move; naive, compiled and fast in ms; the fast one beside
    each and the floor."""
    lines = [
        "| op | MB | naive ms | compile ms | back end | ms | times naive | times compile | floor ms | times floor |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        phases: dict[str, dict[str, dict[str, Any]]] = {}
        for row in result["rows"]:
            phases.setdefault(row["name"], {})[row["backend"]] = row
        for name, rows in phases.items():
            fast = next(key for key in rows if key not in ("naive", "compile", "floor"))
            compiled = rows.get("compile")
            ours, floor = rows[fast]["ratio"], rows["floor"]["ratio"]
            cells = [
                f"{name}{result.get('shape', '')}",
                f"{result['bytes'][name] / 1e6:.1f}" if "bytes" in result else "-",
                f"{rows['naive']['value']:.2f}",
                f"{compiled['value']:.2f}" if compiled else "-",
                fast,
                f"{rows[fast]['value']:.2f}",
                f"{ours:.1f}",
                f"{ours / compiled['ratio']:.1f}" if compiled else "-",
                f"{rows['floor']['value']:.2f}",
                f"{floor / ours:.1f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# The shapes of the table in docs/kernels.md.
DOCUMENTED = (
    ("stream_boundary", 4, 256, "float32"),
    ("stream_boundary", 4, 256, "bfloat16"),
    ("stream_boundary", 8, 128, "float32"),
    ("stream_boundary", 8, 128, "bfloat16"),
    ("stream_chain", 4, 256, "float32"),
    ("stream_chain", 4, 256, "bfloat16"),
    ("stream_mix", 4, 256, "float32"),
    ("stream_mix", 4, 256, "bfloat16"),
    ("stream_read", 4, 256, "float32"),
    ("stream_read", 4, 256, "bfloat16"),
    ("sinkhorn", 4, 256, "float32"),
    *((op, 1, 256, dtype) for op in (*OPS[5:], *TORCH_OPS) for dtype in DTYPES),
)


if __name__ == "__main__":
    documented = []
    for op, n, C, dtype in DOCUMENTED:
        shape = f" {dtype}" + (f" n={n} C={C}" if n > 1 else f" C={C}")
        moved = bytes_moved(op, n, C, 4096, dtype)
        documented.append(run(op, n, C, 4096, dtype) | {"shape": shape, "bytes": moved})
        torch.compiler.reset()
    print(table(documented))
