"""Stores of other versions: looked at as they are, brought up to date by who writes, refused where they are newer."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, insert, text

from hypernas import store as package
from hypernas.errors import StoreError
from hypernas.store import Reader, Store
from hypernas.store.connection import parse_url
from hypernas.store.models import SCHEMA, DriverTable
from hypernas.store.statements import STUDIES, utcnow

SETTINGS = {"trials": 3, "of_another_time": [1, 2]}
STUDY = {
    "name": "old",
    "space": "lm",
    "space_settings": {},
    "objectives": ["bits_per_byte", "flops_per_token"],
    "reference": {"bits_per_byte": 8.0, "flops_per_token": 9.0},
    "data_name": "words",
    "data_hash": "0" * 64,
    "artifacts": "",
    "next_number": 0,
    "seq": 0,
}


OLD = ("0001", "0002")


@pytest.fixture(params=[(kind, schema) for kind in ("sqlite", "postgresql") for schema in OLD], ids="-".join)
def old_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a store as an older version wrote it, with one study."""
    kind, schema = request.param
    if kind == "sqlite":
        write_old_store(url := str(tmp_path / "old.db"), schema)
        yield url
        return
    server = parse_url(request.getfixturevalue("postgres"))
    administrator = create_engine(server, isolation_level="AUTOCOMMIT")
    with administrator.connect() as connection:
        connection.execute(text("CREATE DATABASE old"))
        write_old_store(url := server.set(database="old").render_as_string(hide_password=False), schema)
        yield url
        connection.execute(text("DROP DATABASE old WITH (FORCE)"))
    administrator.dispose()


def write_old_store(url: str, schema: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(package.__file__).parent / "migrations"))
    engine = create_engine(parse_url(url))
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, schema)
        connection.execute(insert(STUDIES), STUDY | {"created": utcnow(), "settings": settings_in(schema)})
        times = {name: utcnow() for name in ("started", "heartbeat")}
        connection.execute(
            insert(DriverTable).values(study_id=1, host="h", pid=1, process_started=1.7e9, workers=3, **times)
        )
        connection.commit()
    engine.dispose()


def settings_in(schema: str) -> dict[str, Any]:
    """The study's settings as a version wrote them."""
    return SETTINGS | {"evaluate": "nas.train:evaluate" if schema == "0001" else "training"}


def version_of(url: str) -> str:
    engine = create_engine(parse_url(url))
    with engine.connect() as connection:
        found = str(connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one())
    engine.dispose()
    return found


def test_a_reader_looks_at_an_older_store_and_leaves_it_as_it_is(old_store: str) -> None:
    schema = version_of(old_store)
    with Reader(old_store) as reader:
        # A name of then is no known one, so nobody imports it.
        as_read = settings_in(schema) | ({"evaluate": "own"} if schema == "0001" else {})
        assert reader.study("old").settings.as_json() == as_read
        assert [row["name"] for row in reader.studies()] == ["old"]
        assert reader.live_drivers(reader.study("old")) == {1: 3}  # its heart has just beaten
    assert version_of(old_store) == schema != SCHEMA


def test_a_store_brings_an_older_one_up_to_date_when_it_is_opened(old_store: str) -> None:
    with Store(old_store) as store:
        study = store.study("old")
        assert study.settings.as_json() == settings_in(SCHEMA)
        assert store.live_drivers(study) == {1: 3}  # of a version whose rows name no machine
        assert store.lease_waiting(study, store.start_driver(study, 1)) is None
    assert version_of(old_store) == SCHEMA
    with Reader(old_store) as reader:
        assert reader.study("old").settings.as_json() == settings_in(SCHEMA)


def test_an_old_store_that_several_open_at_once_is_brought_up_to_date_once(old_store: str) -> None:
    begin = threading.Barrier(4)

    def look(_: int) -> dict[int, int]:
        begin.wait()
        with Store(old_store) as store:
            return store.live_drivers(store.study("old"))

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(look, range(4))) == [{1: 3}] * 4
    assert version_of(old_store) == SCHEMA


def test_an_empty_database_is_an_error_for_whoever_does_not_create(tmp_path: Path) -> None:
    (tmp_path / "nas.db").touch()
    for opens in (Reader, Store):
        with pytest.raises(StoreError, match="is empty") as refused:
            opens(str(tmp_path / "nas.db"))
        assert refused.value.missing


@pytest.mark.parametrize("opens", [Reader, Store])
def test_a_store_of_a_newer_version_is_refused(store: Store, opens: type[Reader]) -> None:
    url = store.url.render_as_string(hide_password=False)
    with store._engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    try:
        with pytest.raises(StoreError, match="newer"):
            opens(url)
    finally:
        with store._engine.begin() as connection:
            connection.execute(text(f"UPDATE alembic_version SET version_num = '{SCHEMA}'"))
