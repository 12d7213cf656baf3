"""Stores of other versions: looked at as they are, brought up to date by who writes, refused where they are newer."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, insert, text

from hypernas import store as package
from hypernas.errors import StoreError
from hypernas.store import Reader, Store
from hypernas.store.connection import parse_url
from hypernas.store.models import SCHEMA
from hypernas.store.statements import STUDIES, utcnow

STUDY = {
    "name": "old",
    "space": "lm",
    "space_settings": {},
    "objectives": ["bits_per_byte", "flops_per_token"],
    "settings": {"trials": 3, "evaluate": "nas.train:evaluate", "of_another_time": [1, 2]},
    "reference": {"bits_per_byte": 8.0, "flops_per_token": 9.0},
    "data_name": "words",
    "data_hash": "0" * 64,
    "artifacts": "",
    "next_number": 0,
    "seq": 0,
}


@pytest.fixture(params=["sqlite", "postgresql"])
def old_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a store as the version before migrations wrote it, with one study."""
    if request.param == "sqlite":
        write_old_store(url := str(tmp_path / "old.db"))
        yield url
        return
    server = parse_url(request.getfixturevalue("postgres"))
    administrator = create_engine(server, isolation_level="AUTOCOMMIT")
    with administrator.connect() as connection:
        connection.execute(text("CREATE DATABASE old"))
        write_old_store(url := server.set(database="old").render_as_string(hide_password=False))
        yield url
        connection.execute(text("DROP DATABASE old WITH (FORCE)"))
    administrator.dispose()


def write_old_store(url: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(package.__file__).parent / "migrations"))
    engine = create_engine(parse_url(url))
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(insert(STUDIES), STUDY | {"created": utcnow()})
        connection.commit()
    engine.dispose()


def version_of(url: str) -> str:
    engine = create_engine(parse_url(url))
    with engine.connect() as connection:
        found = str(connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one())
    engine.dispose()
    return found


def test_a_reader_looks_at_an_older_store_and_leaves_it_as_it_is(old_store: str) -> None:
    with Reader(old_store) as reader:
        as_read = STUDY["settings"] | {"evaluate": "own"}  # its name of then is no known one, so nobody imports it
        assert reader.study("old").settings.as_json() == as_read
        assert [row["name"] for row in reader.studies()] == ["old"]
    assert version_of(old_store) == "0001"


def test_a_store_brings_an_older_one_up_to_date_when_it_is_opened(old_store: str) -> None:
    renamed = {"trials": 3, "evaluate": "training", "of_another_time": [1, 2]}
    with Store(old_store) as store:
        assert store.study("old").settings.as_json() == renamed
        assert store.lease_waiting(store.study("old"), store.start_driver(store.study("old"), 1)) is None
    assert version_of(old_store) == SCHEMA
    with Reader(old_store) as reader:
        assert reader.study("old").settings.as_json() == renamed


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
