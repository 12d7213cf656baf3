"""The forward and backward of a training step as CUDA graphs: two launches in place of one for each of their kernels.

A small net's kernels take less time on a GPU than launching them does. A graph repeats the launches that were captured
once, on the same memory; so only a step in which nothing but the numbers in its tensors differs from the last may be
captured, and everything that Python decides is decided at capture.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hypernas.search_spaces import is_built_in
from hypernas.search_spaces.gates import gates_of

Precision = Callable[[torch.device], AbstractContextManager[Any]]  # of the matrix products in a forward pass


class Forward(nn.Module):
    """A model's forward in a training step, with the precision of its products inside: what is captured.

    The backward lies outside of the precision's context, as it does in a step without graphs.
    """

    def __init__(self, model: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, inputs: Tensor) -> Tensor:
        with self.precision(inputs.device):
            logits: Tensor = self.model(inputs)
        return logits


def obstacle(space: Any, model: nn.Module, *, compiled: bool, micro_batches: int) -> str | None:
    """Why a training step of the model must not be captured; None where it may be."""
    if gates_of(model):
        return "gates draw their noise at every step"
    if compiled:
        return "its parts are compiled"
    if micro_batches > 1:
        # Autograd takes a first gradient without a copy; it would lie where the next replay writes.
        return "its batch comes in parts, whose gradients are summed"
    if not is_built_in(space):
        return "a space of one's own may decide in Python, step by step"
    return None


def try_capture(
    space: Any, model: nn.Module, inputs: Tensor, precision: Precision, *, compiled: bool, micro_batches: int
) -> tuple[nn.Module, str]:
    """The model to train on a GPU, on CUDA graphs where that can be, and for the trial's row whether it is and why."""
    reason = obstacle(space, model, compiled=compiled, micro_batches=micro_batches)
    if reason is None:
        try:
            return capture(model, inputs, precision), "yes"
        except RuntimeError as error:
            reason = cause(error)
    return model, f"no: {reason}"


@contextmanager
def preserve_state(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Whatever trains inside the block leaves buffers (a batch norm's statistics) and random states as they were."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)  # in place: a graph reads and writes it where it lies


def capture(model: nn.Module, inputs: Tensor, precision: Precision) -> nn.Module:
    """The model, in training mode and for inputs of this shape, on graphs of its own; weights are shared.

    torch runs three steps before it captures, in which our kernels test themselves and Triton compiles; their gradients
    are thrown away. Not captured are the loss, clipping and the optimiser. Memory of the graphs is given back once the
    result is dropped and `release` was called: torch ties it into a cycle. Raises RuntimeError where something in the
    step cannot be captured.
    """
    # A graph's gradients come from the stream of its capture: autograd waits for them, and would warn of it each time.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    with preserve_state(model, inputs.device), _same_stream():
        # Unused: a parameter that the loss does not depend on has no gradient, as without graphs.
        whole = Forward(model, precision).train()
        torch.cuda.make_graphed_callables(whole, (inputs.clone(),), allow_unused_input=True)  # in place
    return whole


def replay_of(call: Callable[[], object]) -> Callable[[], None]:
    """A function that launches again, as one graph, what `call` launches; `call` has run before on the same tensors.

    Raises RuntimeError where something in it cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    gc.collect()  # nothing of before, such as a training's graphs, may be freed during the capture
    with _same_stream(), torch.cuda.graph(graph):
        call()
    return graph.replay


@contextmanager
def _same_stream() -> Iterator[None]:
    """The current stream is the same afterwards: a capture that failed leaves its own behind."""
    stream = torch.cuda.current_stream()
    try:
        yield
    finally:
        torch.cuda.set_stream(stream)


def cause(error: RuntimeError) -> str:
    """Why a capture failed, in a line: the end of a capture fails too, of what failed within it."""
    first = error.__context__ or error
    line = str(first).partition("\n")[0]
    return f"{type(first).__name__}: {line}"


def release() -> None:
    """Gives back what dropped graphs held: their memory, and cuBLAS's workspaces, one a stream that any was captured
    on. No graph may be replayed afterwards: it would write to the workspaces it was captured with."""
    gc.collect()
    if clear := getattr(torch._C, "_cuda_clearCublasWorkspaces", None):  # torch has no public name for it
        clear()
    torch.cuda.empty_cache()
