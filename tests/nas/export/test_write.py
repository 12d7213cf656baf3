"""Exported folders, loaded where hypernas cannot be imported."""

import ast
import json
import re
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save_file

from hypernas.cli.main import main
from hypernas.config.study_config import StudyConfig
from hypernas.data.tasks import EVALUATION_TOKENS, evaluation_size
from hypernas.data.text import load_corpus, validation_windows
from hypernas.engines.inline import Inline
from hypernas.export.formats import check
from hypernas.export.request import knee
from hypernas.export.source import SourceError, write_source
from hypernas.export.write import trained_weights
from hypernas.kernels.dispatch import use_backend
from hypernas.search_spaces.lm import LanguageModels
from hypernas.show.views import Silent
from hypernas.store import Store
from hypernas.store.folders import artifacts_folder
from hypernas.study.driver import run
from hypernas.study.search import open_search, prepare

# Without the project, and with nothing else beside torch, what torch needs, and safetensors.
BARE = """
import sys
for name in ("hypernas", "optuna", "ray", "sqlalchemy", "pandas", "scipy"):
    sys.modules[name] = None  # importing it fails
sys.path.insert(0, ".")
import torch
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
"""


def bare_python(folder: Path, code: str, *arguments: str) -> str:
    command = [sys.executable, "-I", "-c", BARE + code, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, text: str) -> str:
    """A store with one study whose front holds gated, hourglass and multi-stream nets."""
    store = str(tmp_path_factory.mktemp("study") / "nas.db")
    settings = {"depth": "2", "d_model": "16,32", "head_dim": "8", "context": "32", "streams.n": "2,4"}
    settings |= {"ffn.shape": "hourglass", "gates.placement": "both", "data.path": text}
    settings |= {"train.tokens": "4096", "train.batch_tokens": "256"}
    with Store(store, create=True) as opened:
        search = open_search(
            opened, prepare(StudyConfig(study="s", preset="quick", trials=6, halving=False, settings=settings))
        )
        run(search, Inline(), Silent())
    return store


@pytest.fixture(scope="module")
def exported(study: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "winner"
    assert main(["export", "--study", "s", "--store", study, "--pick", "best", "--out", str(folder)]) == 0
    return folder


def test_an_export_reproduces_the_stored_loss_where_only_torch_is_installed(
    study: str, exported: Path, text: str, tmp_path: Path
) -> None:
    with Store(study) as store:
        row = store.study("s")
        best = store.front(row)[0]
    corpus = load_corpus(text)
    windows = validation_windows(corpus, evaluation_size(best.recipe, EVALUATION_TOKENS), best.arch["context"])
    save_file({"windows": torch.from_numpy(np.ascontiguousarray(windows))}, tmp_path / "windows.safetensors")
    code = """
import math
from safetensors.torch import load_file
from model import load
windows = load_file(sys.argv[1])["windows"]
with torch.no_grad():
    logits = load()(windows[:, :-1]).flatten(0, 1)
print(torch.nn.functional.cross_entropy(logits.double(), windows[:, 1:].flatten()).item() / math.log(2))
"""
    loss = float(bare_python(exported, code, str(tmp_path / "windows.safetensors")))
    assert abs(loss - best.values["bits_per_byte"]) < 1e-4


def test_the_cards_first_python_block_runs_as_it_stands(exported: Path) -> None:
    block = re.search(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.S)
    assert block
    assert bare_python(exported, block[1]).startswith("import ")  # it continues this prompt


def test_the_source_imports_only_torch_and_the_standard_library(exported: Path) -> None:
    source = (exported / "model.py").read_text()
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            top = name.partition(".")[0]
            assert top in {"torch", "safetensors"} or top in sys.stdlib_module_names, name
    assert "LayerNorm(" not in source and "GELU" not in source  # only the classes this model uses


def test_the_configuration_names_the_trial_and_its_files(study: str, exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    with Store(study) as store:
        best = store.front(store.study("s"))[0]
    assert (config["trial"], config["arch"], config["values"]) == (best.number, dict(best.arch), dict(best.values))
    card = (exported / "README.md").read_text()
    for name in ("model.py", "model.safetensors", "config.json"):
        digest = sha256((exported / name).read_bytes()).hexdigest()
        assert f"- `{name}` sha256 `{digest}`" in card
        assert name == "config.json" or config["sha256"][name] == digest


def test_a_trial_off_the_front_is_trained_again_and_exported(study: str, tmp_path: Path) -> None:
    with Store(study) as store:
        row = store.study("s")
        front = {trial.number for trial in store.front(row)}
        other = next(trial for trial in store.trials(row) if trial.number not in front)
    folder = tmp_path / "other"
    assert main(["export", "--study", "s", "--store", study, "--trial", str(other.number), "--out", str(folder)]) == 0
    assert json.loads((folder / "config.json").read_text())["trial"] == other.number


def test_only_weights_of_the_front_are_kept(study: str) -> None:
    with Store(study) as store:
        row = store.study("s")
        kept = set(store.artifacts(row, "weights"))
        assert kept == {trial.number for trial in store.front(row)}
        assert {path.name for path in artifacts_folder(store, "s").glob("*.safetensors")} == {
            f"trial-{n}.safetensors" for n in kept
        }


def test_an_export_does_not_need_room_where_the_study_keeps_its_weights(
    study: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Store(str(shutil.copy(study, tmp_path / "nas.db"))) as store:
        row = store.study("s")
        best = store.front(row)[0]
        artifacts_folder(store, "s").parent.write_text("no folder can be made here")
        assert set(load(trained_weights(store, row, best)))
    assert "could not be kept" in capsys.readouterr().err


def test_an_export_that_has_no_room_is_refused_before_anything_is_trained(
    study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    common = ["--study", "s", "--store", study, "--out", str(tmp_path / "winner")]
    assert main(["export", *common, "--pick", "best"]) == 2
    assert main(["train", *common, "--trial", "0"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("the weights alone take" in line for line in said)
    assert list(tmp_path.iterdir()) == []


def test_an_export_replaces_an_older_one_and_nothing_else(study: str, exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    command = ["export", "--study", "s", "--store", study, "--pick", "cheapest", "--out", str(folder)]
    assert main(command) == main(command) == 0
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    for name, text in (("config.json", "{}"), ("model.py", "print()")):  # a project that happens to look like one
        assert main([*command[:-1], str(precious)]) == 2
        assert (precious / "thesis.txt").read_text() == "mine"
        (precious / name).write_text(text)


def test_a_full_disk_is_one_sentence_that_names_the_folder_and_leaves_nothing(
    study: str, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (small_disk / "other").write_bytes(bytes(770_000))  # room for the weights, and for no more
    out = small_disk / "winner"
    assert main(["export", "--study", "s", "--store", study, "--pick", "best", "--out", str(out)]) == 2
    sentence = f"nas: {out}: No space left on device; make room there and try again\n"
    assert capsys.readouterr().err.endswith(sentence)
    assert [path.name for path in small_disk.iterdir()] == ["other"]
    (small_disk / "other").unlink()
    longest = small_disk / ("w" * 255)  # what is put together beside it has a shorter name
    assert main(["export", "--study", "s", "--store", study, "--pick", "best", "--out", str(longest)]) == 0
    assert longest.is_dir() and len(list(small_disk.iterdir())) == 1


@pytest.mark.slow
def test_weights_that_cannot_be_kept_are_exported_all_the_same(
    study: str, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(study, tmp_path / "copy.db")  # without its weights
    (tmp_path / "copy-artifacts").symlink_to(small_disk)
    (small_disk / "other").write_bytes(bytes(890_000))
    command = ["export", "--study", "s", "--store", str(tmp_path / "copy.db"), "--pick", "best"]
    assert main([*command, "--out", str(tmp_path / "winner")]) == 0
    assert f"could not be kept: [Errno 28] No space left on device: '{tmp_path}" in capsys.readouterr().err
    assert not list(small_disk.rglob("*.partial"))


def test_a_folder_whose_weights_are_not_the_models_is_never_reported_as_exported(
    exported: Path, tmp_path: Path
) -> None:

    folder = tmp_path / "tampered"
    shutil.copytree(exported, folder)
    weights = load_file(folder / "model.safetensors")
    weights["embedding.weight"] += 0.01
    save_file(weights, folder / "model.safetensors")
    config = json.loads((exported / "config.json").read_text())
    space = LanguageModels()
    model = space.build(space.from_json(config["arch"]))
    model.load_state_dict(load_file(exported / "model.safetensors"))
    with pytest.raises(RuntimeError, match="differ"):
        check("py", folder, model.eval(), {"float32/0": torch.zeros(1, 32, dtype=torch.long)})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"streams.n": 8, "streams.factors": "2x4"},
        {"streams.n": 4, "streams.mixing": "mhc", "position": "learned"},
        {"ffn.activation": "gelu", "norm.kind": "layernorm", "position": "sinusoidal", "tied_head": False},
        {"gates.placement": "attention", "gates.layers": "01", "ffn.shape": "hourglass"},
        {"gates.placement": "ffn", "gates.consistency": "perturbation"},
    ],
    ids=str,
)
def test_any_architecture_becomes_source_with_the_same_logits(settings: dict, tmp_path: Path) -> None:
    space = LanguageModels()
    arch = space.from_json({"depth": 2, "d_model": 32, "head_dim": 8, "context": 16} | settings)
    torch.manual_seed(1)
    model = space.build(arch).eval()
    for parameter in model.parameters():  # zero-initialised tensors must matter too
        parameter.data += 0.02 * torch.randn_like(parameter)
    tokens = torch.randint(256, (2, 16))
    with torch.no_grad(), use_backend("reference"):  # what is written out is the ops' definitions
        wanted = model(tokens)
    namespace: dict = {"__name__": "exported"}
    exec(compile(write_source(model, "A test.", ""), "model.py", "exec"), namespace)
    rebuilt = namespace["build"]().eval()
    rebuilt.load_state_dict(model.state_dict())
    assert type(rebuilt) is not type(model)
    with torch.no_grad():
        assert torch.equal(rebuilt(tokens), wanted)


def test_a_class_that_hides_an_argument_cannot_be_exported() -> None:
    class Hidden(torch.nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(width, width)

    with pytest.raises(SourceError, match="top level"):
        write_source(Hidden(3), "A test.", "")


def test_the_knee_is_the_balanced_point() -> None:
    assert knee([(0.0, 10.0), (1.0, 1.0), (10.0, 0.0)]) == 1
    assert knee([(3.0, 3.0)]) == 0
