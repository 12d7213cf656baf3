"""The formats of an export, loaded where neither hypernas nor anything but torch and safetensors is installed."""

import functools
import importlib.metadata
import re
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hypernas.errors import UserError
from hypernas.export.formats import RUNS, check, check_inputs, export_program, mask_gates, sizes_of, write_onnx
from hypernas.export.request import wanted_formats
from hypernas.export.source import write_source
from hypernas.kernels.dispatch import use_backend
from hypernas.search_spaces import load_space

FOOTER = """
from pathlib import Path


def load() -> nn.Module:
    from safetensors.torch import load_file

    model = build()
    model.load_state_dict(load_file(Path(__file__).parent / "model.safetensors"))
    return model.eval()
"""
LM = {"depth": 1, "d_model": 32, "head_dim": 8, "context": 16}
TINY = {"image.height": 12, "image.width": 12}
SETTINGS = [
    ("lm", LM | {"depth": 2, "streams.n": 4, "streams.factors": "2x2", "ffn.shape": "hourglass"}),
    ("lm", LM | {"streams.n": 6, "streams.factors": "2x3", "gates.placement": "both", "ffn.shape": "hourglass"}),
    ("lm", LM | {"norm.kind": "layernorm", "norm.position": "post", "position": "sinusoidal", "tied_head": False}),
    ("lm", LM | {"ffn.blocks": 2, "ffn.activation": "gelu", "position": "learned"}),
    ("lm", {"family": "lstm", "depth": 1, "d_model": 32, "context": 8}),
    ("vision", TINY | {"family": "resnet", "depth": 1, "width": 4, "stages": 2}),
    ("vision", TINY | {"family": "resnet", "depth": 1, "width": 4, "stages": 2, "gates.placement": "blocks"}),
    ("vision", {"family": "vit", "depth": 1, "d_model": 32, "head_dim": 8, "patch": 7}),
    ("vision", {"family": "vit", "depth": 1, "d_model": 32, "head_dim": 8, "patch": 7, "gates.placement": "ffn"}),
]
GROUP = 5  # drawn architectures that one process loads
BARE = """
import importlib, os, sys, traceback
import torch
from pathlib import Path
from safetensors.torch import load_file
for name in ("hypernas", "numpy", "pandas", "optuna"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} is installed here")
sys.path.insert(0, ".")
for folder in sys.argv[1:]:
    os.chdir(folder)
    for kind in RUNS:
        sys.modules.pop("model", None)  # the last folder's
        importlib.invalidate_caches()
        scope = {"torch": torch}
        try:
            exec(RUNS[kind], scope)
            with torch.no_grad():
                given = load_file(f"{kind}.in")
                torch.save({name: scope["run"](name, inputs) for name, inputs in given.items()}, f"{kind}.out")
        except Exception:
            Path(f"{kind}.error").write_text(traceback.format_exc())
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


@dataclass(frozen=True)
class Exported:
    """A network, its program, and the folder with its source, weights, program and what to try them on."""

    space: Any
    arch: Any
    model: nn.Module
    program: torch.export.ExportedProgram
    folder: Path


def exported(folder: Path, space: Any, arch: Any, model: nn.Module) -> Exported:
    folder.mkdir()
    (folder / "model.py").write_text(write_source(model, "A test.", FOOTER))
    save_file(model.state_dict(), folder / "model.safetensors")
    program = export_program(model, space, arch)
    torch.export.save(program, folder / "model.pt2")
    for kind, sizes in (("py", [None, None]), ("pt2", sizes_of(program))):
        save_file(check_inputs(kind, space, arch, 0, sizes), folder / f"{kind}.in")
    return Exported(space, arch, model, program, folder)


def run_bare(python: Path, folders: Sequence[Path]) -> None:
    """Has one process of `python` load every folder, by source and by program, and run it on its inputs."""
    runs = {kind: RUNS[kind] for kind in ("py", "pt2")}
    command = [str(python), "-I", "-B", "-c", f"RUNS = {runs!r}\n{BARE}", *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 + 30 * len(folders), check=False)
    assert done.returncode == 0, done.stderr


def comes_back(trip: Exported) -> None:
    """Asserts that source and program computed in the bare process what the network does."""
    for kind in ("py", "pt2"):
        error = trip.folder / f"{kind}.error"
        assert not error.exists(), error.read_text()
        inputs = load_file(trip.folder / f"{kind}.in")
        logits = torch.load(trip.folder / f"{kind}.out", weights_only=True)
        assert logits.keys() == inputs.keys()
        with torch.no_grad(), use_backend("reference"):
            for name in inputs:
                if name.startswith("float32"):
                    torch.testing.assert_close(logits[name], trip.model(inputs[name]), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def trip_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Exported]:
    """One of SETTINGS by its place, exported when it is first asked for."""
    root = tmp_path_factory.mktemp("trips")
    return functools.cache(lambda number: exported(root / str(number), *made(*SETTINGS[number])))


@pytest.fixture(scope="module")
def trips(bare_python: Path, trip_of: Callable[[int], Exported]) -> list[Exported]:
    """Every one of SETTINGS, exported and run in the bare environment."""
    made_trips = [trip_of(number) for number in range(len(SETTINGS))]
    run_bare(bare_python, [trip.folder for trip in made_trips])
    return made_trips


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SETTINGS)), ids=[str(settings) for settings in SETTINGS])
def test_source_and_program_compute_the_same_in_a_bare_environment(trips: list[Exported], number: int):
    comes_back(trips[number])


SEEDS = [range(1000, 1002), *(pytest.param(range(n, n + GROUP), marks=pytest.mark.slow) for n in range(0, 30, GROUP))]


@pytest.mark.slow
@pytest.mark.parametrize("space_name", ["lm", "vision"])
@pytest.mark.parametrize("seeds", SEEDS, ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")
def test_drawn_architectures_come_back_in_a_bare_environment(
    bare_python: Path, space_name: str, seeds: range, tmp_path: Path
):
    small = {"lm": {"d_model": "32", "context": "16"}, "vision": {"image.height": "12", "image.width": "12"}}
    space = load_space(space_name, small[space_name])
    drawn = []
    for seed in seeds:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        arch = space.suggest(study.ask())
        torch.manual_seed(seed)
        drawn.append(exported(tmp_path / str(seed), space, arch, space.build(arch).eval()))
    run_bare(bare_python, [trip.folder for trip in drawn])
    for trip in drawn:
        comes_back(trip)


def test_a_masked_copy_is_the_same_function_and_has_no_decision_in_it():
    for space_name, settings in (SETTINGS[1], SETTINGS[6], SETTINGS[8]):
        space, arch, model = made(space_name, settings)
        inputs = check_inputs("pt2", space, arch, 1, [None, None])["float32/0"]
        kinds = {type(module).__name__ for module in mask_gates(model).modules()}
        assert not kinds & {"GatedSublayer", "GatedBlock"} and kinds & {"MaskedSublayer", "MaskedBlock"}
        with torch.no_grad(), use_backend("reference"):
            torch.testing.assert_close(mask_gates(model)(inputs), model(inputs), rtol=1e-4, atol=1e-5)


def test_a_recurrent_program_takes_any_batch_of_its_context_and_others_any_length(
    trip_of: Callable[[int], Exported],
):
    assert sizes_of(trip_of(0).program) == [None, None] and sizes_of(trip_of(4).program) == [None, 8]


@pytest.mark.parametrize(
    "number", [pytest.param(1, marks=pytest.mark.slow), 6], ids=lambda number: str(SETTINGS[number])
)
def test_an_onnx_graph_computes_the_same_with_its_gates_masked(
    trip_of: Callable[[int], Exported], number: int, tmp_path: Path
):
    trip = trip_of(number)
    write_onnx(trip.program, tmp_path / "model.onnx", "inputs")
    inputs = check_inputs("onnx", trip.space, trip.arch, 0, sizes_of(trip.program))
    assert check("onnx", tmp_path, trip.model, inputs) < 1e-4


def test_without_its_packages_onnx_says_what_to_install(
    trip_of: Callable[[int], Exported], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="pip install 'hypernas"):
        write_onnx(trip_of(6).program, tmp_path / "model.onnx", "images")
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
