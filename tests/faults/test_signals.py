"""SIGTERM at any moment, from the first second to the last word, to the process alone and to its group."""

import os
import random
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from hypernas.errors import UserError
from hypernas.records import State
from hypernas.store import Store
from tests.faults.searches import Values, assert_gone, command, family, measured, rounds

STARTING = 1.5  # seconds in which Python itself may still be loading: nothing of ours runs, and nothing has begun


def assert_at_rest(url: str) -> None:
    """Nothing in the store waits for a driver that is gone."""
    with suppress(UserError), Store(url) as store:
        row = store.study("s")
        assert store.states(row)[State.RUNNING] == 0
        assert store.live_drivers(row) == {}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", rounds(4))
@pytest.mark.parametrize("engine", ["inline", "ray"])
@pytest.mark.parametrize("whom", ["process", "group"])
def test_sigterm_at_any_moment_ends_a_search_in_order_and_it_goes_on(
    whom: str,
    engine: str,
    number: int,
    text: str,
    tmp_path: Path,
    undisturbed: Values,
    faults: Counter[str],
) -> None:
    """Twice before the study is there, twice in its trainings, once when there is nothing left but the last word."""
    url, rng = str(tmp_path / "nas.db"), random.Random(f"{whom} {engine} {number}")
    search = command(url, text, "--engine", engine)

    def hit(earliest: float, latest: float) -> None:
        process = subprocess.Popen(
            search, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        moment = rng.uniform(earliest, latest)
        with suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        below = family(process)
        running = process.poll() is None
        if running:
            (os.kill if whom == "process" else os.killpg)(process.pid, signal.SIGTERM)
        said = process.communicate(timeout=120)[1]
        # Where the signal came while Python executed a text (a dataclass), it ends by SIGINT after our last word.
        allowed = (0, 1, -signal.SIGINT, *([-signal.SIGTERM] if moment < STARTING else []))
        assert process.returncode in allowed and "Traceback" not in said, (moment, process.returncode, said[-3000:])
        assert_gone(below)
        assert_at_rest(url)
        faults[f"SIGTERM to the {whom}"] += running

    hit(0.0, 3.0)
    hit(3.0, 6.0)
    hit(6.0, 14.0)
    hit(6.0, 14.0)
    assert subprocess.run(search, capture_output=True, check=False).returncode == 0
    began = time.monotonic()
    assert subprocess.run(search, capture_output=True, check=False).returncode == 0
    hit(0.0, time.monotonic() - began)
    assert measured(url) == undisturbed
    assert faults.total() >= 2
