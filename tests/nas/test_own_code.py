"""Code that a store or an exported folder names is not imported, until whoever runs the command names it too."""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import hypernas as nas
from hypernas.cli.main import main
from hypernas.config.study_config import StudyConfig, resume_settings, to_json
from hypernas.doctor import checks
from hypernas.export.card import CARD, digest, list_files
from hypernas.records import Proposal, Recipe, Result, SpaceSpec, State, StudyRow, StudySettings, Trial
from hypernas.search_spaces import load_space, name_space, stored_space
from hypernas.search_spaces.base import arch_to_json
from hypernas.store import Reader, Store
from hypernas.study.search import make_job
from hypernas.training import worker
from tests.nas.studies import new_study

SMALL = {"depth": 1, "d_model": 16, "head_dim": 8, "context": 16}
CODE = """
from pathlib import Path
from hypernas.search_spaces.lm import LanguageModels
Path(__file__).with_name("ran").touch()
class Space(LanguageModels):
    pass
def run(job):
    raise AssertionError
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module on the path of Python that leaves a file `ran` beside itself when it is imported."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "somebodys.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    yield folder
    sys.modules.pop("somebodys", None)


NAMES = {"file": "somebodys.py:Space", "module": "somebodys:Space"}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return NAMES[request.param]


# ---- stores --------------------------------------------------------------------------------------------------------


def store_at(path: Path, space: str, settings: dict[str, Any]) -> str:
    """A store with a study `s` of one complete trial, whose weights are not kept."""
    known = load_space("lm")
    arch = known.from_json(SMALL)
    with Store(str(path), create=True) as store:
        searched = StudySettings.of(to_json(StudyConfig(study="s")) | {"trials": 9, "task": "text"})
        row = new_study(store, space=SpaceSpec(space), settings=searched)
        driver = store.start_driver(row, 1)
        proposal = Proposal({}, arch_to_json(arch), "a", "c", Recipe(1e-3), "sampler", {})
        assert store.lease_new(row, driver, proposal, 9) is not None
        values = {"bits_per_byte": 4.0, "flops_per_token": 1e6}
        store.finish(row, Result(0, 1, values, parameters=1))
        store.stop_driver(driver)
        store.update_settings(row, StudySettings.of(row.settings.as_json() | settings))
        with store._engine.begin() as connection:  # as an edited file has it, whatever we would write
            stored = json.dumps(row.settings.as_json() | settings)
            connection.exec_driver_sql("UPDATE studies SET settings = ?", (stored,))
    return str(path)


READERS = {
    "export": ["export", "--study", "s", "--trial", "0", "--out", "out"],
    "train": ["train", "--study", "s", "--trial", "0", "--out", "out"],
    "show": ["show", "--study", "s", "--trial", "0"],
    "scale": ["scale", "--study", "s", "--trials", "0"],
    "study export": ["study", "export", "s", "--to", "optuna.db"],
    "study replay": ["study", "replay", "s"],
    "search --resume": ["search", "--study", "s", "--resume"],
}


def test_no_command_imports_a_space_that_the_store_alone_names(
    code: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url = store_at(code / "nas.db", name, {"space": name})
    for words in READERS.values():
        assert main([*words, "--store", url]) == 2, words
        assert "names code for others to run" in capsys.readouterr().err
    with pytest.raises(nas.UserError, match="names code for others to run"):
        dict(checks(url, "s"))["study s"]()
    with pytest.raises(nas.SpaceError, match="names code for others to run"):
        nas.open_study("s", store=url).best(0).build()
    assert not (code / "ran").exists() and not (code / "out").exists()


def test_a_space_named_at_the_keyboard_is_used(code: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    url = store_at(code / "nas.db", name, {})
    assert main(["show", "--study", "s", "--trial", "0", "--store", url, "--space", name]) == 0
    assert "d_model = 16" in capsys.readouterr().out
    assert (code / "ran").exists()
    assert isinstance(nas.open_study("s", store=url, space=name).best(0).build(), torch.nn.Module)


def test_an_evaluation_that_a_row_names_is_imported_by_nobody(code: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = store_at(code / "nas.db", "lm", {"evaluate": "somebodys:run"})
    assert main([*READERS["export"], "--store", url]) == 2
    assert main([*READERS["search --resume"], "--store", url]) == 2
    assert "names code for others to run" in capsys.readouterr().err
    with Reader(url) as reader:
        row = reader.study("s")
        *_, result = worker.run(make_job(reader, row, reader.trial(row, 0)))
    assert result.failure is not None and "wanted training, trivial or module:function" in result.failure.message
    assert not (code / "ran").exists()


@pytest.mark.parametrize("settings", [{"sampler": "hub:somebodys"}, {"sampler": "hub:somebodys", "halving": True}])
def test_a_sampler_of_optunahub_is_named_again(settings: dict[str, Any]) -> None:
    stored = to_json(StudyConfig(study="s")) | settings
    with pytest.raises(nas.StudyError, match="--resume wants its --sampler hub:somebodys again"):
        resume_settings(stored, {"study": "s"})
    assert resume_settings(stored, {"study": "s", "sampler": "hub:somebodys"}).sampler == "hub:somebodys"


def test_a_row_sends_nobody_to_another_cluster_folder_or_store() -> None:
    stored = to_json(StudyConfig(study="s")) | {
        "address": "elsewhere:10001",
        "checkpoints": "/home/somebody",
        "store": "other.db",
        "warm_start": "optuna:other.db#s",
    }
    found = resume_settings(stored, {"study": "s"})
    assert (found.address, found.checkpoints, found.store, found.warm_start) == (None, None, "nas.db", None)


def test_a_record_that_was_stored_does_not_say_that_its_space_was_named_here(code: Path) -> None:
    given = asdict(SpaceSpec("somebodys:Space", own=True))
    with Store(store_at(code / "nas.db", "somebodys:Space", {"own": True})) as store:
        row = store.study("s")
    assert given["own"] and not row.space.own
    with pytest.raises(nas.SpaceError):
        stored_space(row.space)
    assert stored_space(name_space(row, "lm").space).name == "lm"


# ---- exported folders ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of an untrained language model."""
    from hypernas.export.write import write_folder

    space = load_space("lm")
    arch = space.from_json(SMALL)
    model = space.build(arch).eval()
    moment = __import__("datetime").datetime(2026, 1, 1)
    values = {"bits_per_byte": 4.0, "accuracy": 0.1, "flops_per_token": 1e6}
    trial = Trial(
        number=0, state=State.COMPLETE, params={}, arch=arch_to_json(arch), arch_hash="0", recipe=Recipe(1e-3),
        origin="sampler", sampler_attrs={}, token=1, attempts=1, values=values, parameters=1, driver=None, worker=None,
        created=moment, started=moment, finished=moment, train_seconds=1.0, evaluate_seconds=1.0, provenance={},
        diagnostics={}, failure=None, seq=1,
    )  # fmt: skip
    study = StudyRow(
        id=1, name="s", created=moment, space=SpaceSpec("lm"), objectives=("bits_per_byte", "flops_per_token"),
        reference={}, settings=StudySettings(), data_name="d", data_hash="0" * 64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("made")
    write_folder(folder, study, trial, space, model, ("py",))
    return folder


@pytest.fixture
def winner(made: Path, code: Path, name: str) -> Path:
    """The export with another space in its config.json, and its card made again to fit."""
    import shutil

    folder = Path(shutil.copytree(made, code / "winner"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"space": name}))
    card = (folder / CARD).read_text()
    old = re.search(r"config.json` sha256 `(\w+)`", card)
    assert old is not None
    (folder / CARD).write_text(card.replace(old[1], digest(folder / "config.json")))
    assert list_files(folder) in (folder / CARD).read_text()
    return folder


EXPORTED = {
    "evaluate": ["evaluate"],
    "generate": ["generate", "--prompt", "a", "--count", "1"],
    "decompose": ["decompose", "--out", "blocks"],
}


def test_no_command_imports_a_space_that_the_folder_alone_names(
    winner: Path, code: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in EXPORTED.values():
        assert main([*words, str(winner), "--gpus-per-trial", "0"]) == 2, words
        assert "names code for others to run" in capsys.readouterr().err
    with pytest.raises(nas.UserError, match="names code for others to run"):
        nas.load(winner)
    assert not (code / "ran").exists()


def test_a_folder_of_ones_own_space_is_read_by_whoever_names_it(winner: Path, code: Path, name: str) -> None:
    assert main([*EXPORTED["generate"], str(winner), "--gpus-per-trial", "0", "--space", name]) == 0
    assert isinstance(nas.load(winner, space=name), torch.nn.Module)
    assert (code / "ran").exists()
