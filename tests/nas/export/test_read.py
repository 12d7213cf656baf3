"""Exported folders read back: what is refused, and what comes in."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import hypernas as nas
from hypernas.errors import UserError
from hypernas.export.card import list_files, read_config
from hypernas.export.write import write_checked
from hypernas.records import Recipe, SpaceSpec, State, StudyRow, StudySettings, Trial
from hypernas.search_spaces import load_space
from hypernas.search_spaces.base import arch_to_json

SMALL = {"depth": 2, "d_model": 16, "head_dim": 8, "context": 16, "streams.n": 2}


def written(folder: Path, space_name: str, settings: dict, kinds: tuple[str, ...] = ("py",)) -> torch.nn.Module:
    """Exports an untrained network; returns it."""
    space = load_space(space_name, {})
    arch = space.from_json(settings)
    torch.manual_seed(0)
    model = space.build(arch)
    for parameter in model.parameters():  # zero-initialised tensors must matter too
        parameter.data += 0.02 * torch.randn_like(parameter)
    cost = space.cost(arch)
    unit = "token" if space.task == "text" else "image"
    values = {"accuracy": 0.5, f"flops_per_{unit}": float(cost.flops_total)}
    moment = __import__("datetime").datetime(2026, 1, 1)
    trial = Trial(
        number=3, state=State.COMPLETE, params={}, arch=arch_to_json(arch), arch_hash="0", recipe=Recipe(1e-3),
        origin="sampler", sampler_attrs={}, token=1, attempts=1, values=values, parameters=cost.parameters_total,
        driver=None, worker=None, created=moment, started=moment, finished=moment, train_seconds=1.0,
        evaluate_seconds=1.0, provenance={}, diagnostics={}, failure=None, seq=1,
    )  # fmt: skip
    task = space.task
    study = StudyRow(
        id=1, name="s", created=moment, space=SpaceSpec(space_name), objectives=tuple(values), reference={},
        settings=StudySettings(task=task),
        data_name="d", data_hash="0" * 64,
    )  # fmt: skip
    write_checked(folder, study, trial, space, model.eval(), kinds)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("exported") / "model"
    return folder, written(folder, "lm", SMALL)


@pytest.fixture
def folder(exported: tuple[Path, torch.nn.Module], tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(exported[0], tmp_path / "copy"))


def test_an_export_loads_as_the_network_it_was(exported):
    folder, model = exported
    tokens = torch.randint(256, (2, 16))
    loaded = nas.load(folder)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens), model(tokens))
    assert not loaded.training


@pytest.mark.parametrize("name", ["model.safetensors", "model.py", "config.json"])
def test_a_file_that_was_changed_cut_short_or_lost_is_named(folder: Path, name: str):
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if name == "model.safetensors" else whole + b" ")
    with pytest.raises(UserError, match=f"damaged: {name} has sha256"):
        nas.load(folder)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"damaged: .*{name}"):
        nas.load(folder)
    path.unlink()
    with pytest.raises(UserError, match=name):
        nas.load(folder)


def test_a_newer_export_is_refused_and_says_so(folder: Path):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    with pytest.raises(UserError, match="version 99, newer"):
        nas.load(folder)


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path):
    for make in (lambda: None, lambda: (tmp_path / "README.md").write_text("hello"),
                 lambda: (tmp_path / "config.json").write_text("[]")):  # fmt: skip
        make()
        with pytest.raises(UserError, match="not an exported model"):
            nas.load(tmp_path)


def test_loading_runs_none_of_the_folders_code(folder: Path):
    (folder / "model.py").write_text("raise SystemExit('this ran')")
    card = (folder / "README.md").read_text().split("- `config.json`")[0]
    (folder / "README.md").write_text(card + list_files(folder))  # whoever changes the code can change the card
    assert isinstance(nas.load(folder), torch.nn.Module)


def test_every_file_is_in_the_card(exported):
    folder, _ = exported
    config = read_config(folder)
    assert set(config["sha256"]) == {"model.py", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == {"model.py", "model.safetensors", "config.json", "README.md"}
