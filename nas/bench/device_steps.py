"""`nas bench train --device cuda`: the product's training step on a device, net against net and mode against mode.

A row is one net at one size trained in one mode, `steps_on`, against the plain net in that mode; `profile_of` says
where a step's time goes. A profiler slows what its process launches afterwards: time first.
"""

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any

import torch

from hypernas.bench.device import device_name, product_tflops, versions
from hypernas.bench.train import GATES, HOURGLASS, PROFILED, STREAMS
from hypernas.records import Recipe
from hypernas.search_spaces.lm import LanguageModels
from hypernas.training import cuda_graph
from hypernas.training.device import compile_parts, deterministic, mixed_precision
from hypernas.training.model import seeded_build
from hypernas.training.step import make_optimizers, train_step, training_flops


@dataclass(frozen=True, slots=True)
class Size:
    """How large a net is, and how many tokens it trains on at once."""

    name: str
    settings: Mapping[str, Any]
    batch_tokens: int


# The second is as large as GPT-2's smallest (124 million parameters) but for the vocabulary, which is bytes here.
SIZES = (
    Size("4x128", {"depth": 4, "d_model": 128, "context": 128}, 16_384),
    Size("12x768", {"depth": 12, "d_model": 768, "context": 1024, "head_dim": 64}, 16_384),
)
TINY = Size("1x16", {"depth": 1, "d_model": 16, "context": 16, "head_dim": 8}, 64)  # to see that all of it runs
NETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mhc n=4": {"streams.n": 4, "streams.mixing": "mhc"},
    "kromhc n=4": STREAMS,
    "kromhc n=4, hourglass, gates": STREAMS | HOURGLASS | GATES,
}
MODES = ("eager", "graphs", "compiled", "compiled whole")  # whole: what torch.compile makes of a net without our say
WARM_UPS = 3  # steps
STEPS = 100  # of the training that the timed steps stand in


def run_on(device: torch.device, sizes: Sequence[Size] = SIZES) -> dict[str, Any]:
    """All rows of a GPU: every net at every size in every mode, then what each launches. About ten minutes on an H100,
    most of them compiling."""
    asked = [(size, net, mode) for size in sizes for net in NETS for mode in (MODES if net == "plain" else MODES[:3])]
    rows = against_plain(_each(steps_on, device, asked))
    rows += _each(launches_on, device, [each for each in asked if each[2] in MODES[:2]])
    return {"device": device_name(device), "versions": versions(), "rows": rows}


def _each(
    row_of: Callable[..., dict[str, Any]], device: torch.device, asked: Iterable[tuple[Size, str, str]]
) -> list[dict[str, Any]]:
    """The rows of what is asked; one that a device has too little memory for, or that torch cannot compile, is left out
    with a warning."""
    rows = []
    for size, net, mode in asked:
        try:
            rows.append(row_of(device, size, net, mode))
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            warnings.warn(f"no row of {net}, {size.name}, {mode}: {reason}", stacklevel=2)
    return rows


def against_plain(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `steps_on` with their ratio to the plain net's of the same size and mode, where there is one."""
    rows = list(rows)
    plain = {(row["size"], row["mode"]): row["value"] for row in rows if row["net"] == "plain"}
    return [
        row | {"baseline": "plain", "ratio": round(row["value"] / plain[row["size"], row["mode"]], 3)}
        if (row["size"], row["mode"]) in plain
        else row
        for row in rows
    ]


def steps_on(device: torch.device, size: Size, net: str, mode: str, steps: int = 20) -> dict[str, Any]:
    """Tokens a second of the product's training step, of the median of so many after a warm-up, on one batch of random
    bytes that lies on the device; and what else there is to know of it.

    `mfu` is the share of the device's bfloat16 ceiling (`product_tflops`) that the matrix products of the net come to,
    backward counted as twice forward and attention as the whole square; `peak_bytes` the most memory in tensors, the
    build and the capture included, `reserved_bytes` what torch held for them; `start_seconds` the time from nothing to
    the end of the first step, compiling included; `cuda_graph` whether the mode graphs could capture the step.
    """
    started = time.perf_counter()
    made = _step_on(device, size, net, mode)
    made.step()
    _synchronize(device)
    start_seconds = time.perf_counter() - started
    for _ in range(WARM_UPS):
        made.step()
    taken = statistics.median(_milliseconds(made.step, steps, device))
    peak, reserved = _peak_memory(device)
    rate = size.batch_tokens / taken * 1e3
    tflops = training_flops(made.products, rate) / 1e12
    return {
        "name": f"step/{net}, {size.name}",
        "backend": mode,
        "value": round(rate),
        "unit": "tokens/s",
        "baseline": None,
        "ratio": None,
        "net": net,
        "size": size.name,
        "mode": mode,
        "batch_tokens": size.batch_tokens,
        "step_ms": round(taken, 4),
        "tflops": round(tflops, 4),
        "mfu": round(tflops / product_tflops(device), 4),
        "peak_bytes": peak,
        "reserved_bytes": reserved,
        "start_seconds": round(start_seconds, 2),
        "cuda_graph": made.captured,
    }


def launches_on(device: torch.device, size: Size, net: str, mode: str) -> dict[str, Any]:
    """Launches of a step by the CPU: of kernels, or of graphs of them; `kernels` is how many then run, copies too.

    Starts a profiler. On a CPU nothing is launched: 0.
    """
    made = _step_on(device, size, net, mode)
    traced = _trace(made.step, 1, device)
    row = {"name": f"launches/{net}, {size.name}", "backend": mode, "value": traced.launches, "unit": "a step"}
    row |= {"baseline": None, "ratio": None, "net": net, "size": size.name, "mode": mode}
    return row | {"kernels": sum(traced.runs.values()), "cuda_graph": made.captured}


def profile_of(device: torch.device, size: Size, net: str, mode: str) -> list[dict[str, Any]]:
    """Where the time of PROFILED steps goes: the ten kernels that take most of it, launches a step, and the share of
    time in which the device waits, by the steps' time without a profiler. On a CPU operators in place of kernels."""
    step = _step_on(device, size, net, mode).step
    for _ in range(WARM_UPS):
        step()
    elapsed = sum(_milliseconds(step, PROFILED, device))
    traced = _trace(step, PROFILED, device)
    total = sum(traced.spent.values())
    rows: list[tuple[str, float, str, float | None]] = [
        (name, 100 * spent / total, "% of device time", traced.runs[name] / PROFILED)
        for name, spent in traced.spent.most_common(10)
    ]
    rows += [
        ("launches", traced.launches / PROFILED, "a step", None),
        ("kernels", sum(traced.runs.values()) / PROFILED, "a step", None),
        ("idle", 100 * max(0.0, 1 - traced.busy / elapsed), "% of the step", None),
    ]
    return [
        {
            "name": f"profile/{net}, {size.name}, {mode}",
            "backend": name,
            "value": round(value, 1),
            "unit": unit,
            "baseline": None,
            "ratio": None,
            "runs_a_step": runs,
        }
        for name, value, unit, runs in rows
    ]


@dataclass(frozen=True, slots=True)
class Made:
    """A training step, what a row says of its capture, and a token's FLOPs in matrix products forward."""

    step: Callable[[], None]
    captured: str | None
    products: int


def _step_on(device: torch.device, size: Size, net: str, mode: str) -> Made:
    """The step, in memory that the one made before gave back if it is not used any more."""
    deterministic()
    if device.type == "cuda":
        cuda_graph.release()
        torch.cuda.reset_peak_memory_stats(device)
    space = LanguageModels()
    arch = space.from_json({**size.settings, **NETS[net]})
    model = trained = seeded_build(space, arch, 0).to(device).train()
    recipe = Recipe(learning_rate=1e-3, batch_tokens=size.batch_tokens)
    optimizers, steps = make_optimizers(model, recipe), count()
    shape = (size.batch_tokens // size.settings["context"], size.settings["context"])
    tokens, classes = torch.randint(256, (2, *shape), generator=torch.Generator().manual_seed(0)).to(device)
    captured = None
    if mode == "graphs" and device.type == "cuda":
        trained, captured = cuda_graph.try_capture(
            space, model, tokens, mixed_precision, compiled=False, micro_batches=1
        )
    elif mode == "graphs":
        captured = "no: a CPU has none"
    elif mode.startswith("compiled"):
        torch.compiler.reset()
        compile_parts(model) if mode == "compiled" else model.compile(dynamic=False)

    def step() -> None:
        train_step(trained, optimizers, (tokens, classes), recipe, next(steps) % STEPS, STEPS)

    return Made(step, captured, space.cost(arch).matmul)


def _peak_memory(device: torch.device) -> tuple[int | None, int | None]:
    if device.type == "cpu":
        return None, None
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _milliseconds(step: Callable[[], object], steps: int, device: torch.device) -> list[float]:
    """Milliseconds of each of so many steps, launched one after the other as training launches them."""
    if device.type == "cpu":
        moments = [time.perf_counter()]
        for _ in range(steps):
            step()
            moments.append(time.perf_counter())
        return [1e3 * (after - before) for before, after in pairwise(moments)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    events[-1].synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(events)]


@dataclass(frozen=True, slots=True)
class Traced:
    """What a profiler saw of some steps: by kernel how often it ran and for how many milliseconds, in how many of them
    any ran, and how often the CPU launched something."""

    runs: Counter[str]
    spent: Counter[str]
    busy: float
    launches: int


def _trace(step: Callable[[], object], steps: int, device: torch.device) -> Traced:
    gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    # Not from the first step on: CUPTI before CUDA 13.1 gives kernels wrong times at first, and torch then drops them.
    schedule = torch.profiler.schedule(wait=0, warmup=WARM_UPS, active=steps, repeat=1)
    with torch.profiler.profile(activities=[activity], schedule=schedule) as profiler:
        for _ in range(WARM_UPS + steps):
            step()
            _synchronize(device)
            profiler.step()
    if not gpu:
        operators = [each for each in profiler.key_averages() if not each.is_user_annotation]
        spent = Counter({each.key: each.self_cpu_time_total / 1e3 for each in operators})
        return Traced(Counter({each.key: each.count for each in operators}), spent, sum(spent.values()), 0)
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    ran = [e for e in events if e.device_type() == torch.autograd.DeviceType.CUDA and not e.is_user_annotation()]
    runs, spent = Counter[str](), Counter[str]()
    for event in ran:
        runs[event.name()] += 1
        spent[event.name()] += event.duration_ns() / 1e6
    busy = _union_length((event.start_ns(), event.start_ns() + event.duration_ns()) for event in ran) / 1e6
    return Traced(runs, spent, busy, sum(event.name().startswith(LAUNCHES) for event in events))


# What a CPU calls to run a kernel, by CUDA's runtime or (Triton) its driver, or a graph of them.
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchCooperativeKernel", "cuLaunchKernel", "cudaGraphLaunch", "cuGraphLaunch")


def _union_length(spans: Iterable[tuple[int, int]]) -> int:
    """The length of the union of intervals."""
    total, until = 0, 0
    for start, end in sorted(spans):
        total += max(0, end - max(start, until))
        until = max(until, end)
    return total
