"""Weights on disk beside their rows: what a kill left between the two."""

import os
from pathlib import Path

import pytest
from sqlalchemy import text as sql

from hypernas.config.study_config import StudyConfig
from hypernas.engines.inline import Inline
from hypernas.files import write_whole
from hypernas.records import Proposal, Recipe, Result, StudyRow
from hypernas.show.views import Silent
from hypernas.store import Store, reader
from hypernas.store.folders import artifacts_folder
from hypernas.store.weights import drop_strays, find_weights, keep_weights
from hypernas.study.delete import delete_study
from hypernas.study.driver import run
from hypernas.study.search import open_search, prepare
from tests.nas.studies import new_study


def study_of_two(store: Store) -> StudyRow:
    """Both on the front; of trial 1 a search was killed between its weights and their row, with a half beside them."""
    row = new_study(store)
    driver = store.start_driver(row, 1)
    for number in range(2):
        proposal = Proposal({}, {}, f"a{number}", f"c{number}", Recipe(1e-3), "sampler", {})
        assert store.lease_new(row, driver, proposal, 9)
        store.finish(row, Result(number, 1, {"bits_per_byte": 5.0 - number, "flops_per_token": 1e6 + number}))
    keep_weights(store, row, 0, b"weights 0")
    store.stop_driver(driver)
    folder = artifacts_folder(store, "s")
    (folder / "trial-1.safetensors").write_bytes(b"weights 1")
    half_of(folder, "trial-1.safetensors")
    return row


def half_of(folder: Path, name: str) -> None:
    """What is left of a file whose writing was killed."""
    with pytest.MonkeyPatch.context() as patch:
        kept = []
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: kept.append(self))
        patch.setattr(os, "fsync", lambda descriptor: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_whole(folder / name, b"half")
    assert kept and kept[-1].exists()


def names(store: Store) -> set[str]:
    return {path.name for path in artifacts_folder(store, "s").iterdir()}


def test_the_next_search_deletes_weights_that_no_row_names_and_nothing_else(tmp_path: Path, text: str) -> None:
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        config = StudyConfig(study="s", trials=2, preset="quick", settings={"data.path": text})
        run(open_search(store, prepare(config), evaluate="trivial"), Inline(), Silent())
        row = store.study("s")
        keep_weights(store, row, store.front(row)[0].number, b"kept")
        folder = artifacts_folder(store, "s")
        kept, stray = store.front(row)[0].number, 1 - store.front(row)[0].number
        for name in (f"trial-{stray}.safetensors", "trial-7.safetensors", "notes.txt", "trial-0.txt"):
            (folder / name).write_bytes(b"there")
        half_of(folder, f"trial-{stray}.safetensors")
        config = StudyConfig(study="s", trials=3, preset="quick", settings={"data.path": text}, resume=True)
        run(open_search(store, prepare(config), evaluate="trivial"), Inline(), Silent())
        assert find_weights(store, row, kept) == b"kept"
        left = {"checkpoints", f"trial-{kept}.safetensors", "trial-7.safetensors", "notes.txt", "trial-0.txt"}
        assert names(store) == left


def test_a_search_that_is_alive_may_be_between_the_two(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a server's weights are kept
    row = study_of_two(store)
    driver = store.start_driver(row, 1)
    drop_strays(store, row)
    assert len(names(store)) == 3
    store.stop_driver(driver)
    drop_strays(store, row)
    assert names(store) == {"trial-0.safetensors"}


def test_a_study_is_deleted_with_what_a_kill_left_of_it(tmp_path: Path) -> None:
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        study_of_two(store)
        delete_study(store, "s")
    assert {path.name for path in tmp_path.iterdir()} <= {"nas.db", "nas.db-wal", "nas.db-shm"}


def test_a_dead_drivers_row_is_looked_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    row = new_study(store)
    mine, dead = store.start_driver(row, 1), store.start_driver(row, 1)
    with store._engine.begin() as connection:
        connection.execute(sql("UPDATE drivers SET process_started = 1 WHERE id = :dead"), {"dead": dead})
    looked: list[int] = []
    lives = reader.is_alive
    monkeypatch.setattr(
        reader, "is_alive", lambda driver, *rest: (looked.append(driver["id"]), lives(driver, *rest))[1]
    )
    store.reclaim(row)
    assert looked == [mine, dead]
    store.reclaim(row)
    assert looked == [mine, dead, mine]
    store.heartbeat(dead)  # it was taken for dead: the next look is at its process again
    assert set(store._drivers(row)) == {mine, dead}
    store.stop_driver(mine)
