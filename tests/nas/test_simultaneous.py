"""Drivers that start in one instant: on an empty database, on an old one, on a study that neither finds yet."""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from hypernas.config.study_config import StudyConfig
from hypernas.engines.inline import Inline
from hypernas.errors import UserError
from hypernas.launch import run_search
from hypernas.store import Reader, Store
from hypernas.store.connection import parse_url
from hypernas.study import search
from hypernas.study.sweep import sweep

ROUNDS = 3


def at_once(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What `count` threads that begin together return, or are refused with."""
    begin = threading.Barrier(count)

    def run(number: int) -> Any:
        begin.wait()
        try:
            return work(number)
        except UserError as error:
            return error

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(count)))


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_databases(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[str]]:
    if request.param == "sqlite":
        yield [str(tmp_path / f"{number}.db") for number in range(ROUNDS)]
        return
    server = parse_url(request.getfixturevalue("postgres"))
    administrator = create_engine(server, isolation_level="AUTOCOMMIT")
    names = [f"empty{number}" for number in range(ROUNDS)]
    with administrator.connect() as connection:
        for name in names:
            connection.execute(text(f"CREATE DATABASE {name}"))
        yield [server.set(database=name).render_as_string(hide_password=False) for name in names]
        for name in names:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    administrator.dispose()


def test_stores_that_are_created_at_once_are_one(empty_databases: list[str]) -> None:
    def open_store(url: str) -> list[Any]:
        with Store(url, create=True) as store:
            return store.studies()

    for url in empty_databases:
        assert at_once(4, lambda _, url=url: open_store(url)) == [[]] * 4


def test_a_file_that_another_process_makes_tables_in_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "nas.db"
    busy = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    busy.execute("BEGIN IMMEDIATE")  # as if it made the tables; the mode of the log cannot be changed then
    threading.Timer(0.5, busy.rollback).start()
    began = time.monotonic()
    with Store(str(path), create=True) as store:
        assert store.studies() == [] and time.monotonic() - began > 0.4
    busy.close()


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two drivers both find no study, and only then create one."""
    met, original = threading.Barrier(2), search.reference_point

    def meet(*arguments: Any) -> dict[str, float]:
        with suppress(threading.BrokenBarrierError):  # whoever comes third is alone
            met.wait(2)
        return original(*arguments)

    monkeypatch.setattr(search, "reference_point", meet)


def given(store: Store, **more: Any) -> dict[str, Any]:
    url = store.url.render_as_string(hide_password=False)
    settings = {"depth": "1..6", "d_model": "16,32,64", "head_dim": "8", "context": "32"}
    common = {"study": "s", "store": url, "preset": "quick", "engine": "inline", "halving": False, "resume": True}
    return common | {"trials": 6, "settings": settings} | more


@pytest.mark.usefixtures("late")
def test_two_searches_that_begin_a_study_in_one_instant_share_it(store: Store) -> None:
    done = at_once(2, lambda _: run_search(given(store), "trivial")[1].finished)
    assert done == [6, 6]
    with Reader(store.url.render_as_string(hide_password=False)) as reader:
        trials = reader.trials(reader.study("s"))
        assert [trial.number for trial in trials] == [0, 1, 2, 3, 4, 5]
        assert len({trial.driver for trial in trials}) in (1, 2)


@pytest.mark.usefixtures("late")
def test_of_two_that_begin_a_study_with_other_flags_the_later_is_refused(store: Store) -> None:
    done = at_once(2, lambda number: run_search(given(store, seed=number), "trivial")[1].finished)
    assert sorted(isinstance(answer, UserError) for answer in done) == [False, True]
    assert any("was created with seed" in str(answer) for answer in done)
    assert 6 in done


@pytest.mark.usefixtures("late")
def test_two_sweeps_of_one_list_in_one_instant_train_it_once(store: Store) -> None:
    config = StudyConfig(study="s", store=store.shown, preset="quick", settings={"train.tokens": "512"})
    nets = [{"depth": depth, "d_model": 16, "head_dim": 8, "context": 32} for depth in (1, 2)]
    first, second = at_once(2, lambda _: sweep(store, Inline(), config, nets))
    assert [trial.values for trial in first] == [trial.values for trial in second]
    assert len(store.trials(store.study("s"))) == 2
