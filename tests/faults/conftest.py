"""The fault suite: hundreds of faults, whose hours can be spent in pieces.

`make test-faults` runs all of it and names a file in NAS_FAULTS, where each test that passes leaves its line: started
again on the same code, the suite goes on with the rest. `make test-slow` runs the first round of each kind. Either
prints how many faults of each kind there were.
"""

import hashlib
import json
import os
import subprocess
from collections import Counter
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hypernas.bench.postgres import Postgres, throw_away_postgres
from hypernas.errors import UserError
from hypernas.store import Store
from tests.faults.searches import Values, command, measured

ROOT = Path(__file__).parents[2]
LEDGER = os.environ.get("NAS_FAULTS")
COUNTS: pytest.StashKey[Counter[str]] = pytest.StashKey()
passed: dict[str, Counter[str]] = {}  # by the test's id: what it did


@cache
def key() -> str:
    """What the ledger's lines hold for: all code, that of these tests too."""
    found = hashlib.sha256()
    for folder in ("nas", "kernels", "search_spaces", "tests/faults"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if LEDGER and Path(LEDGER).exists():
        lines = [json.loads(line) for line in Path(LEDGER).read_text().splitlines()]
        passed.update({line["test"]: Counter(line["faults"]) for line in lines if line["code"] == key()})
    for item in items:
        if item.nodeid in passed:
            item.add_marker(pytest.mark.skip(reason="has passed on this code before"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if call.when == "call" and report.passed and COUNTS in item.stash:
        passed[item.nodeid] = item.stash[COUNTS]
        if LEDGER:
            line = {
                "test": item.nodeid,
                "code": key(),
                "faults": item.stash[COUNTS],
                "seconds": round(call.duration, 1),
            }
            with Path(LEDGER).open("a") as file:
                file.write(json.dumps(line) + "\n")
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    total = sum(passed.values(), Counter())
    if total:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(total.items()))
        terminalreporter.write_line(f"{total.total()} faults survived: {kinds}")


@pytest.fixture
def faults(request: pytest.FixtureRequest) -> Counter[str]:
    """What the test did, by kind; it counts if the test passes."""
    counted: Counter[str] = Counter()
    request.node.stash[COUNTS] = counted
    return counted


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, text: str) -> Values:
    """What the search of `command` stores where nobody disturbs it: values and front."""
    url = str(tmp_path_factory.mktemp("calm") / "nas.db")
    subprocess.run(command(url, text, "--engine", "inline"), check=True, capture_output=True)
    return measured(url)


@pytest.fixture(scope="session")
def server() -> Iterator[Postgres]:
    """A PostgreSQL that waits for the disk, and may be killed."""
    try:
        with throw_away_postgres(durable=True) as running:
            yield running
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def served(server: Postgres) -> Iterator[str]:
    """Its address, where no study of `command` is yet, nor afterwards."""

    def clear() -> None:
        with Store(server.url, create=True) as store:
            if any(study["name"] == "s" for study in store.studies()):
                store.delete_study("s")

    clear()
    yield server.url
    clear()
