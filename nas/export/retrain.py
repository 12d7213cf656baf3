"""Trains a trial again, in one process or in several, as long as one likes, and writes the model as an export.

With the trial's own number of tokens, in one process on the same machine type, that gives the trial's own weights. With
another number the schedule of the learning rate is stretched over it; training starts at the initial weights, since a
rate that has decayed cannot be resumed. Several processes (torchrun) share each batch: the sum of their gradients is
the one process's, in another order. What is not shared is a gate's noise and a batch norm's statistics.
"""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hypernas.data.tasks import TASKS, Batch, steps_of, to_device
from hypernas.engines.devices import asked_device
from hypernas.errors import StudyError, UserError
from hypernas.export.write import free_folder, write_checked
from hypernas.kernels.cpu_library import keep_freed_memory
from hypernas.kernels.dispatch import use_backend
from hypernas.records import Job, Notice, Report, State, StudyRow
from hypernas.search_spaces import load_space
from hypernas.search_spaces.base import Space
from hypernas.search_spaces.gates import execution_rates, reset_rates
from hypernas.store import Reader
from hypernas.study.search import make_job
from hypernas.training.checkpoints import CheckpointError, Position, load_checkpoint, save_checkpoint
from hypernas.training.device import deterministic, provenance
from hypernas.training.evaluate import on_graphs, start_from_parent
from hypernas.training.inherit import described
from hypernas.training.model import checked_data, score, scored_at_once, seeded_build
from hypernas.training.step import BACKWARD, DivergedError, Losses, make_optimizers, train_step

CHECKPOINTS = 20  # over the whole training
SAID_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Group:
    """This process among those that train together."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, batch: Batch) -> Batch:
        """This process's part of a batch, on its device."""
        inputs, classes = (tensor.chunk(self.size)[self.rank] for tensor in batch)
        return to_device((inputs, classes), self.device)

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextmanager
def group(gpus: float | None) -> Iterator[Group]:
    """The processes that torchrun started, or this one alone; each on a GPU of its own where there are any, unless
    `gpus` is 0. Raises UserError where there are fewer GPUs than processes, or what they have cannot be used.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Group(0, 1, asked_device(gpus))
        return
    rank, size, here = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if gpus != 0 and torch.cuda.is_available():
        if here >= torch.cuda.device_count():
            raise UserError(
                f"process {here} has no GPU of its own, as there are {torch.cuda.device_count()}: start fewer, or give "
                "--gpus-per-trial 0 for CPUs"
            )
        torch.cuda.set_device(here)  # before anything is put on another
    device = asked_device(gpus)
    if device.type == "cuda":
        device = torch.device("cuda", here)
    if os.environ["MASTER_ADDR"] in ("127.0.0.1", "localhost"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nothing outside this machine is asked for
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Group(rank, size, device)
    finally:
        dist.destroy_process_group()


def train(
    store: Reader,
    study: StudyRow,
    number: int,
    *,
    tokens: int | None,
    resume: bool,
    out: str,
    gpus: float | None = None,
) -> dict[str, Any] | None:
    """Trains the trial on `tokens` (or images; default: as many as the trial's) and exports it to the folder `out`.

    A checkpoint lies beside `out` until that is done; `resume` goes on from it. Returns `nas train --json`, None in
    the processes that do not lead. `gpus` as in `group`. Raises UserError and StudyError before any training.
    """
    trial = store.trial(study, number)
    if trial.state != State.COMPLETE and trial.state != State.STOPPED:
        raise StudyError(f"trial {number} is {trial.state}: only COMPLETE and STOPPED trials can be trained again")
    folder = free_folder(out)
    checkpoint = folder.with_name(f"{folder.name}.checkpoint")
    if checkpoint.exists() and not resume:
        raise UserError(f"{checkpoint} is of a training that was interrupted: --resume goes on, or delete it")
    job = make_job(store, study, replace(trial, recipe=replace(trial.recipe, tokens=tokens or trial.recipe.tokens)))
    job = replace(job, checkpoint=str(checkpoint))
    keep_freed_memory()
    space = load_space(study.space.name, study.space.settings)
    deterministic(space)
    with group(gpus) as here, use_backend(job.kernels):
        model, values = _trained(job, space, here)
        if not here.leads:
            return None
        # As a row would hold it, had the search trained so long.
        where = provenance(here.device) | (described(job.inherits) if job.inherits else {})
        done = replace(trial, recipe=job.recipe, values=values, provenance=where)
        write_checked(folder, study, done, space, model.cpu(), ("py",))
    checkpoint.unlink(missing_ok=True)
    return {"trial": number, "folder": out, "tokens": job.recipe.tokens, "processes": here.size, "values": values}


def _trained(job: Job, space: Space, here: Group) -> tuple[nn.Module, dict[str, float]]:
    """The trained network and what it measures, the latter in the leading process alone."""
    recipe = job.recipe
    task, data = TASKS[space.task], checked_data(space.task, job.data_path, job.data_hash)
    arch = space.from_json(job.arch)
    cost = space.cost(arch)
    planned = steps_of(task, arch, recipe)
    samples, steps = planned.samples, planned.count
    if samples % here.size:
        raise UserError(f"{here.size} processes cannot share a batch of {samples} evenly: use a number that divides it")
    model = seeded_build(space, arch, recipe.seed).to(here.device)
    optimizers = make_optimizers(model, recipe)
    try:
        before = load_checkpoint(job, model, optimizers)
    except CheckpointError as error:
        raise UserError(f"{error}: train with what it was begun with, or delete it") from error
    first, spent = (before.step, before.train_seconds) if before else (0, 0.0)
    console = Console(stderr=True, quiet=not here.leads)
    if before is None and job.inherits is not None:
        for event in start_from_parent(model, space, arch, job):
            if isinstance(event, Notice):
                console.print(f"trial {job.trial} {event.message}")
    console.print(
        f"trial {job.trial}: {recipe.tokens:,} {task.unit}s in {steps} steps on {here.size} x {here.device.type}"
        + (f", resumed at step {first}" if first else "")
    )
    together: nn.Module = model if here.size == 1 else DistributedDataParallel(model, static_graph=True)
    if here.size == 1 and here.device.type == "cuda":  # as the trial did
        sample, _ = here.share(task.batch(data, arch, job.data_seed, first, samples))
        together, _ = on_graphs(space, model, sample, job)
    clock = said = time.monotonic()
    saved_every = max(1, steps // CHECKPOINTS)
    model.train()
    losses = Losses(steps)
    for step in range(first, steps):
        batch = here.share(task.batch(data, arch, job.data_seed, step, samples))
        losses.add(step, train_step(together, optimizers, batch, recipe, step, steps, job.micro_batches))
        now = time.monotonic()
        if now - said > SAID_SECONDS:
            said = now
            left = (now - clock) / (step + 1 - first) * (steps - step - 1)
            console.print(f"step {step + 1} of {steps}: loss {losses.read() / task.nats:.4f}, about {left:.0f} s left")
        if (step + 1) % saved_every == 0 and step + 1 < steps:
            if here.leads:
                seen, seconds = (step + 1) * planned.units, spent + now - clock
                flops = (1 + BACKWARD) * cost.flops_total * seen
                report = Report(job.trial, 0, step + 1, seen, flops, losses.read() / task.nats, seconds)
                save_checkpoint(job, model, optimizers, Position(step + 1, seconds, 0.0, report))
            here.wait()
    losses.read()
    if not here.leads:
        return model, {}
    reset_rates(model)
    at_once = scored_at_once(planned, cost, 1, here.device)
    scored = score(model, task.validation(data, arch, recipe, at_once), task.nats)
    if not math.isfinite(scored.loss):
        raise DivergedError("the validation loss is not finite")
    return model, {
        task.loss: scored.loss,
        "accuracy": scored.accuracy,
        f"flops_per_{task.unit}": float(cost.flops_executed(execution_rates(model))),
        "parameters": float(cost.parameters_total),
        "training_flops": float((1 + BACKWARD) * cost.flops_total * steps * planned.units),
    }
