"""Searches that are hit at random moments, again and again: what they store is what an undisturbed one stores.

A fixed list of architectures (the space's few points at one learning rate) is trained while workers, drivers, the
database server and its connections are killed and the disk for checkpoints fills up. Every trial's values and the front
must equal those of a search that nobody disturbed, bit for bit. `pytest -m slow -s tests/nas/test_faults.py` prints
how many faults of each kind there were.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy.exc import DBAPIError

from hypernas import pareto
from hypernas.bench.postgres import Postgres, throw_away_postgres
from hypernas.errors import UserError
from hypernas.records import State
from hypernas.show.views import Silent
from hypernas.store import Store
from hypernas.store.store import MAX_LOST
from hypernas.study.driver import retrain
from hypernas.study.search import make_job

ASKED = 12  # 3 depths x 2 widths x 2 learning rates
SPACE = {
    "depth": "1..3",
    "d_model": "16,32",
    "head_dim": "8",
    "context": "32",
    "attention.ratio": "1",
    "ffn.shape": "conventional",
    "ffn.ratio": "2",
    "streams.n": "1",
    "gates.placement": "none",
    "optim.lr": "0.003,0.009",
    "train.tokens": "30000",
    "train.batch_tokens": "256",
}
WANTED = int(os.environ.get("NAS_FAULTS", "200"))  # faults in all, over the kinds


def command(url: str, text: str, *extra: str) -> list[str]:
    settings = [part for name, value in (SPACE | {"data.path": text}).items() for part in ("--set", f"{name}={value}")]
    flags = ["--study", "s", "--store", url, "--trials", str(ASKED), "--sampler", "random", "--halving", "off"]
    return [sys.executable, "-m", "hypernas", "search", "--kernels", "reference", "--resume", *flags, *settings, *extra]


def measured(url: str) -> tuple[dict[str, Any], set[str]]:
    """Every trial's values by what it trained, and what stands on the front."""

    def name(trial: Any) -> str:
        return f"{trial.arch_hash} {trial.recipe}"

    with Store(url) as store:
        row = store.study("s")
        trials = store.trials(row)
        assert {trial.state for trial in trials} == {State.COMPLETE}, store.states(row)
        assert [trial.number for trial in trials] == list(range(len(trials)))
        return {name(trial): dict(trial.values) for trial in trials}, {name(trial) for trial in store.front(row)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, text: str) -> tuple[dict[str, Any], set[str]]:
    url = str(tmp_path_factory.mktemp("calm") / "nas.db")
    subprocess.run(command(url, text, "--workers", "2"), check=True, capture_output=True)
    return measured(url)


class Search:
    """A search as a process of its own that is started again until it is done, and what it is hit with."""

    def __init__(self, url: str, text: str, folder: Path, seed: int, *extra: str) -> None:
        self.url, self.rng, self.faults = url, random.Random(seed), Counter[str]()
        self.checkpoints = folder / "checkpoints"
        self._command = command(url, text, "--workers", "2", "--checkpoints", str(self.checkpoints), *extra)
        self.process: subprocess.Popen[str] | None = None
        self._store: Store | None = None  # kept: opening one ten times a second would take a core from the search

    def __enter__(self) -> "Search":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self._store is not None:
            self._store.close()

    def run(self, hit: Callable[["Search"], str | None], seconds: float = 1200) -> None:
        """Runs the search to its end, hitting it at random moments that leave it a rung or two to make."""
        deadline = time.monotonic() + seconds
        wanted = self.rng.choice((1, 2, 3))  # rungs, before the first hit
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                if self.process is not None and self.process.returncode == 0:
                    return
                assert self.process is None or self.process.returncode in (1, 2, -signal.SIGKILL), (
                    self.process.communicate()[1][-3000:]
                )
                self.process = subprocess.Popen(
                    self._command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
                )
            if self.rungs() >= wanted:
                time.sleep(0.4 * self.rng.random())  # a rung takes about as long
                if (kind := hit(self)) is not None:
                    self.faults[kind] += 1
                    wanted = self.rungs() + self.rng.choice((1, 1, 2))
            time.sleep(0.1)
        raise AssertionError(f"not done after {seconds} s and {dict(self.faults)}")

    def rungs(self) -> int:
        """How many rungs the study's trials have reached, as far as the store answers."""
        with suppress(UserError, DBAPIError):
            if self._store is None:
                self._store = Store(self.url)
            return len(self._store.reports(self._store.study("s")))
        return 0


def kill_worker(search: Search) -> str | None:
    """SIGKILL to one of the processes that train; never the third of one trial, which would be set aside."""
    assert search.process is not None
    with Store(search.url) as store:
        if any(trial.attempts >= MAX_LOST - 1 for trial in store.trials(store.study("s"), states=(State.RUNNING,))):
            return None
    with suppress(psutil.Error):
        family = psutil.Process(search.process.pid).children(recursive=True)
        workers = [process for process in family if "_Worker" in " ".join(process.cmdline())]
        if workers:
            search.rng.choice(workers).kill()
            return "worker"
    return None


def kill_node(search: Search) -> str | None:
    """SIGKILL to the raylet: the search's Ray node."""
    assert search.process is not None
    with suppress(psutil.Error):
        for process in psutil.Process(search.process.pid).children(recursive=True):
            if process.name() == "raylet":
                process.kill()
                return "ray node"
    return None


def kill_driver(search: Search) -> str | None:
    assert search.process is not None
    search.process.kill()
    search.process.wait()
    return "driver"


def fill_disk(search: Search) -> str | None:
    """The folder of checkpoints cannot be written for a moment, as on a full disk."""
    folders = list(search.checkpoints.glob("*/checkpoints"))
    if not folders:
        return None
    aside = folders[0].with_name("full")
    with suppress(OSError):
        folders[0].rename(aside)
        folders[0].write_text("no folder any more")
        time.sleep(0.3)
        folders[0].unlink()
        aside.rename(folders[0])
        return "full disk"
    return None


def report(kind: str, faults: Counter[str]) -> None:
    print(f"\n{kind}: {dict(faults)}", flush=True)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_whatever_dies_at_whatever_moment_the_numbers_are_the_undisturbed_ones(
    text: str, tmp_path: Path, undisturbed: tuple[dict[str, Any], set[str]]
) -> None:
    # After a driver or its node, ten seconds go by until there is a search again to hit.
    hits = (*[kill_worker] * 4, *[fill_disk] * 4, kill_driver, kill_node)
    total: Counter[str] = Counter()
    attempt = 0
    while sum(total.values()) < WANTED // 2:
        attempt += 1
        url = str(tmp_path / f"{attempt}.db")
        with Search(url, text, tmp_path / str(attempt), seed=attempt) as search:
            search.run(lambda s: s.rng.choice(hits)(s))
        total += search.faults
        assert measured(url) == undisturbed
        report(f"search {attempt}", search.faults)
    report("faults on SQLite", total)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_with_a_sampler_and_halving_on_the_number_is_exact_and_every_row_trains_again(
    text: str, tmp_path: Path
) -> None:
    """What is proposed follows from what ended when: no two such searches are alike, and each is sound in itself."""
    url, asked = str(tmp_path / "nas.db"), 20  # of 24 that there are
    free = ("--sampler", "evolution", "--halving", "on", "--trials", str(asked), "--set", "optim.lr=0.001..0.01")
    hits = (kill_worker, kill_worker, fill_disk, kill_driver, kill_node)
    with Search(url, text, tmp_path / "files", 1, *free) as search:
        search.run(lambda s: s.rng.choice(hits)(s))
    report("sampler and halving on", search.faults)
    with Store(url) as store:
        row = store.study("s")
        trials = store.trials(row)
        assert [trial.number for trial in trials] == list(range(asked))
        assert {trial.state for trial in trials} == {State.COMPLETE, State.STOPPED}
        complete = [trial for trial in trials if trial.state == State.COMPLETE]
        points = [pareto.costs(row.objectives, trial.values) for trial in complete]
        found = [pareto.costs(row.objectives, trial.values) for trial in store.front(row)]
        assert found == [points[i] for i in pareto.front(points)]
        for trial in complete:
            assert dict(retrain(make_job(store, row, trial), Silent()).values) == dict(trial.values)
    assert sum(search.faults.values()) >= 5


@pytest.fixture
def server() -> Iterator[Postgres]:
    with throw_away_postgres(durable=True) as running:
        yield running


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_database_that_crashes_or_cuts_its_connections_costs_nothing(
    text: str, tmp_path: Path, server: Postgres, undisturbed: tuple[dict[str, Any], set[str]]
) -> None:
    import psycopg

    def cut(search: Search) -> str | None:
        with suppress(psycopg.Error), psycopg.connect(server.url, autocommit=True) as connection:
            query = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
            connection.execute(f"{query} AND backend_type = 'client backend'")
            return "connection"
        return None

    def crash(search: Search) -> str:
        server.kill()
        restart = threading.Timer(10.0, server.start)
        restart.start()
        restart.join()
        return "database server"

    total: Counter[str] = Counter()
    attempt = 0
    while sum(total.values()) < WANTED // 2:
        attempt += 1
        with Search(server.url, text, tmp_path / str(attempt), seed=attempt) as search:
            search.run(lambda s: (crash if s.rng.random() < 0.06 else cut)(s))
        total += search.faults
        assert measured(server.url) == undisturbed
        report(f"search {attempt}", search.faults)
        with suppress(UserError), Store(server.url) as store:
            store.delete_study("s")
    report("faults on PostgreSQL", total)
