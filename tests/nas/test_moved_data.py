"""Data is known by its content: where it lies may change between a search, its resumption, an export and a training."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hypernas.cli.main import main
from hypernas.config.study_config import StudyConfig, resume_settings
from hypernas.errors import UserError
from hypernas.launch import launch, run_search
from hypernas.store import Reader
from hypernas.training.model import load_checked_data

KEYS = {"depth": "1", "d_model": "16", "head_dim": "8", "context": "32"}
KEYS |= {"train.tokens": "512", "train.batch_tokens": "256"}
Search = Callable[..., int]


@pytest.fixture
def search(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> Search:
    """Searches in the folder `home`, where the text lies as book.txt; with `path` as data.path, if any."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(text, home / "book.txt")
    monkeypatch.chdir(home)

    def run(path: str | None = None, keys: dict[str, str] | None = None, **more: Any) -> int:
        settings = {**(keys or {}), **({"data.path": path} if path else {})}
        flags = {"study": "s", "store": str(tmp_path / "nas.db"), **more}
        return run_search(flags | ({"settings": settings} if settings else {}), "trivial")[1].finished

    assert run("book.txt", KEYS, preset="quick", engine="inline", halving=False, trials=1) == 1
    return run


def stored_path(folder: Path) -> str | None:
    with Reader(str(folder / "nas.db")) as reader:
        return reader.study("s").settings.data_path


def test_a_study_of_a_relative_path_goes_on_from_another_folder(
    search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert search(resume=True, trials=2) == 2
    assert stored_path(tmp_path) == str(tmp_path / "home" / "book.txt")


@pytest.mark.parametrize("keys", [None, KEYS])
def test_a_study_goes_on_with_the_same_data_by_another_name(
    search: Search, tmp_path: Path, keys: dict[str, str] | None
) -> None:
    assert search(str(tmp_path / "home" / "book.txt"), keys, resume=True, trials=2) == 2
    (tmp_path / "home" / "book.txt").rename(tmp_path / "moved.txt")
    assert search("../moved.txt", keys, resume=True, trials=3) == 3
    assert stored_path(tmp_path) == str(tmp_path / "moved.txt")
    assert search(resume=True, trials=4) == 4  # it lay there last


def test_a_home_folder_is_read_as_a_shell_reads_it(
    search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert search("~/book.txt", resume=True, trials=2) == 2


def test_moved_data_is_asked_for_in_one_sentence(search: Search, tmp_path: Path) -> None:
    (tmp_path / "home" / "book.txt").rename(tmp_path / "moved.txt")
    with pytest.raises(UserError, match=r"not at .*book\.txt any more: say where it lies now with --set data\.path="):
        search(resume=True, trials=2)


def test_other_data_is_refused_whatever_its_path(search: Search, tmp_path: Path) -> None:
    before = stored_path(tmp_path)
    (tmp_path / "other.txt").write_text("another text entirely, of other words\n" * 300)
    with pytest.raises(UserError, match=r"was trained on book\.txt with hash .* say where the same data lies"):
        search(str(tmp_path / "other.txt"), resume=True, trials=2)
    shutil.copy(tmp_path / "other.txt", "book.txt")  # at the same path
    with pytest.raises(UserError, match="losses would not compare"):
        search(resume=True, trials=2)
    assert stored_path(tmp_path) == before


def test_other_keys_are_still_refused() -> None:
    stored = {"study": "s", "objectives": [], "settings": {"depth": "2", "data.path": "a"}, "data_path": "/a"}
    with pytest.raises(UserError, match="was created with settings --set depth=2, not --set depth=3"):
        resume_settings(stored, {"settings": {"depth": "3", "data.path": "b"}})
    kept = resume_settings(stored, {"settings": {"depth": "2"}})
    assert kept.settings == {"depth": "2", "data.path": "/a"}
    assert isinstance(kept, StudyConfig)


@pytest.mark.slow
def test_export_and_train_take_the_data_where_it_lies_now(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, moved = str(tmp_path / "nas.db"), str(tmp_path / "moved.txt")
    shutil.copy(text, tmp_path / "book.txt")
    settings = KEYS | {"data.path": str(tmp_path / "book.txt")}
    flags = {"study": "s", "store": store, "preset": "quick", "engine": "inline", "trials": 1, "settings": settings}
    assert launch(flags) == 0
    shutil.rmtree(tmp_path / "nas-artifacts")  # so that an export has to train again
    (tmp_path / "book.txt").rename(moved)
    (tmp_path / "other.txt").write_text("another text entirely, of other words\n" * 300)
    monkeypatch.chdir(tmp_path)
    load_checked_data.cache_clear()
    of_trial = ["--study", "s", "--store", store, "--trial", "0"]
    for command in ("export", "train"):
        asked = [command, *of_trial, "--out", f"{command}ed"]
        capsys.readouterr()
        assert main(asked) == 2
        assert "say where it lies now with --set data.path=" in capsys.readouterr().err
        assert main([*asked, "--set", "data.path=other.txt"]) == 2
        assert "losses would not compare" in capsys.readouterr().err
        assert main([*asked, "--set", "depth=3"]) == 2
        assert "data.path=PATH alone" in capsys.readouterr().err
        assert main([*asked, "--set", "data.path=moved.txt"]) == 0
        assert json.loads((tmp_path / f"{command}ed" / "config.json").read_text())["data"]["path"] == moved
