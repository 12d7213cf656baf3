"""Two drivers that begin in one instant, processes of their own, fifty times on each kind of store."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from hypernas.bench.postgres import Postgres
from hypernas.store import Reader
from hypernas.store.connection import parse_url
from tests.faults.searches import rounds

# Reads the address of an empty store a line, and searches it; `given` is what it is told on its command line.
DRIVER = """
import sys
from hypernas.launch import run_search
keys = {"depth": "1..6", "d_model": "16,32,64", "head_dim": "8", "context": "32"}
given = {"study": "s", "preset": "quick", "engine": "inline", "halving": False, "resume": True, "trials": 6}
print("ready", flush=True)
for line in sys.stdin:
    print(run_search(given | {"store": line.strip(), "settings": keys}, "trivial")[1].finished, flush=True)
"""
STARTS = 10  # a test


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[int], str]:
    """Addresses of stores that nobody has opened yet."""
    if request.param == "sqlite":
        return lambda number: str(tmp_path / f"{number}.db")
    server: Postgres = request.getfixturevalue("server")

    def create(number: int) -> str:
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS empty{number} WITH (FORCE)")
            connection.execute(f"CREATE DATABASE empty{number}")
        return parse_url(server.url).set(database=f"empty{number}").render_as_string(hide_password=False)

    return create


@pytest.fixture
def drivers() -> Iterator[list[subprocess.Popen[str]]]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    two: list[subprocess.Popen[str]] = [subprocess.Popen([sys.executable, "-c", DRIVER], **pipes) for _ in range(2)]  # type: ignore[call-overload]
    for driver in two:
        assert driver.stdout.readline() == "ready\n"  # type: ignore[union-attr]
    yield two
    for driver in two:
        driver.kill()
        driver.communicate()


@pytest.mark.parametrize("number", rounds(5))
def test_two_drivers_that_begin_in_one_instant_share_one_study(
    number: int, empty: Callable[[int], str], drivers: list[subprocess.Popen[str]], faults: Counter[str]
) -> None:
    for start in range(STARTS):
        url = empty(number * STARTS + start)
        for driver in drivers:
            print(url, file=driver.stdin, flush=True)
        finished = [driver.stdout.readline().strip() for driver in drivers]  # type: ignore[union-attr]
        said = [driver.communicate()[1][-2000:] for driver in drivers] if "" in finished else []
        assert finished == ["6", "6"], said
        with Reader(url) as reader:
            (study,) = reader.studies()
            trials = reader.trials(reader.study("s"))
        assert study["name"] == "s" and [trial.number for trial in trials] == list(range(6))
        assert len({(trial.arch_hash, str(trial.recipe)) for trial in trials}) == 6
        faults["simultaneous starts"] += 1
