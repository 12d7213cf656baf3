"""A store behind a pooler in transaction mode, where no two transactions need have the same session."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from hypernas.cli.main import main
from hypernas.config.study_config import StudyConfig
from hypernas.engines.inline import Inline
from hypernas.show.status import status_of
from hypernas.show.views import Silent
from hypernas.store import Reader, Store
from hypernas.store.connection import parse_url
from hypernas.study.driver import run
from hypernas.study.search import open_search, prepare
from tests.nas.store.poolers import pgbouncer, switching_pooler

READS = 8  # psycopg prepares a statement that it has run five times


@pytest.fixture(params=[switching_pooler, pgbouncer])
def pooled(request: pytest.FixtureRequest, postgres: str) -> Iterator[str]:
    """The URL of an empty database behind a pooler."""
    pooler: Callable[[str, str], AbstractContextManager[str]] = request.param
    administrator = create_engine(parse_url(postgres), isolation_level="AUTOCOMMIT")
    with administrator.connect() as connection:
        connection.execute(text("CREATE DATABASE pooled"))
        try:
            with pooler(postgres, "pooled") as url:
                yield url
        finally:
            connection.execute(text("DROP DATABASE pooled WITH (FORCE)"))
            administrator.dispose()


def test_a_search_behind_a_pooler_ends_and_is_resumed(pooled: str) -> None:
    for trials, resume in ((6, False), (8, True)):
        config = StudyConfig(study="s", trials=trials, preset="quick", resume=resume)
        with Store(pooled, create=True) as store:
            assert run(open_search(store, prepare(config), evaluate="trivial"), Inline(), Silent()).finished == trials


def test_who_looks_behind_a_pooler_may_look_as_often_as_they_like(pooled: str) -> None:
    with Store(pooled, create=True) as store, Reader(pooled) as reader:
        search = open_search(store, prepare(StudyConfig(study="s", trials=3, preset="quick")), evaluate="trivial")
        run(search, Inline(), Silent())
        for _ in range(READS):
            assert status_of(reader, reader.study("s"))["states"]["COMPLETE"] == 3
            assert [trial.number for trial in store.trials(search.row)] == [0, 1, 2]


@pytest.mark.slow
def test_a_study_goes_through_a_pooler_into_optunas_database_and_back(pooled: str, tmp_path: Path) -> None:
    here, back = str(tmp_path / "nas.db"), str(tmp_path / "back.db")
    with Store(here, create=True) as store:
        search = open_search(store, prepare(StudyConfig(study="s", trials=READS, preset="quick")), evaluate="trivial")
        run(search, Inline(), Silent())
    assert main(["study", "export", "s", "--store", here, "--to", pooled]) == 0
    assert main(["study", "import", "--store", back, "--from", pooled]) == 0
    with Reader(back) as store:
        assert store.finished(store.study("s")) == READS
