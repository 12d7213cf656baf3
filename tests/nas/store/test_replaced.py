"""A store's file that goes away under a running search: nothing more is written, and least of all into another's."""

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from hypernas.config.study_config import StudyConfig
from hypernas.engines.inline import Inline
from hypernas.errors import StoreError
from hypernas.records import Job
from hypernas.show.views import Silent
from hypernas.store import Reader, Store
from hypernas.study.driver import run
from hypernas.study.search import open_search, prepare


class Meanwhile(Inline):
    """Inline, but `happens` while trial 2 is being trained."""

    def __init__(self, happens: Callable[[], object]) -> None:
        super().__init__()
        self._happens = happens

    def submit(self, job: Job) -> None:
        super().submit(job)
        if job.trial == 2:
            self._happens()


def search_while(folder: Path, happens: Callable[[], object]) -> None:
    with Store(str(folder / "nas.db"), create=True) as store:
        search = open_search(store, prepare(StudyConfig(study="s", trials=5, preset="quick")), evaluate="trivial")
        run(search, Meanwhile(happens), Silent())


def other_store(folder: Path) -> Path:
    """Another study's store, of more pages than the first's."""
    path = folder / "other.db"
    with Store(str(path), create=True) as store:
        search = open_search(store, prepare(StudyConfig(study="other", trials=3, preset="quick")), evaluate="trivial")
        run(search, Inline(), Silent())
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE padding AS SELECT randomblob(200000) AS bytes")
    connection.close()
    return path


def contents(path: Path) -> list[str]:
    with sqlite3.connect(f"file:{path}?immutable=1", uri=True) as connection:
        lines = list(connection.iterdump())
    connection.close()
    return lines


def test_a_file_that_is_deleted_ends_the_search(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="was deleted while it was in use") as ended:
        search_while(tmp_path, (tmp_path / "nas.db").unlink)
    assert not ended.value.missing
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []


def test_a_file_that_is_replaced_ends_the_search_and_the_new_one_is_left_as_it_was(tmp_path: Path) -> None:
    other = other_store(tmp_path)
    before = contents(other)
    with pytest.raises(StoreError, match="was replaced by another while it was in use"):
        search_while(tmp_path, lambda: other.replace(tmp_path / "nas.db"))
    assert contents(tmp_path / "nas.db") == before
    with Reader(str(tmp_path / "nas.db")) as reader:  # which also reads a log beside it, if there is one
        assert [study["name"] for study in reader.studies()] == ["other"]
    with sqlite3.connect(tmp_path / "nas.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


def test_a_file_that_is_moved_away_keeps_what_was_stored_and_goes_on_where_it_is(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="deleted"):
        search_while(tmp_path, lambda: (tmp_path / "nas.db").rename(tmp_path / "moved.db"))
    with Store(str(tmp_path / "moved.db")) as store:
        config = StudyConfig(study="s", trials=5, preset="quick", resume=True, store=store.shown)
        assert {trial.number for trial in store.trials(store.study("s"))} == {0, 1, 2}
        for driver in store.live_drivers(store.study("s")):
            store.stop_driver(driver)  # the first search's, which this process outlives here
        assert run(open_search(store, prepare(config)), Inline(), Silent()).finished == 5


def test_a_new_search_on_a_file_of_that_name_keeps_its_log(tmp_path: Path) -> None:
    opened: list[Store] = []

    def start_anew() -> None:
        for path in tmp_path.glob("nas.db*"):
            path.unlink()
        opened.append(Store(str(tmp_path / "nas.db"), create=True))

    with pytest.raises(StoreError, match="replaced by another"):
        search_while(tmp_path, start_anew)
    log = tmp_path / "nas.db-wal"
    assert log.exists()
    prepared = prepare(StudyConfig(study="new", trials=2, preset="quick"))
    with opened[0] as store:
        assert run(open_search(store, prepared, evaluate="trivial"), Inline(), Silent()).finished == 2
    with Reader(str(tmp_path / "nas.db")) as reader:
        assert reader.states(reader.study("new"))["COMPLETE"] == 2


def test_a_copy_in_the_place_of_the_last_word_is_not_reported_on(tmp_path: Path) -> None:
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        search = open_search(store, prepare(StudyConfig(study="s", trials=2, preset="quick")), evaluate="trivial")
        assert run(search, Inline(), Silent()).finished == 2
    shutil.copy(tmp_path / "nas.db", tmp_path / "copy.db")
    (tmp_path / "copy.db").replace(tmp_path / "nas.db")
    with pytest.raises(StoreError, match="replaced"):
        store.check_held()
