"""Measurements of a model beside its loss: its time, its memory, how its streams mix."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor, nn

from hypernas.data.tasks import TASKS
from hypernas.kernels import dispatch
from hypernas.records import Recipe
from hypernas.search_spaces.base import Space
from hypernas.search_spaces.gates import gates_of
from hypernas.search_spaces.layers import ResidualStack
from hypernas.training import cuda_graph
from hypernas.training.device import deterministic
from hypernas.training.run import Run, Setting, prepare
from hypernas.training.step import train_step


@torch.no_grad()
def stream_diagnostics(model: nn.Module, inputs: Tensor) -> dict[str, Any]:
    """Mean H_res of every connection over the tokens of `inputs`, and the gain of their product over depth.

    The gain is mHC's (2512.24880, section 3): the largest absolute row sum of the product of the mean matrices
    (forward) and the largest absolute column sum (backward); both are 1 where every matrix is doubly stochastic.
    Empty for a model with a single stream.
    """
    stack = next((module for module in model.modules() if isinstance(module, ResidualStack)), None)
    if stack is None or getattr(stack.sublayers[0].connection, "n", 1) == 1:
        return {}
    entered: list[Tensor] = []
    handle = stack.register_forward_pre_hook(lambda _, arguments: entered.append(arguments[0]))
    try:
        model.eval()
        model(inputs)
    finally:
        handle.remove()
    matrices: list[Tensor] = []
    sublayers: Any = stack.sublayers
    streams = sublayers[0].connection.expand(entered[0])
    for sublayer in sublayers:
        connection = sublayer.connection
        matrices.append(connection.mean_mixing(streams).double())
        h, coefficients = connection.read(streams)
        streams = connection.write(streams, sublayer(h), coefficients)
    product = torch.linalg.multi_dot(matrices[::-1]) if len(matrices) > 1 else matrices[0]
    return {
        "mean_mixing": [[[round(entry, 6) for entry in row] for row in matrix.tolist()] for matrix in matrices],
        "composite_gain": {
            "forward": product.sum(1).abs().max().item(),
            "backward": product.sum(0).abs().max().item(),
        },
    }


WARM_UPS, REPEATS = 3, 15
REPLAYS = 20  # timed as one: launching a graph takes a GPU longer than a small net's forward pass


@torch.no_grad()
def latency_ms(model: nn.Module, inputs: Tensor) -> tuple[float, dict[str, Any]]:
    """Milliseconds of a forward pass, the median of REPEATS after WARM_UPS, and what to know about it: the distance of
    the quartiles and, on a GPU, what was timed.

    That is the net alone, replayed as a CUDA graph; and with the Python that launches it where it cannot be captured,
    as where a gate asks the device which tokens to compute: nothing else could run such a net.
    """
    model.eval()

    def launched() -> float:
        start = time.perf_counter()
        model(inputs)
        if inputs.is_cuda:
            torch.cuda.synchronize(inputs.device)
        return 1000 * (time.perf_counter() - start)

    for _ in range(WARM_UPS):
        launched()
    once, timed = launched, dict[str, str]()
    if inputs.is_cuda:
        if gates_of(model):
            timed = {"latency_ms_of": "launches: gates decide on the host"}
        else:
            try:
                once, timed = _make_replay(model, inputs), {"latency_ms_of": "graph replays"}
            except RuntimeError as error:
                timed = {"latency_ms_of": f"launches: {cuda_graph.cause(error)}"}
    low, middle, high = quantiles([once() for _ in range(REPEATS)], n=4)
    return middle, {"latency_ms_quartiles": high - low, **timed}


def _make_replay(model: nn.Module, inputs: Tensor) -> Callable[[], float]:
    """A function that gives the mean milliseconds of REPLAYS forward passes, back to back on the device.

    Raises RuntimeError where the forward pass cannot be captured.
    """
    replay = cuda_graph.replay_of(lambda: model(inputs))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once() -> float:
        start.record()
        for _ in range(REPLAYS):
            replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / REPLAYS

    return once


def peak_bytes(step: Callable[[], object], held: Iterable[Tensor], device: torch.device) -> int:
    """The most memory in tensors at any moment of `step`, in bytes: `held` before it, and what it allocates."""
    if device.type == "cuda":
        cuda_graph.release()  # what was captured for other purposes is no part of a step
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return sum(storages.values()) + max(accumulate((event.nbytes() for event in events), initial=0))


@dataclass(frozen=True, slots=True)
class Measured:
    """Measured objectives by name, and what to know about them."""

    values: Mapping[str, float] = field(default_factory=dict)
    diagnostics: Mapping[str, Any] = field(default_factory=dict)


def measure(names: Collection[str], run: Run) -> Measured:
    """The measured objectives among `names`, on the batch trained on last. Trains the model one step further.

    `latency_ms` is a forward pass of one sample; `peak_bytes` of a training step: weights, gradients, optimiser and
    activations.
    """
    model, batch = run.model, run.setting.batch(run.done - 1)
    values: dict[str, float] = {}
    spread: dict[str, Any] = {}
    if "latency_ms" in names:
        values["latency_ms"], spread = latency_ms(model, batch[0][:1])
    if "peak_bytes" in names:
        model.train()
        states = [state for optimizer in run.optimizers for state in optimizer.state.values()]
        held = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        held += [*model.parameters(), *model.buffers()]
        held += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        recipe, last = run.setting.recipe, run.steps - 1
        step = partial(train_step, model, run.optimizers, batch, recipe, last, run.steps, run.micro_batches)
        values["peak_bytes"] = float(peak_bytes(step, held, batch[0].device))
    return Measured(values, spread)


def measure_reference(
    names: Collection[str],
    space: Space,
    arch: Any,
    recipe: Recipe,
    path: str | None,
    *,
    device: torch.device,
    kernels: str,
    compile: bool,
) -> dict[str, float]:
    """Measures an untrained architecture as a worker on `device` would: a space's largest bounds the hypervolume.

    Raises BackendError for kernels that cannot run here.
    """
    if not names:
        return {}
    deterministic(space)
    task = TASKS[space.task]
    with dispatch.use_backend(kernels):
        setting = Setting(space, arch, task, task.load(path), recipe, data_seed=0, device=device)
        run = prepare(setting, steps=2, compile=compile)
        run.step(setting.batch(0))  # the optimiser's state is there from the first step on
        return dict(measure(names, run).values)
