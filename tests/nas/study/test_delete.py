"""What a study's row says of folders is not believed: nothing outside of the open store's own is touched."""

import shutil
from pathlib import Path

import optuna
import pytest
from sqlalchemy import text as sql

from hypernas.cli.main import main
from hypernas.integrations.optuna_db import export_study, import_study
from hypernas.records import Proposal, Recipe, Result, StudyRow
from hypernas.store import Store
from hypernas.store.folders import artifacts_folder, checkpoints_folder
from hypernas.store.weights import find_weights, keep_weights
from hypernas.study.delete import delete_study
from tests.nas.studies import new_study


def study_in(store: Store, *losses: float) -> StudyRow:
    """A study whose complete trials had these losses, its weights kept as a search keeps them."""
    row = new_study(store, "first")
    add_trials(store, row, *losses)
    return row


def add_trials(store: Store, row: StudyRow, *losses: float) -> None:
    driver = store.start_driver(row, 1)
    for loss in losses:
        trial = store.lease_new(row, driver, Proposal({}, {}, f"a{loss}", f"c{loss}", Recipe(1e-3), "sampler", {}), 9)
        assert trial is not None
        store.finish(row, Result(trial.number, 1, {"bits_per_byte": loss, "flops_per_token": 1e6}))
        keep_weights(store, row, trial.number, b"weights %d" % trial.number)
    store.stop_driver(driver)


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """A store with a study, its weights, and the checkpoint of a trial that another search trains."""
    path = tmp_path / "nas.db"
    with Store(str(path), create=True) as store:
        row = study_in(store, 5.0, 4.0)
        checkpoint = checkpoints_folder(store, row, None) / "trial-0.checkpoint"
        checkpoint.parent.mkdir()
        checkpoint.write_bytes(b"half")
    return path


def kept_by(path: Path) -> set[str]:
    return files_below(path.with_name("nas-artifacts"))


def copied(path: Path, to: Path) -> Path:
    """The store's file alone, as `cp` takes it once nobody has it open."""
    to.parent.mkdir(exist_ok=True)
    return Path(shutil.copy(path, to))


@pytest.mark.parametrize("to", ["backup.db", "elsewhere/nas.db"])
def test_deleting_a_study_in_a_copy_leaves_the_originals_weights_and_checkpoints(original: Path, to: str) -> None:
    before = kept_by(original)
    assert len(before) == 2
    assert main(["study", "delete", "first", "--store", str(copied(original, original.parent / to)), "--yes"]) == 0
    assert kept_by(original) == before
    with Store(str(original)) as store:
        assert find_weights(store, store.study("first"), 1) == b"weights 1"


def test_a_resumed_copy_keeps_its_weights_beside_itself(original: Path) -> None:
    before = kept_by(original)
    with Store(str(copied(original, original.parent / "backup.db"))) as store:
        row = store.study("first")
        assert find_weights(store, row, 1) is None  # trained again from its row
        add_trials(store, row, 3.0)  # off the front falls trial 1, whose weights the original keeps
        assert find_weights(store, row, 2) == b"weights 2"
        assert artifacts_folder(store, "first").parent == original.with_name("backup-artifacts")
        assert checkpoints_folder(store, row, "shared") != shared_of(original)
    assert kept_by(original) == before


def shared_of(path: Path) -> Path:
    with Store(str(path)) as store:
        return checkpoints_folder(store, store.study("first"), "shared")


def test_a_store_that_moves_with_its_folder_finds_its_weights(original: Path) -> None:
    moved = original.parent.rename(original.parent.with_name("moved")) / "nas.db"
    with Store(str(moved)) as store:
        assert find_weights(store, store.study("first"), 1) == b"weights 1"


@pytest.mark.parametrize("column", ["studies.artifacts", "artifacts.uri"])
def test_a_row_that_names_somebody_elses_files_deletes_none(original: Path, tmp_path: Path, column: str) -> None:
    victim = tmp_path / "thesis" / "chapter.tex"
    victim.parent.mkdir()
    victim.write_text("the only copy")
    table, _, name = column.partition(".")
    with Store(str(original)) as store:
        with store._engine.begin() as connection:
            named = victim.parent if table == "studies" else victim
            connection.execute(sql(f"UPDATE {table} SET {name} = '{named}'"))
        row = store.study("first")
        add_trials(store, row, 3.0)  # trial 1 leaves the front: its weights are dropped
        assert victim.exists()
        delete_study(store, "first")
    assert files_below(victim.parent) == {"chapter.tex"}
    assert kept_by(original) == set()


def test_a_copied_folder_whose_weights_are_behind_a_link_leaves_the_originals(original: Path) -> None:
    disk = original.with_name("nas-artifacts").rename(original.with_name("disk"))
    original.with_name("nas-artifacts").symlink_to(disk)
    with Store(str(original)) as store:
        assert find_weights(store, store.study("first"), 1) is None
        add_trials(store, store.study("first"), 3.0)
    before = files_below(disk)
    copy = copied(original, original.parent / "copy" / "nas.db")
    copy.with_name("nas-artifacts").symlink_to(disk)
    with Store(str(copy)) as store:
        delete_study(store, "first")
    assert files_below(disk) == before


def test_a_link_in_place_of_a_studys_folder_is_not_followed(original: Path, tmp_path: Path) -> None:
    copy = copied(original, tmp_path / "copy" / "nas.db")
    with Store(str(original)) as store:
        folder = artifacts_folder(store, "first")
    copy.with_name("nas-artifacts").mkdir()
    (copy.with_name("nas-artifacts") / folder.name).symlink_to(folder)
    before = kept_by(original)
    assert main(["study", "delete", "first", "--store", str(copy), "--yes"]) == 2
    assert kept_by(original) == before


def test_what_a_user_put_beside_the_weights_stays(original: Path) -> None:
    with Store(str(original)) as store:
        note = artifacts_folder(store, "first") / "notes.txt"
        note.write_text("mine")
        delete_study(store, "first")
    assert [path.name for path in note.parent.iterdir()] == ["notes.txt"]


def test_an_import_takes_no_folder_along_and_deleting_it_none_away(original: Path, tmp_path: Path) -> None:
    before = kept_by(original)
    database = str(tmp_path / "optuna.db")
    with Store(str(original)) as store:
        row = store.study("first")
        export_study(store, row, database, lambda trial: None, lambda text: None)
    theirs = optuna.load_study(study_name="first", storage=f"sqlite:///{database}")
    theirs.set_user_attr("hypernas", {**theirs.user_attrs["hypernas"], "artifacts": str(original.parent)})
    with Store(str(tmp_path / "other.db"), create=True) as store:
        import_study(store, database, None)
        delete_study(store, "first")
    assert kept_by(original) == before and original.exists()
