"""Runs one job to its end and turns whatever goes wrong into a typed failure. Knows nothing of the study or store."""

import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypernas.files import write_whole
from hypernas.records import EVALUATIONS, Failure, FailureKind, Job, Notice, Progress, Report, Result, Seen
from hypernas.search_spaces.base import SpaceError
from hypernas.training.checkpoint_files import identity, seeds_path
from hypernas.training.precision import precision
from hypernas.training.repeats import average_results

Event = Notice | Progress | Report | Result


def run(job: Job) -> Generator[Event]:
    """Everything the job's evaluation yields; always ends with a Result, failed or not.

    Closed before its end, it stops where it is and lets go of the model.
    """
    start = time.perf_counter()
    try:
        module, function = _named(job.evaluate)
        evaluate = getattr(importlib.import_module(module), function)
        yield from _evaluate_seeds(job, evaluate) if job.repeats > 1 else evaluate(job)
    except Exception as error:  # noqa: BLE001 - whatever a trial raises is that trial's failure, never the search's
        kind = failure_kind(error)
        message = f"{type(error).__name__}: {error}"
        failure = Failure(kind, message, traceback.format_exc())
        yield Result(job.trial, job.token, train_seconds=time.perf_counter() - start, failure=failure)
    finally:
        torch = sys.modules.get("torch")  # not every evaluation brings it
        if torch is not None and torch.cuda.is_initialized():
            from hypernas.training import cuda_graph  # brings the search spaces and their kernels

            cuda_graph.release()  # others on this GPU may need the memory before our next job does


def warm_up(evaluate: str) -> None:
    """Imports what an evaluation needs, torch for a training, so that a worker's first job finds it there.

    What cannot be imported is left to that job, whose failure says why.
    """
    with suppress(Exception):
        importlib.import_module(_named(evaluate)[0])
    if "torch" in sys.modules:
        importlib.import_module("torch._dynamo")  # the first optimiser would, for seconds of its trial's time


def _named(evaluate: str) -> tuple[str, str]:
    """Module and function of an evaluation. Raises ValueError for a name that is neither known nor module:function."""
    module, colon, function = EVALUATIONS.get(evaluate, evaluate).partition(":")
    if not colon:
        raise ValueError(f"evaluation {evaluate!r}: wanted {', '.join(EVALUATIONS)} or module:function")
    return module, function


def inspect_device(gpu: bool) -> Seen:
    """What this process trains on, given a GPU or not. That a GPU can be used, only an allocation on it shows.

    Where a cluster declares a GPU on a machine without a driver for one, it trains on the CPU, and `device` says so.
    """
    cpu = Seen("cpu", precision("cpu"))
    if not gpu:
        return cpu
    import torch

    device = torch.device("cuda")
    try:
        torch.zeros(1, device=device).item()
    except torch.OutOfMemoryError:
        pass  # it can be used: others who share it fill it just now
    # An AssertionError comes of a torch that was built without CUDA.
    except (RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError) as error:
        there = torch.cuda.is_available() or driver_lists_gpus()
        return replace(cpu, problem=str(error).strip().partition("\n")[0]) if there else cpu
    memory = float(torch.cuda.get_device_properties(device).total_memory)
    return Seen(torch.cuda.get_device_name(device), precision(device.type), memory)


def driver_lists_gpus() -> bool:
    """Whether NVIDIA's driver has a GPU here, and nobody hid it from this process."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return False
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.stdout.startswith("GPU ")


def failure_kind(error: BaseException) -> FailureKind:
    """What went wrong, from the exception alone."""
    name, text = type(error).__name__, str(error).lower()
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in text:
        return FailureKind.OUT_OF_MEMORY
    if name == "DivergedError":
        return FailureKind.DIVERGED
    if isinstance(error, TimeoutError):
        return FailureKind.TIMEOUT
    if isinstance(error, SpaceError):
        return FailureKind.BUILD_ERROR
    return FailureKind.ERROR


# ---- several seeds -------------------------------------------------------------------------------------------


def _evaluate_seeds(job: Job, evaluate: Callable[[Job], Iterable[Event]]) -> Generator[Event]:
    """What `evaluate` yields for each of the job's seeds, told as one trial: one curve, one progress, one result.

    The first seed walks through the rungs, where halving may end the trial; the others are trained only when it reached
    its end, one after the other. All see the same data in the same order: a seed draws initial weights and gate noise.
    What ended is noted beside the checkpoint, so that a lost worker costs no seed that was done.
    """
    seeds = range(job.recipe.seed, job.recipe.seed + job.repeats)
    try:
        ended = _read_ended(job)
    except (OSError, ValueError) as error:
        yield Notice(job.trial, f"trains all of its seeds again: {error}")
        ended = []
    for index, seed in list(enumerate(seeds))[len(ended) :]:
        try:
            for event in evaluate(replace(job, recipe=replace(job.recipe, seed=seed))):
                if isinstance(event, Result):
                    ended.append(event)
                elif isinstance(event, Progress):
                    yield replace(event, share=(index + event.share) / job.repeats)
                elif index == 0 or not isinstance(event, Report):
                    yield event
        except Exception as error:
            error.add_note(f"with seed {seed}, of {list(seeds)}")
            raise
        if ended[-1].failure is not None:
            yield ended[-1]
            return
        try:
            _write_ended(job, ended)
        except OSError as error:
            yield Notice(job.trial, f"has no note of its seed {seed}: {error}")
    yield average_results(ended, list(seeds))


def _write_ended(job: Job, ended: list[Result]) -> None:
    """Keeps what the ended seeds gave, but for weights: a trial whose weights are lost re-trains to them."""
    if job.checkpoint is None or len(ended) == job.repeats:
        return
    done: list[dict[str, Any]] = [
        {
            "values": dict(result.values),
            "parameters": result.parameters,
            "train_seconds": result.train_seconds,
            "evaluate_seconds": result.evaluate_seconds,
            "provenance": dict(result.provenance),
            "diagnostics": dict(result.diagnostics),
        }
        for result in ended
    ]
    write_whole(seeds_path(job.checkpoint), json.dumps({"identity": identity(job), "ended": done}).encode())
    Path(job.checkpoint).unlink(missing_ok=True)  # of the seed that ended


def _read_ended(job: Job) -> list[Result]:
    """What an earlier worker noted of the same training; nothing where there is no such note.

    Raises OSError and ValueError for a note that cannot be read.
    """
    if job.checkpoint is None or not seeds_path(job.checkpoint).exists():
        return []
    noted = json.loads(seeds_path(job.checkpoint).read_bytes())
    if noted["identity"] != identity(job):
        return []
    return [Result(job.trial, job.token, **done) for done in noted["ended"]]
