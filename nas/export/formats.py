"""The files of an exported model beside its source: a torch.export program and an ONNX graph, and how each is checked.

Both are graphs without decisions on data: where a gate would skip a token or an image, they compute it and multiply it
by 0. Source and weights (`py`) skip for real. Every format is loaded again in a process that cannot import hypernas,
on several shapes, and its logits compared, before anything is reported as exported.
"""

import copy
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hypernas.errors import UserError
from hypernas.files import scratch_folder
from hypernas.kernels.dispatch import use_backend
from hypernas.search_spaces.base import Space
from hypernas.search_spaces.layers import GatedSublayer
from hypernas.search_spaces.nets.vision import GatedBlock

CHECK_SECONDS = 300
# Of the largest logit: sums in another order, or fused by the runtime, and for bfloat16 its 8 bits of mantissa.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}

BARE = """\
import sys
for name in ("hypernas",):
    sys.modules[name] = None  # importing it fails
sys.path.insert(0, ".")
import torch
from safetensors.torch import load_file
torch.set_num_threads(1)
given = load_file(sys.argv[1])
"""
RUNS = {
    "py": """\
from model import load
torch.use_deterministic_algorithms(True)
def run(name, inputs):
    model = load().to(getattr(torch, name.partition("/")[0]))
    return model(inputs)
""",
    "pt2": """\
program = torch.export.load("model.pt2").module()
def run(name, inputs):
    return program(inputs)
""",
    "onnx": """\
import onnxruntime
onnxruntime.set_default_logger_severity(3)
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
def run(name, inputs):
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0])
""",
}
SAVE = """\
with torch.no_grad():
    torch.save({name: run(name, inputs) for name, inputs in given.items()}, sys.argv[2])  # needs no numpy
"""


class MaskedSublayer(GatedSublayer):
    """Runs its branch for every token, whatever its gate says, and multiplies what the gate skips by 0."""

    def forward(self, h: Tensor) -> Tensor:
        y: Tensor = self.gate(h, self.branch(h))
        return y


class MaskedBlock(GatedBlock):
    """Runs its branch for every image, whatever its gate says, and multiplies what the gate skips by 0."""

    def forward(self, x: Tensor) -> Tensor:
        same = self.shortcut(x)
        y: Tensor = self.gate(same.flatten(1), self.branch(x).flatten(1), x.mean((-2, -1))).view_as(same)
        return same + y


MASKED: Mapping[type, type[nn.Module]] = {GatedSublayer: MaskedSublayer, GatedBlock: MaskedBlock}


def mask_gates(model: nn.Module) -> nn.Module:
    """A copy of `model`, in evaluation mode, that computes what its gates skip; the same function."""
    copied = copy.deepcopy(model).eval()
    for module in list(copied.modules()):
        for name, child in list(module.named_children()):
            if type(child) in MASKED:
                arguments = dict(child.named_children())  # a gated module is made of its parts
                module.add_module(name, MASKED[type(child)](**arguments))
    return copied.eval()


def example_inputs(space: Space, arch: Any, seed: int, samples: int, tokens: int | None = None) -> Tensor:
    """Random inputs of the model's own kind: (samples, tokens) integers, or (samples, C, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    if space.task == "text":
        return torch.randint(arch.vocab, (samples, tokens or arch.context), generator=generator)
    return torch.randn(samples, *arch.input_shape, generator=generator)


def export_program(model: nn.Module, space: Space, arch: Any) -> torch.export.ExportedProgram:
    """`model` as a torch.export program, its batch and, where the architecture can, its sequence length open.

    Raises UserError for a model that torch.export cannot trace.
    """
    half = None if space.task != "text" else max(2, arch.context // 2)
    with use_backend("reference"), torch.no_grad(), _quiet():
        try:
            program = _trace(model, example_inputs(space, arch, 0, 3, half))
            if space.task == "text" and sizes_of(program)[1] is not None:
                # A recurrent net is unrolled over a fixed length: its context.
                program = _trace(model, example_inputs(space, arch, 0, 3))
        except Exception as error:  # torch.export raises whatever its tracers do
            raise UserError(
                f"--formats pt2: torch.export cannot trace {type(model).__name__}: {_first(error)}"
            ) from error
    return program


def _trace(model: nn.Module, inputs: Tensor) -> torch.export.ExportedProgram:
    # Images have one size; only batch and sequence length are open.
    open_axes = dict.fromkeys(range(2 if inputs.ndim == 2 else 1), torch.export.Dim.AUTO)
    return torch.export.export(mask_gates(model), (inputs,), dynamic_shapes=(open_axes,))


def sizes_of(program: torch.export.ExportedProgram) -> list[int | None]:
    """The sizes of the program's input, None where it takes any."""
    inputs = next(node for node in reversed(program.graph.nodes) if node.op == "placeholder")
    # A size that tracing found to be fixed prints as its number, whether it is one or still a symbol.
    return [int(str(size)) if str(size).isdigit() else None for size in inputs.meta["val"].shape]


def write_onnx(program: torch.export.ExportedProgram, path: Path, name: str) -> None:
    """Writes the program as an ONNX graph with one input, `name`. Raises UserError where that cannot be done."""
    try:
        import onnxruntime  # noqa: F401 - the check needs it
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise UserError("--formats onnx needs onnxscript and onnxruntime: pip install 'hypernas[onnx]'") from error
    with torch.no_grad(), _quiet():
        try:
            written = torch.onnx.export(
                program, dynamo=True, input_names=[name], output_names=["logits"], verbose=False
            )
        except Exception as error:  # as torch.export
            raise UserError(f"--formats onnx: this model cannot be written as ONNX: {_first(error)}") from error
    assert written is not None
    written.save(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Tracers warn of operators and packages that have nothing to do with the model."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_inputs(kind: str, space: Space, arch: Any, seed: int, sizes: list[int | None]) -> dict[str, Tensor]:
    """Random inputs to compare a format on, by dtype and number: several shapes, and for `py` several dtypes."""
    dtypes = ("float32", "bfloat16", "float64") if kind == "py" else ("float32",)
    length = sizes[1] if space.task == "text" else None
    shapes = [(3, length), (1, length or 1), (2, length or max(1, getattr(arch, "context", 0) * 2 // 3))]
    out: dict[str, Tensor] = {}
    for dtype in dtypes:
        for number, (samples, tokens) in enumerate(shapes):
            inputs = example_inputs(space, arch, seed + number, samples, tokens)
            out[f"{dtype}/{number}"] = inputs.to(getattr(torch, dtype)) if inputs.is_floating_point() else inputs
    return out


def check(kind: str, folder: Path, model: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """Loads `folder` in a process that cannot import hypernas; the largest difference of its float32 logits.

    `inputs` is of `check_inputs`. Raises RuntimeError when any logits differ from `model`'s by more than rounding, or
    the folder does not load: the export is not the model.
    """
    with scratch_folder(stem="nas-check-") as scratch:
        given, got = scratch / "inputs.safetensors", scratch / "logits.pt"
        save_file(dict(inputs), given)
        command = [sys.executable, "-I", "-B", "-c", BARE + RUNS[kind] + SAVE, str(given), str(got)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=CHECK_SECONDS, check=False)
        if done.returncode:
            raise RuntimeError(f"the exported folder does not load as {kind}:\n{done.stderr}")
        logits = torch.load(got, weights_only=True)
    differences = [0.0]
    for name, batch in inputs.items():
        dtype = getattr(torch, name.partition("/")[0])
        with torch.no_grad(), use_backend("reference"):
            wanted = copy.deepcopy(model).to(dtype)(batch)
        difference = (logits[name].double() - wanted.double()).abs().max().item()
        if not difference <= TOLERANCE[dtype] * max(1.0, wanted.abs().max().item()):
            raise RuntimeError(
                f"the exported model's logits ({kind}, {name}) differ by {difference:g} from the trained model's"
            )
        if dtype == torch.float32:
            differences.append(difference)
    return max(differences)
