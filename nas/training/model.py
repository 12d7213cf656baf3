"""A model of a job: built from its seed, with the data of its study, and scored."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hypernas.data.tasks import TASKS, Batch, Steps, Task, to_device
from hypernas.errors import DataError
from hypernas.records import SpaceSpec
from hypernas.search_spaces import stored_space

SCORED_BYTES = 1 << 30  # of activations in a batch that a GPU scores, if all were kept


@dataclass(frozen=True, slots=True)
class Score:
    loss: float  # in the task's own unit
    accuracy: float
    kl: float = 0.0  # KL(original || model), in nats: nothing where there was no original
    agreement: float = 1.0  # how often the likeliest predictions of both agree


@torch.no_grad()
def score(model: nn.Module, batches: Iterable[Batch], nats: float, original: nn.Module | None = None) -> Score:
    """Mean cross-entropy, in units of `nats` nats, and accuracy over all predictions; beside those of an `original`
    model in evaluation mode, where one is given.

    In float32 on every device, whatever the precision of training: what is scored is what an export computes.
    """
    model.eval()
    count = 0
    device = next(model.parameters()).device
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # read once: it waits for a GPU
    for batch in batches:
        inputs, classes = to_device(batch, device)
        logits, targets = model(inputs).float().flatten(0, -2), classes.flatten()
        sums[0].add_(F.cross_entropy(logits, targets, reduction="sum"))
        sums[1].add_((logits.argmax(-1) == targets).sum())
        if original is not None:
            wanted = original(inputs).float().flatten(0, -2)
            sums[2].add_(F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), reduction="sum", log_target=True))
            sums[3].add_((wanted.argmax(-1) == logits.argmax(-1)).sum())
        count += targets.numel()
    total, right, divergence, agreed = sums.tolist()
    compared = () if original is None else (divergence / count, agreed / count)
    return Score(total / nats / count, right / count, *compared)


def name_values(task: Task, scored: Score, flops: float, parameters: float) -> dict[str, float]:
    """A model's score and size by the names of their objectives; `flops` of a forward pass, a token (or an image)."""
    return {task.loss: scored.loss, "accuracy": scored.accuracy, **name_prices(task, flops, parameters)}


def name_prices(task: Task, flops: float, parameters: float) -> dict[str, float]:
    """What a model costs, by the names of its objectives; `flops` as in `name_values`."""
    return {f"flops_per_{task.unit}": flops, "parameters": parameters}


def scoring_samples(spent: Steps, cost: Any, micro_batches: int, device: torch.device) -> int:
    """Samples in a batch of scoring: on a CPU as many as are trained on at once.

    On a GPU, which so few leave idle, as many as SCORED_BYTES would hold if their activations were kept, which scoring
    does not do. But where training ran out of memory as many as there.
    """
    trained = max(1, spent.samples // micro_batches)
    if device.type != "cuda" or micro_batches > 1:
        return trained
    kept = cost.activation_bytes * spent.units // spent.samples
    return max(trained, SCORED_BYTES // max(1, kept))


def seeded_build(space: Any, arch: Any, seed: int) -> nn.Module:
    """The module with the initial weights that `seed` draws; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = space.build(arch)
    return model


def check_data_path(path: str | None) -> None:
    """Raises DataError where a study's data lay last and lies no more."""
    if path is not None and not Path(path).expanduser().exists():
        raise DataError(
            f"the data that was trained on is not at {path} any more: say where it lies now with --set data.path= (or "
            "--data for an exported model); it is known by its content, not by its path"
        )


@lru_cache(maxsize=4)
def load_checked_data(task: str, path: str | None, hash: str) -> Any:
    """The task's data at `path`. Raises DataError when it is not what the study was trained on."""
    check_data_path(path)
    data = TASKS[task].load(path)
    if data.hash != hash:
        raise DataError(
            f"the data {data.name} on this worker has hash {data.hash[:12]}, the study's has {hash[:12]}: "
            "use the same files (and, for the default text, the same Python version) everywhere"
        )
    return data


@lru_cache(maxsize=8)
def cached_space(name: str, settings: tuple[tuple[str, str], ...], own: bool) -> Any:
    """`stored_space`, made once. Raises SpaceError."""
    return stored_space(SpaceSpec(name, dict(settings), own))
