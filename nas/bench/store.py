"""`nas bench store`: what the store costs a search, and what Optuna's own storage costs it on the same server.

Each number is of a whole trial (lease, result, front) of two objectives; the objective itself takes no time.
"""

import multiprocessing
import os
import platform
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import event

from hypernas.bench.postgres import throw_away_postgres
from hypernas.records import Proposal, Recipe, Report, Result, SpaceSpec, State, StudySettings, Trial
from hypernas.search_spaces.base import digest
from hypernas.store import Store
from hypernas.store.store import Filled

DRIVERS = 4
COUNTED = (100, 300)  # trials of the shorter and the longer search
LARGE_TRIALS, LARGE_REPORTS = 10_000, 10
OBJECTIVES = ("bits_per_byte", "flops_per_token")
LIMIT = 10**6


def measure(url: str | None, seconds: float) -> dict[str, Any]:
    """Every row of `nas bench store`, as `nas bench --json` has them. Raises UserError without a PostgreSQL."""
    rows = _statements()
    with throw_away_postgres(durable=True) if url is None else nullcontext() as server:
        address = server.url if server is not None else str(url)
        ours = _together(_our_driver, address, seconds)
        theirs = _together(_optuna_driver, address, seconds)
    rows += [
        _row("trials_together", f"{DRIVERS} inline drivers/postgresql", ours[0], "trials/s"),
        _row("trial_p99", f"{DRIVERS} inline drivers/postgresql", ours[1], "ms"),
        _row("trials_together", f"{DRIVERS} optuna processes/postgresql", theirs[0], "trials/s", ours[0]),
        _row("trial_p99", f"{DRIVERS} optuna processes/postgresql", theirs[1], "ms", ours[1]),
    ]
    rows += _large()
    return {
        "device": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "versions": f"python {platform.python_version()}, SQLite {sqlite3.sqlite_version}",
        "rows": rows,
    }


def _row(name: str, backend: str, value: float, unit: str, ours: float | None = None) -> dict[str, Any]:
    ratio = None if ours is None else value / ours
    return {
        "name": name,
        "backend": backend,
        "value": value,
        "unit": unit,
        "baseline": None if ours is None else f"{DRIVERS} inline drivers/postgresql",
        "ratio": ratio,
    }


def _study(store: Store, name: str, trials: Sequence[Filled] = ()) -> Any:
    return store.create_study(
        name,
        space=SpaceSpec("lm"),
        objectives=OBJECTIVES,
        settings=StudySettings.of({"trials": LIMIT, "task": "text"}),
        reference={"bits_per_byte": 8.0, "flops_per_token": 9.0},
        data_name="none",
        data_hash="",
        trials=trials,
    )


# ---- statements ----------------------------------------------------------------------------------------------


def _statements() -> list[dict[str, Any]]:
    """SQL statements and transactions that a search sends for a trial without rungs, counted at the database's door.

    What opening and closing a study takes is not a trial's: a longer search less a shorter one.
    """
    short, long = (_sent(trials) for trials in COUNTED)
    more = COUNTED[1] - COUNTED[0]
    began = long["transactions"] - short["transactions"]
    statements = long["statements"] - short["statements"] - began  # BEGIN is a statement of its own to SQLite
    return [
        _row("statements_per_trial", "inline/nsgaii/sqlite", statements / more, "statements"),
        _row("transactions_per_trial", "inline/nsgaii/sqlite", began / more, "transactions"),
    ]


def _sent(trials: int) -> dict[str, int]:
    """The statements and transactions of a whole search."""
    from hypernas.config.study_config import StudyConfig
    from hypernas.engines.inline import Inline
    from hypernas.show.views import Silent
    from hypernas.study.driver import run
    from hypernas.study.search import open_search, prepare

    counts = {"statements": 0, "transactions": 0}

    def count(name: str) -> None:
        counts[name] += 1

    with tempfile.TemporaryDirectory() as folder, Store(str(Path(folder) / "nas.db"), create=True) as store:
        search = open_search(
            store,
            prepare(StudyConfig(study="bench", trials=trials, preset="quick")),
            evaluate="trivial",
        )
        event.listen(store._engine, "before_cursor_execute", lambda *_: count("statements"))
        event.listen(store._engine, "commit", lambda *_: count("transactions"))
        run(search, Inline(gpus_per_trial=0), Silent())
    return counts


# ---- several writers -----------------------------------------------------------------------------------------


def _together(driver: Any, url: str, seconds: float) -> tuple[float, float]:
    """Trials a second of DRIVERS processes on one study, and the 99th percentile of a trial in milliseconds."""
    context = multiprocessing.get_context("spawn")
    name = f"bench-{digest({'at': time.time_ns()})}"
    driver(url, name, 0.0, -1)  # creates the study
    with context.Pool(DRIVERS) as pool:
        taken = pool.starmap(driver, [(url, name, seconds, number) for number in range(DRIVERS)])
    every = sorted(took for process in taken for took in process)
    return len(every) / seconds, 1000 * every[int(0.99 * (len(every) - 1))]


def _our_driver(url: str, name: str, seconds: float, number: int) -> list[float]:
    """Leases and finishes trials for so long; what each took, in seconds."""
    with Store(url, create=True) as store:
        if number < 0:
            _study(store, name)
            return []
        study = store.study(name)
        driver = store.start_driver(study, 1)
        taken, seen, i = [], 0, 0
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            i += 1
            config = f"{number}-{i}"
            proposal = Proposal({"depth": i}, {"depth": i}, config, config, Recipe(1e-3), "sampler", {})
            trial = store.lease_new(study, driver, proposal, LIMIT)
            assert trial is not None
            loss = 1.0 + (i * 7919 % 1000) / 1000
            values = {"bits_per_byte": loss, "flops_per_token": 1e6 / loss + i % 97}
            store.finish(study, Result(trial.number, trial.token, values, parameters=1))
            seen = max((t.seq for t in store.trials(study, after=seen)), default=seen)  # what the others did
            taken.append(time.perf_counter() - start)
        store.stop_driver(driver)
        return taken


def _optuna_driver(url: str, name: str, seconds: float, number: int) -> list[float]:
    """The same with Optuna's own storage and NSGA-II, asked and told."""
    import optuna
    import psycopg

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if number < 0:  # its tables are called as ours: they need a schema of their own
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE SCHEMA IF NOT EXISTS optuna")
    address = url.replace("postgresql://", "postgresql+psycopg://", 1)
    storage = optuna.storages.RDBStorage(address, engine_kwargs={"connect_args": {"options": "-csearch_path=optuna"}})
    study = optuna.create_study(
        storage=storage,
        study_name=f"{name}-optuna",
        directions=["minimize", "minimize"],
        sampler=optuna.samplers.NSGAIISampler(seed=max(number, 0)),
        load_if_exists=True,
    )
    taken = []
    end = time.perf_counter() + seconds
    while number >= 0 and (start := time.perf_counter()) < end:
        trial = study.ask()
        x = trial.suggest_float("x", 0.0, 1.0)
        study.tell(trial, [x, 1 - x])
        taken.append(time.perf_counter() - start)
    return taken


# ---- a large study -------------------------------------------------------------------------------------------


# `nas` with the arguments of the command line, and its peak memory as the last word on stderr.
PRINT_FRONT = """
import sys
from hypernas.cli.main import main
main(sys.argv[1:])
from hypernas.bench.store import peak_memory
print(peak_memory(), file=sys.stderr)
"""


def peak_memory() -> float:
    """This process's peak in MB. On Linux from /proc: the rusage of a child starts at the peak of its parent."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _large() -> list[dict[str, Any]]:
    """Seconds and memory of `nas front`, as a process of its own, over a study of LARGE_TRIALS trials."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "large.db")
        with Store(path, create=True) as store:
            fill_large(store, "large", LARGE_TRIALS, LARGE_REPORTS)
        command = [sys.executable, "-c", PRINT_FRONT, "front", "--study", "large", "--store", path]
        start = time.perf_counter()
        printed = subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - start
    peak = float(printed.stderr.split()[-1])
    what = f"{LARGE_TRIALS:,} trials of {LARGE_REPORTS} reports/sqlite"
    return [_row("open_and_print_front", what, seconds, "s"), _row("open_and_print_front_memory", what, peak, "MB")]


def fill_large(store: Store, name: str, trials: int, reports: int) -> None:
    """A study of made-up trials, all COMPLETE, whose losses scatter over a front of FLOPs."""
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    _study(store, name, [_made_up(i, reports, begin + timedelta(seconds=i)) for i in range(trials)])


def _made_up(i: int, reports: int, at: datetime) -> Filled:
    flops = 1e6 * (1 + i * 7919 % 1000)
    loss = 1.5 + 30 / (flops / 1e6 + 20) + (i * 104729 % 1000) / 1000
    arch = {"family": "transformer", "depth": 2 + i % 7, "d_model": 64 * (1 + i % 8), "ffn.shape": "conventional"}
    arch |= {"ffn.ratio": 4.0, "attention.ratio": 1.0, "streams.n": 1, "gates.placement": "none"}
    trial = Trial(
        number=i,
        state=State.COMPLETE,
        params={"depth": 2 + i % 7, "width": i % 8},
        arch=arch,
        arch_hash=f"{i:016x}",
        recipe=Recipe(3e-3),
        origin="baseline" if i == 0 else "sampler",
        sampler_attrs={"nsga2:generation": i // 100},
        token=1,
        attempts=1,
        values={"bits_per_byte": loss, "flops_per_token": flops, "accuracy": 0.5, "parameters": 1e6},
        parameters=10**6,
        driver=None,
        worker="here",
        created=at,
        started=at,
        finished=at,
        train_seconds=1.0,
        evaluate_seconds=0.1,
        provenance={"torch": "2.13", "device": "cpu"},
        diagnostics={},
        failure=None,
        seq=0,
    )
    curve = [Report(i, rung, rung + 1, 1000 * (rung + 1), 1e9, loss + 1 / (rung + 1), 0.1) for rung in range(reports)]
    return trial, f"{i:016x}", curve
