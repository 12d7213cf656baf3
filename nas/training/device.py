"""What a process computes on: determinism, the device, its precision, and what a row keeps of them."""

import os
import platform
from typing import Any

import torch
from torch import nn

from hypernas.kernels import dispatch
from hypernas.search_spaces import is_built_in
from hypernas.training.precision import precision, rounds_products


def deterministic(space: Any = None) -> None:
    """One thread and deterministic algorithms, for this whole process: an operator that has none is an error.

    On a GPU it is a warning in a `space` of a user's own, whose nets may need such an operator. Ours do not; and only
    where others are errors does attention choose a deterministic backward.
    """
    torch.set_num_threads(1)
    lenient = torch.cuda.is_available() and space is not None and not is_built_in(space)
    torch.use_deterministic_algorithms(True, warn_only=lenient)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32: convolutions, and an LSTM's products, in a score
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # costs time, and nothing here reads unwritten memory


def worker_device(asked: str = "auto") -> torch.device:
    """Where this process trains, by what a job or a flag asks for: auto, a GPU if it has one; cpu, its CPU."""
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")


def product_dtype(device: torch.device) -> torch.dtype:
    """What matrix products are computed in on the device: bfloat16 or float32, as `rounds_products` says."""
    return torch.bfloat16 if rounds_products(device.type) else torch.float32


def mixed_precision(device: torch.device, products: torch.dtype | None = None) -> torch.autocast:
    """Matrix products in `products`, by default the device's `product_dtype`; weights and streams in float32.

    A weight's copy is kept for no second product, as CUDA graphs want it; a weight takes part in one.
    """
    products = products or product_dtype(device)
    enabled = products is not torch.float32
    return torch.autocast(device.type, products if enabled else torch.bfloat16, enabled=enabled, cache_enabled=False)


def compile_parts(model: nn.Module) -> None:
    """torch.compile in place, branch by branch where there are branches: what lies between them differs at each step
    (gates) or is fused already. State and names stay."""
    branches = [module.branch for module in model.modules() if hasattr(module, "branch")]
    for part in branches or [model]:
        part.compile(dynamic=False)  # type: ignore[union-attr]


def reading_waits(device: torch.device) -> bool:
    """Whether reading a number from the device stops the host until all that it launched there is done."""
    return device.type == "cuda"


def provenance(device: torch.device) -> dict[str, Any]:
    """What a trial's number depends on besides its row: where it ran, and which kernels computed it and why."""
    from hypernas.version import version

    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "hypernas": version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": f"{platform.machine()} {capability}",
        "precision": precision(device.type),
        "threads": torch.get_num_threads(),
        "kernels": {op: f"{choice.backend}: {choice.reason}" for op, choice in dispatch.list_choices().items()},
        "worker": f"{platform.node()}:{os.getpid()}",
    }
