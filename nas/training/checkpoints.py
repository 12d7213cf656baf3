"""A half-trained trial on disk: weights, optimiser, random state and position, so that a lost worker costs one rung.

A safetensors file: tensors and text, no code. Training resumed from it gives the bits of training that was never
disturbed. Where it lies: nas/training/checkpoint_files.py.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from hypernas.files import write_whole
from hypernas.records import Job, Report
from hypernas.training.checkpoint_files import identity


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or belongs to other training."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where in its training a checkpoint stands."""

    step: int  # the next one; batches are a function of it
    train_seconds: float
    evaluate_seconds: float
    report: Report  # of the rung, in case it never arrived


def save_checkpoint(job: Job, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], at: Position) -> None:
    """Replaces the job's checkpoint. Raises OSError when it cannot be written; the one before then stays."""
    assert job.checkpoint is not None
    tensors = {f"model/{name}": tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {
                f"optimizer/{number}/{index}/{name}": torch.as_tensor(value).cpu() for name, value in state.items()
            }
    tensors["random"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    metadata = {"identity": identity(job), "position": json.dumps(asdict(at)), "sha256": _sha256(tensors)}
    write_whole(Path(job.checkpoint), save(tensors, metadata=metadata))


def load_checkpoint(job: Job, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Position | None:
    """Puts model, optimisers and torch's random state where the job's checkpoint left them.

    None when the job has none. Raises CheckpointError when there is one that is damaged or of other training; model
    and optimisers are then as they were.
    """
    if job.checkpoint is None or not Path(job.checkpoint).exists():
        return None
    try:
        with safe_open(job.checkpoint, framework="pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{job.checkpoint} cannot be read: {error}") from error
    if metadata.get("identity") != identity(job):
        raise CheckpointError(f"{job.checkpoint} is of other training")
    if metadata.get("sha256") != _sha256(tensors):
        raise CheckpointError(f"{job.checkpoint} is damaged")
    model.load_state_dict(_below("model/", tensors))
    for number, optimizer in enumerate(optimizers):
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _below(f"optimizer/{number}/", tensors).items():
            index, _, key = name.partition("/")
            states.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["random"])
    if "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"])
    position: dict[str, Any] = json.loads(metadata["position"])
    return Position(**position | {"report": Report(**position["report"])})


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    found = sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
