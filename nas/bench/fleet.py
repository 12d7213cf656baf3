"""`nas bench search --part fleet`: at what rate one driver of a large cluster is full.

The real loop, proposals, halving and store go through a long study; only the workers are simulated. They replay
recorded curves on a clock of their own, so that the driver never waits for them, and all that is timed is its own work.
"""

import multiprocessing
import os
import platform
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import click
import psutil
import torch

from hypernas.bench.postgres import throw_away_postgres
from hypernas.bench.store import PRINT_FRONT, peak_memory
from hypernas.bench.table import Recorded, load_table
from hypernas.config.study_config import StudyConfig
from hypernas.engines.protocol import Event
from hypernas.records import RUNGS, Job, Report, Result, Seen
from hypernas.search_spaces.base import Space, digest
from hypernas.show.views import Silent
from hypernas.store import Store
from hypernas.study.driver import run
from hypernas.study.search import open_search, prepare
from hypernas.training.device import provenance
from hypernas.training.step import training_flops

STUDY = "fleet"
WORKERS = 2000
TRIALS_A_WORKER = 50  # at least, where a shorter study is asked for
PARTS = 10  # of a run, each timed by itself
STORES = ("sqlite", "postgresql")
SPEED = 1e12  # FLOPs a second of a simulated worker
WEIGHTS = bytes(4096)  # of each trial that ends: what it takes to keep and to delete them, not the disk's time


def measure(trials: int) -> dict[str, Any]:
    """Every row of the fleet's study on both stores, as `nas bench --json`. Raises UserError without a PostgreSQL."""
    workers = max(2, min(WORKERS, trials // TRIALS_A_WORKER))
    rows = []
    for store in STORES:
        with (
            tempfile.TemporaryDirectory() as folder,
            throw_away_postgres(durable=True) if store == "postgresql" else nullcontext() as server,
        ):
            rows += measure_store(
                store, server.url if server else str(Path(folder) / "nas.db"), folder, trials, workers
            )
    return {
        "device": f"{platform.machine()}, {os.cpu_count()} cores, {workers} simulated workers, {trials} trials",
        "versions": f"python {platform.python_version()}, SQLite {sqlite3.sqlite_version}",
        "rows": rows,
    }


def measure_store(name: str, url: str, folder: str, trials: int, workers: int) -> list[dict[str, Any]]:
    """The rows of one study of the fleet, in processes of their own: the search, what goes on with it, `nas front`."""
    found = _in_process(url, folder, trials, workers)
    rows = _rows(name, found)
    began = time.monotonic()
    resumed = _in_process(url, folder, trials + 1, 1)
    rows.append(_row("resume_to_first_proposal", name, resumed.first_submit - began, "s"))
    rows.append(_row("resume_memory", name, resumed.peak, "MB"))
    command = [sys.executable, "-c", PRINT_FRONT, "front", "--study", STUDY, "--store", url]
    began = time.monotonic()
    printed = subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    rows.append(_row("open_and_print_front", name, time.monotonic() - began, "s"))
    rows.append(_row("open_and_print_front_memory", name, float(printed.stderr.split()[-1]), "MB"))
    return rows


def _in_process(url: str, folder: str, trials: int, workers: int) -> "Driven":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(drive, (url, folder, trials, workers))


def _row(name: str, backend: str, value: float, unit: str, first: float | None = None) -> dict[str, Any]:
    return {
        "name": name,
        "backend": backend,
        "value": value,
        "unit": unit,
        "baseline": None if first is None else "part 1",
        "ratio": value / first if first else None,
    }


def _rows(store: str, found: "Driven") -> list[dict[str, Any]]:
    """What the driver took, part by part, and how much it can take."""
    rows = [_row("fill_the_fleet", store, found.start.took.wall, "s")]
    for title, unit, value in (
        ("driver_per_trial", "ms", Spent.trial_ms),
        ("driver_per_trial_processor", "ms", Spent.trial_cpu_ms),
        ("driver_per_report", "ms", Spent.report_ms),
        ("driver_per_report_processor", "ms", Spent.report_cpu_ms),
        ("driver_memory", "MB", Spent.memory_mb),
    ):
        first = value(found.parts[0])
        rows += [
            _row(title, f"{store}, part {number} of {PARTS}", value(part), unit, first if number > 1 else None)
            for number, part in enumerate(found.parts, start=1)
        ]
    every = found.parts
    seconds = sum(part.took.wall for part in every)
    rows.append(_row("driver_full_at", store, sum(part.trials for part in every) / seconds, "trials/s"))
    rows.append(_row("driver_full_at", store, sum(part.reports for part in every) / seconds, "reports/s"))
    rows.append(_row("reports_per_trial", store, sum(p.reports for p in every) / sum(p.trials for p in every), ""))
    rows.append(_row("last_trials_end", store, found.end.took.wall, "s"))
    rows.append(_row("driver_peak_memory", store, found.peak, "MB"))
    return rows


# ---- a driver --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Took:
    """Seconds on the clock, and of this process's own on a processor: others may keep it from one."""

    wall: float = 0.0
    cpu: float = 0.0

    @classmethod
    def now(cls) -> "Took":
        return cls(time.perf_counter(), time.process_time())

    def add(self, other: "Took", sign: int = 1) -> None:
        self.wall += sign * other.wall
        self.cpu += sign * other.cpu


@dataclass(slots=True)
class Spent:
    """What a driver did in one part of its run, and the seconds it took for that."""

    trials: int = 0  # that ended
    reports: int = 0  # all of them
    continued: int = 0  # reports after which the trial went on, so that nothing but the report was to be done
    took: Took = field(default_factory=Took)
    continued_took: Took = field(default_factory=Took)
    memory: float = 0.0  # bytes of the process, at the part's end

    def trial_ms(self) -> float:
        """Milliseconds for a trial and all that belongs to it: its proposal, lease, reports and end."""
        return 1000 * self.took.wall / max(1, self.trials)

    def trial_cpu_ms(self) -> float:
        return 1000 * self.took.cpu / max(1, self.trials)

    def report_ms(self) -> float:
        """Milliseconds for a report of a trial that goes on."""
        return 1000 * self.continued_took.wall / max(1, self.continued)

    def report_cpu_ms(self) -> float:
        return 1000 * self.continued_took.cpu / max(1, self.continued)

    def memory_mb(self) -> float:
        return self.memory / 2**20


@dataclass(slots=True)
class Driven:
    """A driver's run: its start until every worker has a trial, its parts, its end when nothing new is started."""

    trials: int  # in all parts together
    start: Spent = field(default_factory=Spent)
    parts: list[Spent] = field(default_factory=lambda: [Spent() for _ in range(PARTS)])
    end: Spent = field(default_factory=Spent)
    first_submit: float = 0.0  # on the monotonic clock, which all processes share
    ended: int = 0
    peak: float = 0.0  # MB

    def part(self) -> Spent:
        """The part that the next event belongs to."""
        place = self.ended * PARTS // max(1, self.trials)
        return self.parts[place] if place < PARTS else self.end


def drive(url: str, folder: str, trials: int, workers: int) -> Driven:
    """Searches until the study has `trials`, or goes on with it; in `folder`, where weights go beside PostgreSQL."""
    os.chdir(folder)
    with Store(url, create=True) as store:
        resume = any(study["name"] == STUDY for study in store.studies())
        config = StudyConfig(study=STUDY, trials=trials, resume=resume, workers=workers, gpus_per_trial=0.0)
        search = open_search(store, prepare(config))
        fleet = Fleet(workers, search.plan.space, Driven(trials - workers))
        outcome = run(search, fleet, Silent())
    if outcome.finished != trials:
        raise RuntimeError(f"only {outcome.finished} of {trials} trials finished")
    fleet.driven.peak = peak_memory()
    return fleet.driven


@dataclass(frozen=True, slots=True)
class _Running:
    """A job on its worker, and what it will report."""

    job: Job
    losses: Sequence[float]  # by rung
    forward_flops: float  # of a token
    flops: float  # of the training


class Fleet:
    """An engine of `workers` that train nothing: a job ends when its curve does, on a simulated clock.

    `wait` hands out one event at a time. Whatever lies between it and the next call is the driver's time, but for what
    the fleet itself takes.
    """

    gpus = 0.0
    memory: float | None = None

    def __init__(self, workers: int, space: Space, driven: Driven) -> None:
        self.workers, self.driven = workers, driven
        self.seen: Mapping[Seen, int] = {Seen("cpu", "float32"): workers}
        self._space = space
        self._curves = list(load_table().recorded.values())
        self._provenance = provenance(torch.device("cpu"))
        self._running: dict[int, _Running] = {}
        self._events: list[tuple[float, int, int, int]] = []  # (when, trial, token, rung that it reaches)
        self._clock = 0.0
        self._last: Event | None = None
        self._process = psutil.Process()
        self._since = Took.now()  # moved on by what the fleet takes itself

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def free(self) -> int:
        return self.workers - len(self._running)

    def submit(self, job: Job) -> None:
        began = Took.now()
        self.driven.first_submit = self.driven.first_submit or time.monotonic()
        total = self._space.cost(self._space.from_json(job.arch)).flops_total
        losses = _losses(self._curve(job), total)
        self._running[job.trial] = _Running(job, losses, total, training_flops(total, job.recipe.tokens))
        self._schedule(job, 0)
        self._leave_out(began)

    def _leave_out(self, began: Took) -> None:
        """Of the driver's time, what the fleet has taken since `began`."""
        self._since.add(Took.now())
        self._since.add(began, -1)

    def _curve(self, job: Job) -> Recorded:
        name = digest({"arch": dict(job.arch), "rate": job.recipe.learning_rate})
        return self._curves[int(name[:8], 16) % len(self._curves)]

    def _schedule(self, job: Job, rung: int) -> None:
        share = 0.0 if rung == len(RUNGS) else RUNGS[rung] - (RUNGS[rung - 1] if rung else 0.0)
        seconds = share * self._running[job.trial].flops / SPEED
        heappush(self._events, (self._clock + seconds, job.trial, job.token, rung))

    def wait(self, timeout: float) -> list[Event]:
        self._note()
        self._last = self._next()
        self._since = Took.now()
        return [] if self._last is None else [self._last]

    def _next(self) -> Event | None:
        while self._events:
            self._clock, trial, token, rung = heappop(self._events)
            running = self._running.get(trial)
            if running is None or running.job.token != token:
                continue  # it was stopped
            if rung == len(RUNGS):
                del self._running[trial]
                return self._result(running)
            self._schedule(running.job, rung + 1)
            share = RUNGS[rung]
            tokens = round(share * running.job.recipe.tokens)
            return Report(trial, rung, tokens, tokens, share * running.flops, running.losses[rung], self._clock)
        return None

    def _result(self, running: _Running) -> Result:
        """The end of a job, whose row is as large as a training's."""
        job, values = running.job, {"bits_per_byte": running.losses[-1], "flops_per_token": running.forward_flops}
        return Result(
            job.trial,
            job.token,
            values={**values, "accuracy": 0.5, "parameters": 1e6},
            parameters=10**6,
            train_seconds=running.flops / SPEED,
            provenance=self._provenance,
            diagnostics={"gate_rates": [0.5] * 4},
            weights=WEIGHTS,
        )

    def _note(self) -> None:
        """Counts the driver's time since the last event to the part of the run that it belongs to."""
        took = Took.now()
        took.add(self._since, -1)
        driven, last = self.driven, self._last
        if last is None:
            driven.start.took.add(took)
            return
        part = driven.part()
        part.took.add(took)
        part.reports += isinstance(last, Report)
        if last.trial in self._running:
            part.continued += 1
            part.continued_took.add(took)
            return
        part.trials += 1
        driven.ended += 1
        if driven.part() is not part:
            part.memory = self._process.memory_info().rss
            spent = f"{part.trial_ms():.2f} ms each, {part.trial_cpu_ms():.2f} on a processor"
            click.echo(f"{driven.ended:,} trials: {spent}, {part.memory_mb():.0f} MB", err=True)

    def stop(self, trial: int) -> None:
        self._running.pop(trial, None)

    def abandon(self) -> None:
        self._note()  # of the last event: nothing is waited for after it
        self._running.clear()

    def close(self) -> None: ...


def _losses(curve: Recorded, flops: float) -> list[float]:
    """A recorded curve, lower for a larger net: its shape is a training's, its height something that can be learnt."""
    height = (1e6 / flops) ** 0.1
    return [height * loss for loss in curve.losses]
