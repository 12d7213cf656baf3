"""`nas bench search --part long`: whether a driver of thousands of trials grows, or leaves anything behind.

Two workers of Ray run jobs that train nothing, but do the rest: a checkpoint at each rung, a report of it, weights at
the end. All that is written lies in one folder, which is looked at again and again, as are the processes.
"""

import multiprocessing
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from hypernas.config.study_config import StudyConfig
from hypernas.files import write_whole
from hypernas.records import RUNGS, Job, Report, Result
from hypernas.show.views import Silent
from hypernas.store import Store
from hypernas.study.driver import run
from hypernas.study.search import executor_of, open_search, prepare

LOOKS = 30
EVALUATE = "hypernas.bench.long_run:evaluate"
UNITS = {
    "driver_memory": "MB",
    "worker_memory": "MB",
    "ray_memory": "MB",
    "driver_descriptors": "files",
    "worker_descriptors": "files",
    "write_ahead_log": "MB",
    "files": "files",
    "ray_logs": "MB",
}


def measure(trials: int) -> dict[str, Any]:
    """What a driver of so many trials has at its end, and by how much that grows in 1,000, as `nas bench --json`."""
    with (
        tempfile.TemporaryDirectory(prefix="long-") as folder,
        multiprocessing.get_context("spawn").Pool(1) as pool,  # a process without what this one has opened
    ):
        looks = pool.apply(drive, (folder, trials, "ray"))
    versions = f"python {platform.python_version()}"
    return {"device": f"{platform.machine()}, 2 workers, {trials} trials", "versions": versions, "rows": rows_of(looks)}


def rows_of(looks: Sequence[tuple[int, Mapping[str, float]]]) -> list[dict[str, Any]]:
    """Of looks, each after so many trials: the last, and the slope of a line through all but the first tenth."""
    settled = looks[len(looks) // 10 :]
    trials = [count for count, _ in settled]
    rows = []
    for name, unit in UNITS.items():
        slope = 1000 * np.polyfit(trials, [look[name] for _, look in settled], 1)[0]
        for backend, value, of in (
            ("at the end", looks[-1][1][name], unit),
            ("growth", float(slope), f"{unit} per 1,000 trials"),
        ):
            rows.append({"name": name, "backend": backend, "value": value, "unit": of, "baseline": None, "ratio": None})
    return rows


def drive(folder: str, trials: int, engine: str) -> list[tuple[int, dict[str, float]]]:
    """Searches in `folder`, where temporary files go too; looks, each after so many trials that ended."""
    os.environ["TMPDIR"], tempfile.tempdir = folder, None
    os.chdir(folder)
    config = StudyConfig(study="long", trials=trials, preset="quick", engine=engine, workers=2, gpus_per_trial=0.0)
    prepared = prepare(config)
    with closing(executor_of(config, EVALUATE)) as executor, Store("nas.db", create=True) as store:
        watch = Watch(max(1, trials // LOOKS), lambda: look(Path(folder)))
        outcome = run(open_search(store, prepared, EVALUATE), executor, watch)
    if outcome.finished != trials:
        raise RuntimeError(f"only {outcome.finished} of {trials} trials finished")
    return watch.looks


class Watch(Silent):
    """Looks whenever so many trials have ended."""

    def __init__(self, every: int, look: Callable[[], dict[str, float]]) -> None:
        self.looks: list[tuple[int, dict[str, float]]] = []
        self._every, self._look, self._ended = every, look, 0

    def _count(self) -> None:
        self._ended += 1
        if self._ended % self._every == 0:
            self.looks.append((self._ended, self._look()))

    def on_stop(self, event: Report) -> None:
        self._count()

    def on_end(self, trial: int, result: Result | None) -> None:
        self._count()


def look(folder: Path) -> dict[str, float]:
    """What this process, those below it and the folder hold, by the names of UNITS."""
    found = dict.fromkeys(UNITS, 0.0)
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            whose = "driver" if process == me else "worker" if "_Worker" in " ".join(process.cmdline()) else "ray"
            found[f"{whose}_memory"] += process.memory_info().rss / 2**20
            if whose != "ray":
                found[f"{whose}_descriptors"] += process.num_fds()
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            if path.is_file() and path.suffix != ".safetensors":  # of which there are as many as the front has trials
                found["files"] += 1
                size = path.stat().st_size / 2**20
                found["write_ahead_log"] += size if path.name == "nas.db-wal" else 0.0
                found["ray_logs"] += size if "logs" in path.parts else 0.0
    return found


def evaluate(job: Job) -> Iterator[Report | Result]:
    """A job that trains nothing: values that follow from the architecture's own keys, a checkpoint at each rung."""
    size = float(job.arch["depth"] * job.arch["d_model"])
    loss = 8.0 / size + job.recipe.learning_rate
    for rung, share in enumerate(RUNGS):
        if job.checkpoint is not None:
            write_whole(Path(job.checkpoint), bytes(4096))
        tokens = round(share * job.recipe.tokens)
        yield Report(job.trial, rung, rung + 1, tokens, size * tokens, loss / share**0.1, 0.01 * (rung + 1))
    values = {"bits_per_byte": loss, "flops_per_token": size}
    yield Result(job.trial, job.token, values=values, parameters=int(size), weights=bytes(4096))
