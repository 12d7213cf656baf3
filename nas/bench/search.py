"""`nas bench search`: what a trial costs beyond its training.

`overhead`: ours and Ray Tune's in one run. Both drive a trivial objective of six parameters and two objectives, two at
a time; Ray is started before the clock. `growth`: whether a long study's last trials cost what its first did.
"""

import logging
import os
import platform
import sqlite3
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import closing, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from hypernas.bench.postgres import throw_away_postgres
from hypernas.config.study_config import StudyConfig
from hypernas.engines.make import make_executor
from hypernas.engines.protocol import Executor
from hypernas.records import Result
from hypernas.show.views import Silent
from hypernas.store import Store
from hypernas.study.driver import run
from hypernas.study.search import open_search, prepare

WORKERS = 2
LOOK_SECONDS = 0.5
DEFAULT_PEER_TRIALS = 20  # Ray Tune's default takes over a second a trial: fewer say it as well


OURS = (
    ("ray", "nsgaii", "sqlite"),
    ("ray", "tpe", "sqlite"),
    ("ray", "nsgaii", "postgresql"),
    ("tune", "nsgaii", "sqlite"),
    ("inline", "nsgaii", "sqlite"),
)
ALONE = (
    ("nsgaii", "sqlite"),
    ("tpe", "sqlite"),
    ("nsgaii", "postgresql"),
    ("nsgaii", "journal"),
    ("tpe", "journal"),
)


@dataclass(frozen=True, slots=True)
class Took:
    """Milliseconds a trial: on the clock, and of all processors together."""

    wall: float
    cpu: float


def _time(work: Callable[[], None], trials: int) -> Took:
    before, after = _Used(), _Used()
    done = threading.Event()

    def look() -> None:  # again and again: what a process used is not to be had when it has ended
        while not done.wait(LOOK_SECONDS):
            after.look()

    before.look()
    watch = threading.Thread(target=look)
    watch.start()
    began = time.perf_counter()
    try:
        work()
        wall = time.perf_counter() - began
    finally:
        done.set()
        watch.join()
    after.look()
    cpu = sum(seconds - before.seconds.get(process, 0.0) for process, seconds in after.seconds.items())
    return Took(1000 * wall / trials, 1000 * cpu / trials)


class _Used:
    """The processor seconds of this process and of all below it: Ray's, the database server's."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[int, float], float] = {}  # by process id, and when it started: ids are used again

    def look(self) -> None:
        me = psutil.Process()
        for process in (me, *me.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):  # it ended since it was listed: its last look stays
                times = process.cpu_times()
                self.seconds[process.pid, process.create_time()] = times.user + times.system


def overhead(trials: int) -> dict[str, Any]:
    """Milliseconds a trial: each engine, Ray Tune with its own OptunaSearch, Optuna alone; as `nas bench --json`.

    Raises UserError without a PostgreSQL server.
    """
    ours = _our_engines(trials)
    import optuna  # after the pool: Ray reads its settings when it is first imported
    import ray

    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):  # Ray Tune talks on stdout even when told not to
            peers = {
                "ray tune/optuna/default": _tune(min(trials, DEFAULT_PEER_TRIALS)),
                "ray tune/optuna/reused": _tune(trials, reuse=True),
                "ray tune/optuna/reused, no loggers": _tune(trials, reuse=True, loggers=False),
                "ray tune/optuna/reused, no loggers, sqlite": _tune(trials, reuse=True, loggers=False, sqlite=True),
            }
    finally:
        ray.shutdown()
    with throw_away_postgres(durable=True) as server:
        peers |= {
            f"optuna alone/{sampler}/{store}": _optuna(sampler, store, trials, server.url) for sampler, store in ALONE
        }
    rows = [row for name, took in ours.items() for row in _rows(name, took)]
    rows += [row for name, took in peers.items() for row in _rows(name, took, ours["ray/nsgaii/sqlite"])]
    versions = f"python {platform.python_version()}, ray {ray.__version__}, optuna {optuna.__version__}"
    return {"device": f"{platform.machine()}, {WORKERS} workers", "versions": versions, "rows": rows}


def _trivial_engine(engine: str, workers: int) -> Executor:
    return make_executor(engine, workers, address=None, gpus_per_trial=0.0, timeout=None, evaluate="trivial")


def _our_engines(trials: int) -> dict[str, Took]:
    out: dict[str, Took] = {}
    with throw_away_postgres(durable=True) as server:
        for engine, sampler, store in OURS:
            executor = _trivial_engine(engine, WORKERS)
            url = server.url if store == "postgresql" else None
            with closing(executor):
                out[f"{engine}/{sampler}/{store}"] = _ours(executor, sampler, trials, url=url)
                if engine == "tune":  # its actors start with its first trials, as Ray Tune's own; those of `ray` before
                    out[f"{engine}/{sampler}/{store}, actors started"] = _ours(executor, sampler, trials)
    return out


class _Clock(Silent):
    """Notes when each trial ends."""

    def __init__(self) -> None:
        self.ends = [time.perf_counter()]

    def on_end(self, trial: int, result: Result | None) -> None:
        self.ends.append(time.perf_counter())


GROWTH_WINDOW = 100  # trials at each end of the study


def growth(trials: int) -> dict[str, Any]:
    """The median milliseconds of a study's first and last hundred trials, inline on SQLite, `nas bench --json`."""
    rows = []
    for sampler in ("evolution", "nsgaii"):
        clock = _Clock()
        _ours(_trivial_engine("inline", 1), sampler, trials, clock)
        took = [1000 * (after - before) for before, after in pairwise(clock.ends)]
        first, last = (median(part) for part in (took[:GROWTH_WINDOW], took[-GROWTH_WINDOW:]))
        spans = {f"trials 0-{GROWTH_WINDOW}": first, f"trials {trials - GROWTH_WINDOW}-{trials}": last}
        rows += [
            {
                "name": "median_per_trial",
                "backend": f"inline/{sampler}/sqlite, {name}",
                "value": ms,
                "unit": "ms",
                "baseline": None if ms == first else f"trials 0-{GROWTH_WINDOW}",
                "ratio": None if ms == first else ms / first,
            }
            for name, ms in spans.items()
        ]
    return {"device": platform.machine(), "versions": f"python {platform.python_version()}", "rows": rows}


def _rows(backend: str, took: Took, ours: Took | None = None) -> list[dict[str, Any]]:
    base = ours or took
    return [
        {
            "name": name,
            "backend": backend,
            "value": ms,
            "unit": "ms",
            "baseline": ours and "ray/nsgaii/sqlite",
            "ratio": ours and ms / of,
        }
        for name, ms, of in (("overhead_per_trial", took.wall, base.wall), ("cpu_per_trial", took.cpu, base.cpu))
    ]


def _ours(executor: Executor, sampler: str, trials: int, view: Silent | None = None, url: str | None = None) -> Took:
    """On a SQLite file of its own, or the database at `url`."""
    with tempfile.TemporaryDirectory() as folder, Store(url or str(Path(folder) / "bench.db"), create=True) as store:
        config = StudyConfig(study="bench", sampler=sampler, trials=trials, preset="quick")
        search = open_search(store, prepare(config), evaluate="trivial")

        def whole() -> None:
            outcome = run(search, executor, view or Silent())
            if outcome.finished != trials:
                raise RuntimeError(f"only {outcome.finished} of {trials} trials finished")

        return _time(whole, trials)


def _optuna(sampler: str, store: str, trials: int, server: str) -> Took:
    """Optuna's own loop, one trial at a time in this process, on its own storages."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        _tune_space(trial)
        found = _trivial_trainable(trial.params)
        return found["loss"], found["flops"]

    with tempfile.TemporaryDirectory() as folder:
        storage: optuna.storages.BaseStorage
        if store == "journal":
            storage = optuna.storages.JournalStorage(JournalFileBackend(f"{folder}/journal"))
        else:
            storage = optuna.storages.RDBStorage(_ahead(folder) if store == "sqlite" else server)
        samplers = {"nsgaii": optuna.samplers.NSGAIISampler, "tpe": optuna.samplers.TPESampler}
        study = optuna.create_study(
            study_name=sampler, storage=storage, sampler=samplers[sampler](seed=0), directions=["minimize"] * 2
        )
        return _time(partial(study.optimize, objective, n_trials=trials), trials)


def _ahead(folder: str) -> str:
    """The URL of a SQLite file in write-ahead mode, as ours is; a file keeps its mode."""
    with closing(sqlite3.connect(f"{folder}/optuna.db")) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    return f"sqlite:///{folder}/optuna.db"


def _trivial_trainable(config: dict[str, Any]) -> dict[str, float]:
    size = float(config["depth"] * config["d_model"])
    return {"loss": 8.0 / size + config["lr"], "flops": size}


def _tune_space(trial: Any) -> None:
    trial.suggest_int("depth", 2, 4)
    trial.suggest_categorical("d_model", [64, 96, 128])
    trial.suggest_categorical("lr", [1e-3, 3e-3, 9e-3])
    for name in ("ffn", "streams", "gates"):
        trial.suggest_categorical(name, list(range(6)))


def _tune(trials: int, *, reuse: bool = False, loggers: bool = True, sqlite: bool = False) -> Took:
    """Ray Tune with its OptunaSearch on a space of the same size, at its best setting but for what is named."""
    import optuna
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "0" if loggers else "1"
    warnings.filterwarnings("ignore", category=FutureWarning)

    with tempfile.TemporaryDirectory() as folder:
        storage = optuna.storages.RDBStorage(_ahead(folder)) if sqlite else None
        search = OptunaSearch(_tune_space, metric=["loss", "flops"], mode=["min", "min"], storage=storage)
        tuner = tune.Tuner(
            tune.with_resources(_trivial_trainable, {"cpu": 1}),
            tune_config=tune.TuneConfig(
                num_samples=trials, search_alg=search, max_concurrent_trials=WORKERS, reuse_actors=reuse
            ),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        )

        def whole() -> None:
            results = tuner.fit()
            if len(results) != trials or results.num_errors:
                raise RuntimeError(
                    f"Ray Tune finished {len(results)} of {trials} trials, {results.num_errors} in error"
                )

        return _time(whole, trials)
