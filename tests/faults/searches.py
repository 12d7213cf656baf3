"""A search that is hit: what is searched, what hits it, and what must be stored in the end.

A fixed list of architectures (the space's few points at two learning rates) is trained, so that every trial's values
and the front must equal those of a search that nobody disturbed, bit for bit.
"""

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy.exc import DBAPIError

from hypernas.errors import UserError
from hypernas.records import State
from hypernas.store import Store

Values = tuple[dict[str, Any], set[str]]  # what `measured` returns

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


def rounds(count: int) -> list[Any]:
    """A test's numbers: all of them are of `make test-faults`, the first also of `make test-slow`."""
    first, *others = range(count)
    marks = pytest.mark.faults
    return [pytest.param(first, marks=(marks, pytest.mark.slow)), *(pytest.param(n, marks=marks) for n in others)]


def command(url: str, text: str, *extra: str, **changed: str) -> list[str]:
    """A search of SPACE, begun or continued."""
    keys = SPACE | {"data.path": text} | changed
    settings = [part for name, value in keys.items() for part in ("--set", f"{name}={value}")]
    flags = ["--study", "s", "--store", url, "--trials", str(ASKED), "--sampler", "random", "--halving", "off"]
    return [sys.executable, "-m", "hypernas", "search", "--kernels", "reference", "--resume", *flags, *settings, *extra]


def measured(url: str) -> Values:
    """Every trial's values by what it trained, and what stands on the front."""

    def name(trial: Any) -> str:
        return f"{trial.arch_hash} {trial.recipe}"

    with Store(url) as store:
        row = store.study("s")
        trials = store.trials(row)
        assert {trial.state for trial in trials} == {State.COMPLETE}, store.states(row)
        assert [trial.number for trial in trials] == list(range(len(trials)))
        return {name(trial): dict(trial.values) for trial in trials}, {name(trial) for trial in store.front(row)}


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes below it, in whatever sessions they are."""
    with suppress(psutil.Error):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert alive == [], [process.cmdline() for process in alive]


class Watch:
    """How far a study is, as its store says: that is kept open, as to open one ten times a second takes a core."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._store: Store | None = None

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        if self._store is not None:
            self._store.close()

    def rungs(self) -> int:
        """How many rungs the study's trials have reached, as far as the store answers."""
        with suppress(UserError, DBAPIError):
            if self._store is None:
                self._store = Store(self._url)
            return len(self._store.reports(self._store.study("s")))
        return 0


class Search:
    """A search as a process of its own that is started again until it is done, and what it is hit with."""

    def __init__(self, url: str, text: str, folder: Path, seed: int, *extra: str) -> None:
        self.url, self.rng, self.faults = url, random.Random(seed), Counter[str]()
        self.checkpoints = folder / "checkpoints"
        self._command = command(url, text, "--workers", "2", "--checkpoints", str(self.checkpoints), *extra)
        self.process: subprocess.Popen[str] | None = None
        self._watch = Watch(url)

    def __enter__(self) -> "Search":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._watch.__exit__()

    def run(self, hit: Callable[["Search"], str | None], seconds: float = 1200) -> None:
        """Runs the search to its end, hitting it at random moments that leave it a rung or two to make."""
        deadline = time.monotonic() + seconds
        wanted = self.rng.choice((1, 2, 3))  # rungs, before the first hit
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                if self.process is not None:
                    if self.process.returncode == 0:
                        return
                    self._check_end()
                self.process = subprocess.Popen(
                    self._command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
                )
            if self._watch.rungs() >= wanted:
                time.sleep(0.4 * self.rng.random())  # a rung takes about as long
                if (kind := hit(self)) is not None:
                    self.faults[kind] += 1
                    wanted = self._watch.rungs() + self.rng.choice((1, 1, 2))
            time.sleep(0.1)
        raise AssertionError(f"not done after {seconds} s and {dict(self.faults)}")

    def _check_end(self) -> None:
        """It was killed, or says in a sentence how to go on."""
        assert self.process is not None
        said = self.process.communicate()[1]
        assert self.process.returncode in (1, 2, -signal.SIGKILL), said[-3000:]
        assert "Traceback" not in said, said[-3000:]
        assert self.process.returncode < 0 or "ontinue" in said or "--resume" in said, said[-3000:]


def kill_worker(search: Search) -> str | None:
    """SIGKILL to one of the processes that train."""
    assert search.process is not None
    with suppress(psutil.Error):
        workers = [process for process in family(search.process) if "_Worker" in " ".join(process.cmdline())]
        if workers:
            search.rng.choice(workers).kill()
            return "worker killed"
    return None


def kill_server(name: str, kind: str) -> Callable[[Search], str | None]:
    """SIGKILL to a server of the search's private Ray node."""

    def kill(search: Search) -> str | None:
        assert search.process is not None
        below = family(search.process)
        with suppress(psutil.Error):
            for process in below:
                if process.name() == name:
                    process.kill()
                    search.process.wait(60)
                    assert_gone(below)
                    return kind
        return None

    return kill


kill_raylet = kill_server("raylet", "raylet killed")
kill_gcs = kill_server("gcs_server", "gcs killed")


def kill_driver(search: Search) -> str | None:
    assert search.process is not None
    search.process.kill()
    search.process.wait()
    return "driver killed"


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
        return "checkpoints' disk full"
    return None
