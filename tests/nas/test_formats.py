"""The formats of an export, loaded where neither hypernas nor anything but torch and safetensors is installed."""

import importlib.metadata
import re
import subprocess
import sys
import venv
from pathlib import Path

import optuna
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kernels._dispatch import use_backend
from nas.errors import UserError
from nas.export import wanted_formats
from nas.formats import RUNS, SAVE, check, check_inputs, export_program, masked, sizes_of, write_onnx
from nas.source import write_source
from search_spaces import load_space

FOOTER = """
from pathlib import Path


def load() -> nn.Module:
    from safetensors.torch import load_file

    model = build()
    model.load_state_dict(load_file(Path(__file__).parent / "model.safetensors"))
    return model.eval()
"""
LM = {"depth": 2, "d_model": 32, "head_dim": 8, "context": 16}
SETTINGS = [
    ("lm", LM | {"streams.n": 4, "streams.factors": "2x2", "ffn.shape": "hourglass"}),
    ("lm", LM | {"streams.n": 6, "streams.factors": "2x3", "gates.placement": "both", "ffn.shape": "hourglass"}),
    ("lm", LM | {"norm.kind": "layernorm", "norm.position": "post", "position": "sinusoidal", "tied_head": False}),
    ("lm", {"family": "lstm", "depth": 2, "d_model": 32, "context": 16}),
    ("vision", {"family": "resnet", "depth": 1, "width": 4, "stages": 2, "image.height": 12, "image.width": 12}),
    ("vision", {"family": "resnet", "depth": 1, "width": 4, "stages": 2, "gates.placement": "blocks"}),
    ("vision", {"family": "vit", "depth": 2, "d_model": 32, "head_dim": 8, "patch": 7}),
    ("vision", {"family": "vit", "depth": 2, "d_model": 32, "head_dim": 8, "patch": 7, "gates.placement": "ffn"}),
]
BARE = """
import sys
sys.path.insert(0, ".")
import torch
from safetensors.torch import load_file
for name in ("nas", "kernels", "search_spaces", "numpy", "pandas", "optuna"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} is installed here")
given = load_file(sys.argv[1])
"""


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a virtual environment with torch, what torch requires, and safetensors: linked, not copied."""
    home = tmp_path_factory.mktemp("bare")
    venv.create(home, symlinks=True)
    packages = next(home.glob("lib/python*/site-packages"))
    for name in required({"torch", "safetensors"}):
        for file in importlib.metadata.files(name) or []:
            top = Path(file.parts[0])
            source = Path(str(importlib.metadata.distribution(name).locate_file(top)))
            if top.name not in ("..", "__pycache__", "bin") and source.exists() and not (packages / top).exists():
                (packages / top).symlink_to(source)
    return home / "bin" / "python"


def required(names: set[str]) -> set[str]:
    """The installed packages that some packages need, themselves included."""
    known: set[str] = set()
    while names:
        name = names.pop()
        known.add(name)
        for requirement in importlib.metadata.requires(name) or []:
            if "extra ==" in requirement:
                continue
            other = re.match(r"[\w.-]+", requirement)[0]
            try:
                importlib.metadata.distribution(other)
            except importlib.metadata.PackageNotFoundError:
                continue  # of another platform
            names |= {other} - known
    return known


def made(space_name: str, settings: dict, seed: int = 0):
    """(space, architecture, network) with weights that all matter."""
    space = load_space(space_name, {})
    arch = space.from_json(settings)
    torch.manual_seed(seed)
    model = space.build(arch)
    for name, parameter in model.named_parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
        if name.endswith("gate.bias"):
            parameter.data -= 0.2  # at the threshold of an untrained gate: some are skipped
    return space, arch, model.eval()


def comes_back(python: Path, folder: Path, space, arch, model: nn.Module) -> None:
    """Asserts that source and program, loaded by `python`, compute what `model` does."""
    folder.mkdir()
    (folder / "model.py").write_text(write_source(model, "A test.", FOOTER))
    save_file(model.state_dict(), folder / "model.safetensors")
    program = export_program(model, space, arch)
    torch.export.save(program, folder / "model.pt2")
    for kind, sizes in (("py", [None, None]), ("pt2", sizes_of(program))):
        inputs = check_inputs(kind, space, arch, 0, sizes)
        save_file(inputs, folder / "in")
        command = [str(python), "-I", "-B", "-c", BARE + RUNS[kind] + SAVE, "in", "out"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        logits = torch.load(folder / "out", weights_only=True)
        assert logits.keys() == inputs.keys()
        with torch.no_grad(), use_backend("reference"):
            for name in inputs:
                if name.startswith("float32"):
                    torch.testing.assert_close(logits[name], model(inputs[name]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("space_name, settings", SETTINGS, ids=str)
def test_source_and_program_compute_the_same_in_a_bare_environment(
    bare_python: Path, space_name: str, settings: dict, tmp_path: Path
):
    comes_back(bare_python, tmp_path / "model", *made(space_name, settings))


@pytest.mark.slow
@pytest.mark.parametrize("space_name", ["lm", "vision"])
@pytest.mark.parametrize("seed", range(30))
def test_drawn_architectures_come_back_in_a_bare_environment(
    bare_python: Path, space_name: str, seed: int, tmp_path: Path
):
    small = {"lm": {"d_model": "32", "context": "16"}, "vision": {"image.height": "12", "image.width": "12"}}
    space = load_space(space_name, small[space_name])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    arch = space.suggest(study.ask())
    torch.manual_seed(seed)
    comes_back(bare_python, tmp_path / "model", space, arch, space.build(arch).eval())


def test_a_masked_copy_is_the_same_function_and_has_no_decision_in_it():
    for space_name, settings in (SETTINGS[1], SETTINGS[5], SETTINGS[7]):
        space, arch, model = made(space_name, settings)
        inputs = check_inputs("pt2", space, arch, 1, [None, None])["float32/0"]
        kinds = {type(module).__name__ for module in masked(model).modules()}
        assert not kinds & {"GatedSublayer", "GatedBlock"} and kinds & {"MaskedSublayer", "MaskedBlock"}
        with torch.no_grad():
            torch.testing.assert_close(masked(model)(inputs), model(inputs), rtol=1e-4, atol=1e-5)


def test_a_recurrent_program_takes_any_batch_of_its_context_and_others_any_length():
    for settings, wanted in ((SETTINGS[0][1], [None, None]), (SETTINGS[3][1], [None, 16])):
        space, arch, model = made("lm", settings)
        assert sizes_of(export_program(model, space, arch)) == wanted


@pytest.mark.parametrize("space_name, settings", [SETTINGS[1], SETTINGS[5]], ids=str)
def test_an_onnx_graph_computes_the_same_with_its_gates_masked(space_name: str, settings: dict, tmp_path: Path):
    space, arch, model = made(space_name, settings)
    program = export_program(model, space, arch)
    write_onnx(program, tmp_path / "model.onnx", "inputs")
    assert check("onnx", tmp_path, model, check_inputs("onnx", space, arch, 0, sizes_of(program))) < 1e-4


def test_without_its_packages_onnx_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    space, arch, model = made(*SETTINGS[4])
    with pytest.raises(UserError, match="pip install 'hypernas"):
        write_onnx(export_program(model, space, arch), tmp_path / "model.onnx", "images")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_traced_is_a_clear_refusal():
    space, arch, _ = made("lm", LM)

    class Branching(nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens.float() if tokens.sum() > 0 else -tokens.float()

    with pytest.raises(UserError, match=r"--formats pt2: torch.export cannot trace Branching"):
        export_program(Branching(), space, arch)


def test_unknown_formats_are_named_and_the_source_is_always_written():
    assert wanted_formats("pt2") == ("py", "pt2") and wanted_formats("onnx, py") == ("py", "onnx")
    with pytest.raises(UserError, match="'tflite': wanted some of py, pt2, onnx"):
        wanted_formats("py,tflite")


def test_the_source_holds_what_the_architecture_uses_and_nothing_else():
    _, _, model = made(*SETTINGS[0])
    source = write_source(model, "A test.", "")
    for unused in ("selected", "PreNormFFN", "PreNormAttention", "mean_mixing", "gather_scatter", "attend", "flops"):
        assert unused not in source, unused
    _, _, gated = made(*SETTINGS[1])
    assert "def selected" in write_source(gated, "A test.", "")
