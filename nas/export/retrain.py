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

from hypernas.engines.devices import asked_device
from hypernas.errors import StudyError, UserError
from hypernas.export.request import check_room, free_folder
from hypernas.export.write import write_checked
from hypernas.kernels.dispatch import use_backend
from hypernas.kernels.processor import keep_freed_memory
from hypernas.records import Job, Notice, State, StudyRow
from hypernas.search_spaces import stored_space
from hypernas.show.terminal import make_console
from hypernas.store import Reader
from hypernas.study.search import make_job
from hypernas.training.checkpoints import CheckpointError, Position, load_checkpoint, save_checkpoint
from hypernas.training.device import deterministic, provenance
from hypernas.training.evaluate import start_from_parent
from hypernas.training.inherit import describe_change
from hypernas.training.run import Run, Setting, job_setting, prepare
from hypernas.training.step import DivergedError

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
    check_room(folder, trial.parameters)
    checkpoint = folder.with_name(f"{folder.name}.checkpoint")
    if checkpoint.exists() and not resume:
        raise UserError(f"{checkpoint} is of a training that was interrupted: --resume goes on, or delete it")
    job = make_job(store, study, replace(trial, recipe=replace(trial.recipe, tokens=tokens or trial.recipe.tokens)))
    job = replace(job, checkpoint=str(checkpoint))
    keep_freed_memory()
    space = stored_space(study.space)
    deterministic(space)
    with group(gpus) as here, use_backend(job.kernels):
        model, values = _train(job, job_setting(job, space, here.device), here)
        if not here.leads:
            return None
        # As a row would hold it, had the search trained so long.
        where = provenance(here.device) | (describe_change(job.inherits) if job.inherits else {})
        done = replace(trial, recipe=job.recipe, values=values, provenance=where)
        write_checked(folder, study, done, space, model.cpu(), ("py",))
    checkpoint.unlink(missing_ok=True)
    return {"trial": number, "folder": out, "tokens": job.recipe.tokens, "processes": here.size, "values": values}


def _train(job: Job, setting: Setting, here: Group) -> tuple[nn.Module, dict[str, float]]:
    """The trained network and its values, the latter in the leading process alone."""
    console = make_console(stderr=True, quiet=not here.leads)
    run = _start(job, setting, here, console)
    began, first = time.monotonic(), run.done
    before, said = run.train_seconds, began
    saved_every = max(1, run.steps // CHECKPOINTS)
    while run.done < run.steps:
        run.step(setting.batch(run.done, part=here.rank, parts=here.size))
        now = time.monotonic()
        run.train_seconds = before + now - began
        if now - said > SAID_SECONDS:
            said = now
            left = (now - began) / (run.done - first) * (run.steps - run.done)
            console.print(f"step {run.done} of {run.steps}: loss {run.loss():.4f}, about {left:.0f} s left")
        if run.done % saved_every == 0 and run.done < run.steps:
            if here.leads:
                report = run.report(job.trial, 0, run.loss())
                save_checkpoint(job, run.model, run.optimizers, Position(run.done, run.train_seconds, 0.0, report))
            here.wait()
    run.losses.read()
    if not here.leads:
        return run.model, {}
    scored = run.score()
    if not math.isfinite(scored.loss):
        raise DivergedError("the validation loss is not finite")
    return run.model, run.values(scored)


def _start(job: Job, setting: Setting, here: Group, console: Console) -> Run:
    """The run where its checkpoint left it, or at its beginning, ready to be trained by all processes together."""
    samples = setting.steps.samples
    if samples % here.size:
        raise UserError(f"{here.size} processes cannot share a batch of {samples} evenly: use a number that divides it")
    run = prepare(setting, micro_batches=job.micro_batches)
    try:
        before = load_checkpoint(job, run.model, run.optimizers)
    except CheckpointError as error:
        raise UserError(f"{error}: train with what it was begun with, or delete it") from error
    if before is not None:
        run.done, run.train_seconds = before.step, before.train_seconds
    elif job.inherits is not None:
        for event in start_from_parent(run, job):
            if isinstance(event, Notice):
                console.print(f"trial {job.trial} {event.message}")
    console.print(setting.data.reading.describe(setting.data.name), soft_wrap=True, markup=False, highlight=False)
    console.print(
        f"trial {job.trial}: {setting.recipe.tokens:,} {setting.task.unit}s in {run.steps} steps on {here.size} x "
        f"{here.device.type}" + (f", resumed at step {run.done}" if run.done else "")
    )
    run.model.train()
    if here.size == 1:
        run.capture(compiled=job.compile)  # as the trial did
    else:
        run.stepped = DistributedDataParallel(run.model, static_graph=True)
    return run
