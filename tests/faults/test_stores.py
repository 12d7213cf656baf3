"""A store that is deleted, replaced, locked or full while a search runs on it."""

import random
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from hypernas.config.study_config import StudyConfig
from hypernas.engines.inline import Inline
from hypernas.show.views import Silent
from hypernas.store import Store
from hypernas.study.driver import run
from hypernas.study.search import open_search, prepare
from tests.faults.searches import Values, Watch, command, measured, rounds


def search_hit_once(search: list[str], url: str, at: int, happens: Callable[[], None]) -> tuple[int, str]:
    """Runs it; something happens once its trials have made `at` rungs. Exit code and what it said."""
    with subprocess.Popen(search, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        with Watch(url) as watch:
            while watch.rungs() < at and process.poll() is None:
                time.sleep(0.1)
        assert process.poll() is None, process.communicate()[1]
        happens()
        said = process.communicate(timeout=240)[1]
    assert "Traceback" not in said
    return process.returncode, said


@pytest.mark.parametrize("number", rounds(3))
@pytest.mark.parametrize("engine", ["inline", "ray"])
def test_a_search_ends_with_a_sentence_where_its_file_is_deleted_and_leaves_nothing(
    engine: str, number: int, text: str, tmp_path: Path, faults: Counter[str]
) -> None:
    path = tmp_path / "nas.db"
    code, said = search_hit_once(command(str(path), text, "--engine", engine), str(path), 1 + 9 * number, path.unlink)
    assert code in (1, 2) and "was deleted while it was in use" in said
    assert [left.name for left in tmp_path.iterdir() if left.is_file()] == []
    faults["store deleted"] += 1


@pytest.mark.parametrize("number", rounds(3))
@pytest.mark.parametrize("engine", ["inline", "ray"])
def test_a_file_that_takes_the_stores_place_is_left_as_it_was(
    engine: str, number: int, text: str, tmp_path: Path, faults: Counter[str]
) -> None:
    path, other = tmp_path / "nas.db", tmp_path / "other.db"
    with Store(str(other), create=True) as store:
        prepared = prepare(StudyConfig(study="other", trials=3, preset="quick"))
        assert run(open_search(store, prepared, evaluate="trivial"), Inline(), Silent()).finished == 3
    before = other.read_bytes()
    code, said = search_hit_once(
        command(str(path), text, "--engine", engine), str(path), 1 + 9 * number, lambda: other.replace(path) and None
    )
    assert code in (1, 2) and "was replaced by another" in said
    assert path.read_bytes() == before
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()
    faults["store replaced"] += 1


LOCKED_SECONDS = 12.0  # longer than SQLite itself waits at once


@pytest.mark.parametrize("number", rounds(2))
@pytest.mark.parametrize("back_end", ["sqlite", "postgresql"])
def test_a_store_that_another_has_locked_is_waited_for(
    back_end: str,
    number: int,
    text: str,
    tmp_path: Path,
    undisturbed: Values,
    request: pytest.FixtureRequest,
    faults: Counter[str],
) -> None:
    if back_end == "sqlite":
        url = str(tmp_path / "nas.db")

        def lock() -> None:
            connection = sqlite3.connect(url, isolation_level=None)
            connection.execute("BEGIN EXCLUSIVE")
            time.sleep(LOCKED_SECONDS)
            connection.rollback()
            connection.close()
    else:
        url = request.getfixturevalue("served")

        def lock() -> None:
            with psycopg.connect(url) as connection:
                connection.execute("LOCK TABLE trials, reports, drivers IN ACCESS EXCLUSIVE MODE")
                time.sleep(LOCKED_SECONDS)

    search = command(url, text, "--engine", "inline")
    code, said = search_hit_once(search, url, 2 + 17 * number, lambda: threading.Thread(target=lock).start())
    assert code == 0, said[-2000:]
    assert measured(url) == undisturbed
    faults["store locked"] += 1


@pytest.mark.parametrize("small_disk", ["3m"], indirect=True)
@pytest.mark.parametrize("number", rounds(4))
def test_a_full_disk_under_the_store_ends_the_search_with_a_sentence_and_it_goes_on(
    number: int, text: str, small_disk: Path, undisturbed: Values, faults: Counter[str]
) -> None:
    path, rng = small_disk / "nas.db", random.Random(number)
    search = command(str(path), text, "--engine", "inline")

    def fill() -> None:
        with (small_disk / "ballast").open("wb", buffering=0) as ballast:
            for size in (1 << 16, 1 << 12, 1):
                try:
                    while ballast.write(b"\0" * size):
                        pass
                except OSError:
                    continue

    code, said = search_hit_once(search, str(path), rng.randrange(1, 30), fill)
    assert code in (1, 2) and "full" in said, said[-2000:]
    (small_disk / "ballast").unlink()
    assert subprocess.run(search, capture_output=True, check=False).returncode == 0
    assert measured(str(path)) == undisturbed
    faults["store's disk full"] += 1
