"""A reader sees what a store writes, and its own connections can write nothing."""

from pathlib import Path

import pytest
from sqlalchemy import delete, insert, update
from sqlalchemy.exc import DBAPIError

from hypernas.records import Proposal, Recipe, Report, Result, StudyRow, StudySettings
from hypernas.store import Reader, Store
from hypernas.store.models import DriverTable, StudyTable
from tests.nas.studies import new_study


def searched(store: Store) -> tuple[StudyRow, int]:
    """A study with one trial that ended on the front, and its driver."""
    study = new_study(store, settings=StudySettings(trials=1))
    driver = store.start_driver(study, 1)
    proposal = Proposal({"depth": 2}, {"depth": 2}, "arch", "config", Recipe(1e-3), "sampler", {})
    trial = store.lease_new(study, driver, proposal, 1)
    assert trial is not None
    assert store.report(study, Report(0, 0, 5, 640, 1e9, 2.5, 0.1), trial.token)
    assert store.finish(study, Result(0, trial.token, {"bits_per_byte": 2.0, "flops_per_token": 1e6}))
    return study, driver


def test_a_reader_sees_what_a_store_writes_while_it_is_open(store: Store) -> None:
    with Reader(store.url.render_as_string(hide_password=False)) as reader:
        assert reader.studies() == []
        study, driver = searched(store)
        assert reader.study("s") == study
        assert reader.trials(study) == store.trials(study) == reader.front(study)
        assert reader.reports(study) == store.reports(study)
        assert reader.hypervolumes(study) == store.hypervolumes(study)
        assert reader.live_drivers(study) == {driver: 1}


def test_a_readers_connection_refuses_every_write(store: Store) -> None:
    study, driver = searched(store)
    times = {"started": study.created, "heartbeat": study.created}
    changes = (
        update(StudyTable).values(artifacts="elsewhere"),
        delete(StudyTable).where(StudyTable.id == study.id),
        update(DriverTable).where(DriverTable.id == driver).values(workers=9),
        insert(DriverTable).values(study_id=study.id, host="h", pid=1, process_started=0.0, workers=1, **times),
    )
    with Reader(store.url.render_as_string(hide_password=False)) as reader:
        for change in changes:
            with pytest.raises(DBAPIError, match=r"readonly|read-only"):
                reader._read(lambda connection, change=change: connection.execute(change))
            with pytest.raises(DBAPIError, match=r"readonly|read-only"), reader._engine.begin() as connection:
                connection.execute(change)
        assert not hasattr(reader, "_write")
        assert reader.study("s") == store.study("s") == study
    assert store.live_drivers(study) == {driver: 1}


def test_the_last_reader_leaves_no_log_beside_the_file(tmp_path: Path) -> None:
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        study, _ = searched(store)
        reader = Reader(str(tmp_path / "nas.db"))
        assert reader.trials(study)
    reader.close()
    assert [path.name for path in tmp_path.iterdir()] == ["nas.db"]
