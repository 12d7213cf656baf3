"""Runs one job to its end and turns whatever goes wrong into a typed failure. Knows nothing of the study or store."""

import importlib
import time
import traceback
from collections.abc import Generator

import torch

from nas.records import Failure, FailureKind, Job, Notice, Progress, Report, Result
from search_spaces.base import SpaceError

Event = Notice | Progress | Report | Result


def run(job: Job) -> Generator[Event]:
    """Everything the job's evaluation yields; always ends with a Result, failed or not.

    Closed before its end, it stops where it is and lets go of the model.
    """
    start = time.perf_counter()
    try:
        module, _, function = job.evaluate.partition(":")
        yield from getattr(importlib.import_module(module), function)(job)
    except Exception as error:  # noqa: BLE001 - whatever a trial raises is that trial's failure, never the search's
        kind = failure_kind(error)
        message = f"{type(error).__name__}: {error}"
        failure = Failure(kind, message, traceback.format_exc())
        yield Result(job.trial, job.token, train_seconds=time.perf_counter() - start, failure=failure)
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # others on this GPU may need it before our next job does


def gpu_memory() -> float | None:
    """Bytes of the GPU that this worker sees; None without one, whatever the cluster says it has."""
    return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


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
