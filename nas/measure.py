"""What a trained model is asked beside its loss: its time, its memory, how its streams mix."""

import time
from collections.abc import Callable, Iterable
from itertools import accumulate
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor, nn

from search_spaces.layers import ResidualStack


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


@torch.no_grad()
def latency_ms(model: nn.Module, inputs: Tensor) -> tuple[float, float]:
    """Milliseconds of a forward pass: the median of REPEATS after WARM_UPS, and the distance of the quartiles."""
    model.eval()
    taken = []
    for repeat in range(WARM_UPS + REPEATS):
        start = time.perf_counter()
        model(inputs)
        if inputs.is_cuda:
            torch.cuda.synchronize(inputs.device)
        if repeat >= WARM_UPS:
            taken.append(1000 * (time.perf_counter() - start))
    low, middle, high = quantiles(taken, n=4)
    return middle, high - low


def peak_bytes(step: Callable[[], object], held: Iterable[Tensor], device: torch.device) -> int:
    """The most memory in tensors at any moment of `step`, in bytes: `held` before it, and what it allocates."""
    if device.type == "cuda":
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
