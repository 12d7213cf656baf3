"""Times calls, several candidates in turn, round by round: by `thread_time` on a CPU, by CUDA events on a GPU.

On a GPU many calls are one CUDA graph, whose replay CUDA events time: launching a kernel from Python takes longer than
many a kernel runs. The calls take sets of arguments in turn, results apart too, together twice the size of the L2
cache: with one set, a small op would be timed on data that the cache still holds.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hypernas.training import cuda_graph

ROUNDS = 15
CALLS = 32  # in one graph, unless that many move more than
MOVED = 2 * 10**9  # bytes, which an H100 moves in under a millisecond


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is timed at once: `calls` calls in turn over `sets` sets of arguments, in the way that `timed` names.

    `reads` are closures with the arguments, which a graph reads but does not keep.
    """

    run: Callable[[], object]
    calls: int
    sets: int
    timed: str
    reads: Sequence[Callable[[], Any]] = ()


def prepare(function: Callable[..., Any], arguments: tuple[Any, ...], phase: str) -> Callable[[], Any]:
    """A closure that runs `function` once and returns its results: forward without autograd, or forward and backward
    with the gradients after the outputs."""
    if phase == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return function(*arguments)

        return forward
    leaves = [
        a.detach().clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments
    ]
    wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    first = function(*leaves)
    cotangents = [torch.randn_like(o) for o in (first if isinstance(first, tuple) else (first,))]

    def both() -> Any:
        out = function(*leaves)
        return out, torch.autograd.grad(out, wanted, cotangents, allow_unused=True)

    return both


def buffers(total: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A source and a target of a copy that reads and writes `total` bytes together: the floor of every op that must
    move them."""
    source = torch.ones(max(1, total // 8), device=device)
    return source, torch.zeros_like(source)


def copying(arguments: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    """A closure that copies the first into the second."""
    source, target = arguments
    return lambda: target.copy_(source)


def make_rotation(
    make: Callable[[Any], Callable[[], Any]], arguments: tuple[Any, ...], moved: int, device: torch.device
) -> Candidate:
    """What to time of the call that `make` makes of arguments and that moves so many bytes: the call alone on a CPU,
    on a GPU as many as say something, over copies of the arguments, as one CUDA graph where that can be."""
    first = make(arguments)
    if device.type == "cpu":
        return Candidate(first, 1, 1, "single calls")
    touched = size_of((arguments, first()))
    sets = sets_beyond(torch.cuda.get_device_properties(device).L2_cache_size, touched)
    calls = [first, *(make(copy_arguments(arguments)) for _ in range(sets - 1))]
    repeats = max(1, min(CALLS // sets, -(-MOVED // (sets * max(1, moved)))))
    try:
        graph, _ = capture_graph(calls, repeats)
    except RuntimeError as error:
        few = calls[:CALLS]  # launched from Python, they take far longer than what they read
        return Candidate(partial(in_turn, few, 1), len(few), len(few), f"single calls: {cuda_graph.cause(error)}")
    return Candidate(graph.replay, sets * repeats, sets, "graph", calls)


def in_turn(calls: Iterable[Callable[[], Any]], repeats: int) -> None:
    """What a graph of the calls repeats, call by call."""
    for _ in range(repeats):
        for call in calls:
            call()


def capture_graph(calls: Sequence[Callable[[], Any]], repeats: int = 1) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    """The calls in turn, so many times over, as one CUDA graph, and the results of each call that a replay fills.

    What the calls read has to live as long as the graph. Results of different calls lie apart, so that they take turns
    in the caches as arguments do. The calls are made before, for what compiles or tests itself at first. Raises
    RuntimeError for what no graph can hold.
    """
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    graph, results = torch.cuda.CUDAGraph(), [None] * len(calls)
    try:
        # All on one stream, which autograd remembers with its nodes.
        with torch.cuda.stream(stream):
            in_turn(calls, 2)
            with _waiting_forbidden():  # else it would fail within the capture, which leaves the allocator in disorder
                calls[0]()
        gc.collect()  # nothing of before may be freed during the capture
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(repeats):
                for index, call in enumerate(calls):
                    results[index] = None  # its memory is the next result's
                    results[index] = call()
    finally:
        torch.cuda.set_stream(before)  # a capture that failed leaves its own behind
    return graph, results


@contextmanager
def _waiting_forbidden() -> Iterator[None]:
    """An operator that waits for the device raises RuntimeError inside the block."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def sets_beyond(cache: int, touched: int) -> int:
    """Sets of so many bytes each that are twice the size of a cache together: none is still in it at its next turn."""
    return max(1, -(-2 * cache // max(1, touched)))


def size_of(values: Any) -> int:
    """Bytes of all tensors in nested tuples and lists, each memory counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(values)}
    return sum(storages.values())


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


def copy_arguments(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments)


def time_candidates(candidates: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each candidate in each round, the candidates in turn."""
    clock = _cuda_milliseconds if device.type == "cuda" else _cpu_milliseconds
    for candidate in candidates.values():
        for _ in range(2):
            candidate()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(ROUNDS):
        for name, candidate in candidates.items():
            times[name].append(clock(candidate))
    return times


def median_ratio(times: Sequence[float], other: Sequence[float]) -> float:
    """The median over rounds of times / other, both from `timed`."""
    return statistics.median(a / b for a, b in zip(times, other, strict=True))


def _cpu_milliseconds(candidate: Callable[[], Any]) -> float:
    start = time.thread_time()
    candidate()
    return (time.thread_time() - start) * 1e3


def _cuda_milliseconds(candidate: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    candidate()  # keeps the device busy while what is timed is launched
    start.record()
    candidate()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
