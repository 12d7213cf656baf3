"""`nas bench train`: whole training steps, back end against back end and against what people train with today.

Every row is tokens a second of the product's own training step (forward, backward, clipping, AdamW) on one thread, and
its ratio to the row of the same name called its baseline; a ratio is the median over rounds in which all rows take
turns, by `thread_time`, as in `nas bench kernels`. In float32; and once more with products in bfloat16, everybody's,
on a CPU that trains so.

On a GPU (`--device cuda`) a row is one net at one size trained in one mode, `steps_on`, against the plain net in that
mode; `profile_of` says where a step's time goes. A profiler slows what its process launches afterwards: time first.
"""

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hypernas.bench.kernels import device_name, median_ratio, product_tflops, timed, versions
from hypernas.errors import UserError
from hypernas.kernels import cpu_library, dispatch
from hypernas.records import Recipe
from hypernas.search_spaces.connections import KroneckerHyperConnection
from hypernas.search_spaces.gates import CosineGate, gates_of
from hypernas.search_spaces.layers import ResidualStack, attention
from hypernas.search_spaces.lm import LanguageModels
from hypernas.training import cuda_graph
from hypernas.training.device import compile_parts, deterministic, mixed_precision, product_dtype
from hypernas.training.model import seeded_build
from hypernas.training.step import make_optimizers, train_step, training_flops

BATCH_TOKENS = 2048
SKIP_TOKENS = 32_768
PROFILED = 5  # steps
ATTENTION = (16, 4, 256, 32)  # batch, heads, tokens, channels a head
SIZE: dict[str, Any] = {"depth": 4, "d_model": 128, "context": 128}
STREAMS = {"streams.n": 4, "streams.mixing": "kromhc", "streams.factors": "2x2"}
HOURGLASS = {"ffn.shape": "hourglass", "ffn.ratio": 0.5, "ffn.sub_mlps": 4}
GATES = {"gates.placement": "ffn"}
PLAIN: dict[str, Any] = {
    "norm.kind": "layernorm", "position": "learned", "ffn.ratio": 4.0, "ffn.activation": "gelu", "head_dim": 16
}  # fmt: skip
CPU = torch.device("cpu")


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


class PublishedKromHC(KroneckerHyperConnection):
    """KromHC as its authors write it: every matrix made, streams normalised before they are projected."""

    def read(self, X: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        flat = X.flatten(-2)
        normalised = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.gamma)
        logits = self.alpha[self.columns] * (normalised @ self.projection.mT) + self.bias
        pre, post = logits[..., : 2 * self.n].sigmoid().unflatten(-1, (2, self.n)).unbind(-2)
        return torch.einsum("btn,btnc->btc", pre, X), (2 * post, *self.mixing(logits[..., 2 * self.n :]))

    def write(self, X: Tensor, y: Tensor, coefficients: tuple[Tensor, ...]) -> Tensor:
        post, *factors = coefficients
        matrix = factors[0]
        for factor in factors[1:]:
            matrix = torch.einsum("btij,btkl->btikjl", matrix, factor).flatten(-2).flatten(-3, -2)
        return matrix @ X + post.unsqueeze(-1) * y.unsqueeze(-2)


class PeerStack(nn.Module):
    """The branches of a residual stack on the streams of the package `hyper-connections`, mHC with n streams."""

    def __init__(self, stack: ResidualStack, n: int, d_model: int) -> None:
        super().__init__()
        from hyper_connections.manifold_constrained_hyper_connections import (
            get_init_and_expand_reduce_stream_functions,
        )

        connection, self.expand, self.reduce = get_init_and_expand_reduce_stream_functions(n, dim=d_model)
        self.sublayers = nn.ModuleList(
            [connection(branch=sublayer, layer_index=index) for index, sublayer in enumerate(stack.sublayers)]
        )

    def forward(self, x: Tensor) -> Tensor:
        streams = self.expand(x)
        for sublayer in self.sublayers:
            streams = sublayer(streams)
        return self.reduce(streams)


class PlainBlock(nn.Module):
    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.project = nn.Linear(d_model, d_model, bias=False)
        self.up = nn.Linear(d_model, 4 * d_model, bias=False)
        self.down = nn.Linear(4 * d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)
        query, key, value = heads.unbind(2)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(y.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class PlainTransformer(nn.Module):
    """What one writes by hand in the style of nanoGPT: LayerNorm, GELU of ratio 4, learned positions, tied head."""

    def __init__(self, depth: int, d_model: int, context: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, d_model), nn.Embedding(context, d_model)
        self.blocks = nn.Sequential(*[PlainBlock(d_model, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(d_model)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)


class HalfOpen(CosineGate):
    """A gate that pays for its decision and then runs every second token."""

    def decide(self, h: Tensor) -> Tensor:
        chosen = super().decide(h)
        half = torch.zeros_like(chosen)
        half[..., ::2] = True
        return half


def run() -> dict[str, Any]:
    """All rows. Raises UserError without the package `hyper-connections`."""
    try:
        import hyper_connections  # noqa: F401
    except ImportError as error:
        raise UserError("nas bench train compares with hyper-connections: pip install 'hypernas[peers]'") from error
    deterministic()
    cpu_library.keep_freed_memory()
    rows = _first_step()
    for products in dict.fromkeys((torch.float32, product_dtype(CPU))):
        suffix = "" if products is torch.float32 else ", bfloat16"
        kromhc = _kromhc_steps(products)
        rows += _training(f"kromhc n=4, hourglass, gates{suffix}", kromhc, "naive")
        rows += _profile(f"kromhc n=4, hourglass, gates{suffix}", kromhc["cpu"])
        rows += _training(f"mhc n=4, hourglass{suffix}", _mhc_steps(products), "hyper-connections")
        rows += _training(f"LayerNorm, GELU, n=1{suffix}", _plain_steps(products), "nanoGPT style")
        rows += _attention(products)
    for placement in ("ffn", "attention"):
        rows += _skipping(placement)
    return {"device": device_name(CPU), "versions": versions(), "rows": rows}


# ---- on a device -------------------------------------------------------------------------------------------------


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
    traced = _traced(made.step, 1, device)
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
    traced = _traced(step, PROFILED, device)
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


def _traced(step: Callable[[], object], steps: int, device: torch.device) -> Traced:
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
    busy = _covered((event.start_ns(), event.start_ns() + event.duration_ns()) for event in ran) / 1e6
    return Traced(runs, spent, busy, sum(event.name().startswith(LAUNCHES) for event in events))


# What a CPU calls to run a kernel, by CUDA's runtime or (Triton) its driver, or a graph of them.
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchCooperativeKernel", "cuLaunchKernel", "cudaGraphLaunch", "cuGraphLaunch")


def _covered(spans: Iterable[tuple[int, int]]) -> int:
    """The length of the union of intervals."""
    total, until = 0, 0
    for start, end in sorted(spans):
        total += max(0, end - max(start, until))
        until = max(until, end)
    return total


# ---- training ----------------------------------------------------------------------------------------------------


def _kromhc_steps(products: torch.dtype) -> dict[str, Callable[[], None]]:
    published = _model(SIZE | STREAMS | HOURGLASS | GATES)
    for index, sublayer in enumerate(published.stack.sublayers):
        sublayer.connection = PublishedKromHC((2, 2), SIZE["d_model"], index)
    return {
        "naive": _step(published, "reference", products),
        "reference": _step(_model(SIZE | STREAMS | HOURGLASS | GATES), "reference", products),
        "cpu": _step(_model(SIZE | STREAMS | HOURGLASS | GATES), "cpu", products),
        "cpu, n=1": _step(_model(SIZE | HOURGLASS | GATES), "cpu", products),
    }


def _mhc_steps(products: torch.dtype) -> dict[str, Callable[[], None]]:
    mhc = {"streams.n": 4, "streams.mixing": "mhc"}
    peer = _model(SIZE | HOURGLASS)
    peer.stack = PeerStack(peer.stack, 4, SIZE["d_model"])
    return {
        "hyper-connections": _step(peer, "reference", products),
        "reference": _step(_model(SIZE | HOURGLASS | mhc), "reference", products),
        "cpu": _step(_model(SIZE | HOURGLASS | mhc), "cpu", products),
        "cpu, kromhc": _step(_model(SIZE | HOURGLASS | STREAMS), "cpu", products),
    }


def _plain_steps(products: torch.dtype) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    plain = PlainTransformer(SIZE["depth"], SIZE["d_model"], SIZE["context"], SIZE["d_model"] // PLAIN["head_dim"])
    return {
        "nanoGPT style": _step(plain, "reference", products),
        "reference": _step(_model(SIZE | PLAIN), "reference", products),
        "cpu": _step(_model(SIZE | PLAIN), "cpu", products),
    }


def _model(settings: dict[str, Any]) -> Any:
    space = LanguageModels()
    torch.manual_seed(0)
    return space.build(space.from_json(settings))


def _step(model: nn.Module, backend: str, products: torch.dtype = torch.float32) -> Callable[[], None]:
    """One update on random bytes: what a training step costs does not depend on them."""
    recipe = Recipe(learning_rate=1e-3, batch_tokens=BATCH_TOKENS)
    optimizers = make_optimizers(model, recipe)
    shape = (BATCH_TOKENS // SIZE["context"], SIZE["context"])
    tokens, classes = torch.randint(256, (2, *shape), generator=torch.Generator().manual_seed(0))
    model.train()

    def step() -> None:
        with dispatch.use_backend(backend):
            train_step(model, optimizers, (tokens, classes), recipe, 50, 100, products=products)

    return step


def _training(name: str, steps: dict[str, Callable[[], None]], baseline: str) -> list[dict[str, Any]]:
    times = timed(steps, CPU)
    return [
        {
            "name": f"train/{name}",
            "backend": backend,
            "value": round(BATCH_TOKENS / statistics.median(times[backend]) * 1e3),
            "unit": "tokens/s",
            "baseline": baseline,
            "ratio": round(median_ratio(times[baseline], times[backend]), 2),
        }
        for backend in steps
    ]


def _profile(name: str, step: Callable[[], None]) -> list[dict[str, Any]]:
    """What of a step's time PyTorch's own matrix products and attention take: no kernel of ours makes them faster."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(PROFILED):
            step()
    spent = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    shares = {
        "matrix products": sum(spent.get(f"aten::{product}", 0.0) for product in ("mm", "addmm", "bmm")),
        "attention": sum(time for key, time in spent.items() if "scaled_dot_product" in key),
    }
    return [
        {
            "name": f"train/{name}",
            "backend": f"cpu: {group}",
            "value": round(100 * time / sum(spent.values()), 1),
            "unit": "% of the step",
            "baseline": None,
            "ratio": None,
        }
        for group, time in shares.items()
    ]


def _attention(products: torch.dtype) -> list[dict[str, Any]]:
    """Causal attention, forward and backward, in every form it could take. Models have it as one operator, on a CPU in
    float32: `hypernas.search_spaces.layers.attention`."""
    generator = torch.Generator().manual_seed(0)
    *heads, cotangent = (torch.randn(ATTENTION, generator=generator).to(products) for _ in range(4))
    later = torch.ones(ATTENTION[-2], ATTENTION[-2], dtype=torch.bool).triu(1)

    def two_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.mT * query.shape[-1] ** -0.5
        return scores.masked_fill(later, -torch.inf).softmax(-1) @ value

    forms: dict[str, Callable[..., Tensor]] = {
        "one operator": partial(F.scaled_dot_product_attention, is_causal=True),
        "two products": two_products,
    }
    if products is torch.bfloat16:
        forms["one operator, in float32"] = partial(attention, is_causal=True)

    def step(form: Callable[..., Tensor]) -> Callable[[], None]:
        leaves = [tensor.clone().requires_grad_() for tensor in heads]

        def once() -> None:
            torch.autograd.grad(form(*leaves), leaves, cotangent)

        return once

    times = timed({name: step(form) for name, form in forms.items()}, CPU)
    return [
        {
            "name": f"attention {'x'.join(map(str, ATTENTION))} {str(products).removeprefix('torch.')}",
            "backend": name,
            "value": round(statistics.median(times[name]), 2),
            "unit": "ms",
            "baseline": "one operator",
            "ratio": round(median_ratio(times["one operator"], times[name]), 2),
        }
        for name in forms
    ]


def _first_step() -> list[dict[str, Any]]:
    """What the first step of an architecture costs more than its second, in a process that trained another before."""
    _step(_model({"depth": 1, "d_model": 32, "context": SIZE["context"]}), "auto")()
    step = _step(_model(SIZE | STREAMS | HOURGLASS | GATES), "auto")
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    row = {"name": "first step - second step", "backend": "auto", "value": round(seconds[0] - seconds[1], 3)}
    return [row | {"unit": "s", "baseline": None, "ratio": None}]


# ---- skipping ----------------------------------------------------------------------------------------------------


def _skipping(placement: str) -> list[dict[str, Any]]:
    """How much of the FLOPs that gates save becomes time: 32k tokens forward, every second one executed."""
    space = LanguageModels()
    size = SIZE | {"context": 256}
    dense, gated = (space.from_json(size | {"gates.placement": name}) for name in ("none", placement))
    torch.manual_seed(0)
    models = {"every token": space.build(dense).eval(), "every second": space.build(gated).eval()}
    for gate in gates_of(models["every second"]):
        gate.__class__ = HalfOpen
    tokens = torch.randint(256, (SKIP_TOKENS // 256, 256), generator=torch.Generator().manual_seed(0))

    def forward(model: nn.Module) -> Callable[[], None]:
        def once() -> None:
            with torch.no_grad(), dispatch.use_backend("auto"):
                model(tokens)

        return once

    times = timed({name: forward(model) for name, model in models.items()}, CPU)
    cost = space.cost(gated)
    before = space.cost(dense).flops_total
    saved = 1 - cost.flops_executed([0.5] * len(cost.gated_flops)) / before
    faster = 1 - 1 / median_ratio(times["every token"], times["every second"])
    name = f"skip/{placement}, half of 32k tokens"
    rows = [("FLOPs saved", saved, None), ("time saved", faster, round(faster / saved, 2))]
    return [
        {
            "name": name,
            "backend": what,
            "value": round(100 * value, 1),
            "unit": "%",
            "baseline": "FLOPs saved" if ratio else None,
            "ratio": ratio,
        }
        for what, value, ratio in rows
    ]
