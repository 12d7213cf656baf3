"""What the jobs of the engines' tests do: named as `tests.nas.evaluations:FUNCTION`, so that workers can import it."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from hypernas.records import Job, Progress, Report, Result


def finishes(job: Job) -> Iterator[Report | Result]:
    yield Report(job.trial, 0, 1, 1, 1.0, 2.0, 0.1)
    yield Result(job.trial, job.token, {"pid": float(os.getpid())}, provenance={"trial": job.trial})


def goes_on(job: Job) -> Iterator[Progress | Report]:
    """Reports once, then makes progress for ever."""
    yield Report(job.trial, 0, 1, 1, 1.0, 2.0, 0.1)
    while True:
        time.sleep(0.02)
        yield Progress(job.trial, 0.5, 1.0)


def marks_what_it_holds(job: Job) -> Iterator[Progress | Result]:
    """There is a file while it holds something; makes progress for ever, or ends at once as a trial of seed 1."""
    held = Path(job.data_path or "")
    held.touch()
    try:
        while job.recipe.seed != 1:
            time.sleep(0.02)
            yield Progress(job.trial, 0.5, 1.0)
        yield Result(job.trial, job.token, {"pid": float(os.getpid())})
    finally:
        held.unlink()


def hangs_after_a_report(job: Job) -> Iterator[Report]:
    yield Report(job.trial, 0, 1, 1, 1.0, 2.0, 0.1)
    time.sleep(600)


def raises(job: Job) -> Iterator[Result]:
    raise MemoryError("too large")
    yield


def kills_its_process(job: Job) -> Iterator[Result]:
    os._exit(1)
    yield


def scores_its_seed(job: Job) -> Iterator[Progress | Report | Result]:
    yield Progress(job.trial, 0.5, 1.0)
    yield Report(job.trial, 0, 1, 1, 1.0, 2.0, 0.1)
    values = {"bits_per_byte": 2.0 + job.recipe.seed, "flops_per_token": 100.0, "training_flops": 7.0}
    yield Result(job.trial, job.token, values, train_seconds=3.0, weights=f"of seed {job.recipe.seed}".encode())


def names_its_imports(job: Job) -> Iterator[Result]:
    yield Result(job.trial, job.token, {"pid": float(os.getpid())}, provenance={"modules": list(sys.modules)})


def meets_others(job: Job) -> Iterator[Result]:
    """Says on which node and GPUs it runs, once as many jobs have left a mark in the folder as its seed says."""
    import ray

    begun = Path(job.data_path or "")
    (begun / str(job.trial)).touch()
    deadline = time.monotonic() + 60
    while (together := len(list(begun.iterdir()))) < job.recipe.seed and time.monotonic() < deadline:
        time.sleep(0.05)
    node = ray.get_runtime_context().get_node_id()
    found = {"node": node, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}
    yield Result(job.trial, job.token, {"together": float(together)}, provenance=found)
