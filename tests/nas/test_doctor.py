"""What the doctor says of a machine where something is missing."""

import shutil
from pathlib import Path

import pytest

from hypernas import doctor
from hypernas.records import SpaceSpec, StudySettings
from hypernas.store import Store


def line(name: str, check: object) -> doctor.Line:
    return doctor.run_check(name, check)  # type: ignore[arg-type]


def test_a_store_that_cannot_be_opened_is_named_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database" * 100)
    found = line("store", lambda: doctor._store(str(path)))
    assert not found.ok and "cannot be opened" in found.found and found.do
    assert line("store", lambda: doctor._store(str(tmp_path / "new.db"))).ok
    with Store(str(tmp_path / "nas.db"), create=True):
        assert "0 studies" in line("store", lambda: doctor._store(str(tmp_path / "nas.db"))).found


def test_a_missing_compiler_and_a_full_disk_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    compiler = line("compiler", doctor._compiler)
    assert not compiler.ok and "g++" in compiler.do
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    disk = line("disk", doctor._disk)
    assert not disk.ok and "room" in disk.do


def test_a_study_whose_space_is_missing_says_what_to_bring(tmp_path: Path) -> None:
    url = str(tmp_path / "nas.db")
    with Store(url, create=True) as store:
        kept = {"settings": StudySettings(), "reference": {}, "data_name": "", "data_hash": ""}
        store.create_study("s", space=SpaceSpec("gone.py:Space"), objectives=("a", "b"), **kept)  # type: ignore[arg-type]
    found = line("study s", lambda: doctor._study(url, "s"))
    assert not found.ok and "its space is not here" in found.found and "where gone.py:Space is" in found.do


def test_a_cluster_that_is_not_there_is_one_line() -> None:
    found = line("ray", lambda: doctor._ray("127.0.0.1:1"))
    assert not found.ok and "no Ray cluster answers" in found.found


@pytest.mark.parametrize("largest", [False, True])
def test_one_training_step_is_taken(largest: bool) -> None:
    found = line("step", lambda: doctor._step("vision", largest=largest))
    assert found.ok and "one step" in found.found, found
