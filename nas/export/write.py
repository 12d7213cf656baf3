"""Takes a trained trial home: a folder with readable source, weights, configuration and a model card.

Nothing is reported as exported before a fresh process, which cannot import hypernas, has loaded every format of the
folder and returned the trained model's own logits (nas/export/formats.py).
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file

from hypernas.config.keys import MEASURED
from hypernas.data.tasks import TASKS
from hypernas.errors import StudyError
from hypernas.export import formats
from hypernas.export.card import CARD, CONFIG_VERSION, digest, list_files
from hypernas.export.read import build_trained
from hypernas.export.request import GRAPHS, check_room, free_folder, wanted_formats
from hypernas.export.source import write_source
from hypernas.files import new_folder
from hypernas.records import OWN, StudyRow, Trial
from hypernas.search_spaces import stored_space
from hypernas.search_spaces.base import Space
from hypernas.show.json_shapes import cost_json, training_json
from hypernas.show.terminal import make_console
from hypernas.show.views import Lines
from hypernas.show.words import describe_values
from hypernas.store import Reader, Store
from hypernas.store.weights import find_weights, keep_weights, should_keep_weights
from hypernas.study.driver import retrain
from hypernas.study.search import make_job
from hypernas.training.device import deterministic
from hypernas.training.repeats import of_first_seed
from hypernas.version import version

FOOTER = '''
from pathlib import Path


def load(folder: str | Path | None = None) -> {kind}:
    """The trained model, in evaluation mode; `folder` holds model.safetensors (default: this file's own folder)."""
    from safetensors.torch import load_file

    model = build()
    model.load_state_dict(load_file(Path(folder or Path(__file__).parent) / "model.safetensors"))
    return model.eval()
'''

LM_USAGE = """\
import torch
from model import load

model = load()
prompt = torch.tensor([list(b"import ")])  # a byte is a token
text = model.generate(prompt, 200, 0.8, torch.Generator().manual_seed(0))
print(bytes(text[0].tolist()).decode(errors="replace"))
"""

IMAGE_USAGE = """\
import torch
from model import build, load

model = load()
images = torch.zeros(1, {shape})  # normalised by the mean and deviation in config.json
print(model(images).softmax(-1))
"""


def export_trial(
    store: Reader, study: StudyRow, trial: Trial, *, out: str, formats: str, progress: bool = True, train: bool = True
) -> dict[str, Any]:
    """Writes a trial that `choose` gave to the folder; `nas export --json`. Raises UserError before it writes.

    Without `train` weights that are not kept are refused, not trained again.
    """
    kinds = wanted_formats(formats)
    folder = free_folder(out)
    check_room(folder, trial.parameters)
    chosen = of_first_seed(trial)
    if not train and find_weights(store, study, trial.number) is None:
        raise StudyError(f"the weights of trial {trial.number} are not kept, and here nothing is trained")
    space = stored_space(study.space)
    deterministic(space)
    model = load_trained(store, study, chosen, progress=progress)
    with make_console(stderr=True, quiet=not progress).status("writing and checking the model"):
        differences = write_checked(folder, study, chosen, space, model, kinds)
    return {
        "trial": chosen.number,
        "folder": out,
        "files": sorted(path.name for path in folder.iterdir()),
        "checked": ", ".join(f"{kind} {difference:g}" for kind, difference in differences.items()),
    }


def load_trained(store: Reader, study: StudyRow, trial: Trial, *, progress: bool = True) -> torch.nn.Module:
    """The trained network, in evaluation mode. Raises StudyError as `trained_weights`."""
    space = stored_space(study.space)
    tensors = load_tensors(trained_weights(store, study, trial, progress=progress))
    return build_trained(f"the file of trial {trial.number}", space, space.from_json(trial.arch), tensors)


def write_checked(
    folder: Path, study: StudyRow, trial: Trial, space: Space, model: torch.nn.Module, kinds: tuple[str, ...]
) -> dict[str, float]:
    """Writes the export beside `folder`, checks every format, and moves it there; the largest differences by format.

    Raises UserError for a format that this model cannot have, RuntimeError for one that is not the model.
    """
    with new_folder(folder) as partial:
        sizes = write_folder(partial, study, trial, space, model, kinds)
        arch = space.from_json(trial.arch)
        differences = {}
        for kind in kinds:
            inputs = formats.check_inputs(kind, space, arch, trial.number, [None, None] if kind == "py" else sizes)
            differences[kind] = formats.check(kind, partial, model, inputs)
    return differences


def trained_weights(store: Reader, study: StudyRow, trial: Trial, *, progress: bool = True) -> bytes:
    """The trial's weights, kept or trained again from its row, and then kept if `store` may be written to.

    `progress`: whether training again is said and shown on stderr.

    Raises StudyError when training it again gives other values.
    """
    kept = find_weights(store, study, trial.number)
    if kept is not None:
        return kept
    if study.settings.evaluate == OWN:
        raise StudyError(
            f"the weights of trial {trial.number} are not kept, and no study names the code of one's own that "
            f"evaluates {study.name!r}: they cannot be made again here"
        )
    console = make_console(stderr=True, quiet=not progress)
    console.print(f"the weights of trial {trial.number} are not kept: training it again from its row")
    with Lines(1, 0, TASKS[study.settings.task].unit, console) as view:
        result = retrain(replace(make_job(store, study, trial), repeats=1), view)
    if result.failure:
        raise StudyError(f"trial {trial.number} cannot be trained again: {result.failure.message}")
    for name, value in of_first_seed(trial).values.items():
        # What was measured on a clock, or found out later (nas scale), no training gives again.
        if name in result.values and name not in MEASURED and result.values[name] != value:
            raise StudyError(
                f"trial {trial.number} trained again has {name} {result.values[name]!r}, not {value!r}: "
                f"it was trained elsewhere ({trial.provenance}); export it there"
            )
    if isinstance(store, Store) and should_keep_weights(store, study, trial.number):
        try:
            keep_weights(store, study, trial.number, result.weights)
        except OSError as error:  # what they were trained for may have room elsewhere
            said = f"the weights of trial {trial.number} could not be kept in the study: {error}"
            console.print(said, markup=False, soft_wrap=True)
    return result.weights


def write_folder(
    folder: Path, study: StudyRow, trial: Trial, space: Space, model: torch.nn.Module, kinds: tuple[str, ...]
) -> list[int | None]:
    """Fills the folder with every file of the export; the sizes of the graphs' input, None where they take any."""
    title = f"Trial {trial.number} of study {study.name}"
    docstring = f"{title}, found by hypernas {version()}. Needs torch; `load` also needs safetensors."
    source = write_source(
        model, docstring.replace("\\", "/").replace('"', "'"), FOOTER.format(kind=type(model).__name__)
    )
    (folder / "model.py").write_text(source)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    arch = space.from_json(trial.arch)
    sizes: list[int | None] = [None, None]
    if set(kinds) & set(GRAPHS):
        program = formats.export_program(model, space, arch)
        sizes = formats.sizes_of(program)
        if "pt2" in kinds:
            torch.export.save(program, folder / GRAPHS["pt2"])
        if "onnx" in kinds:
            name = "tokens" if space.task == "text" else "images"
            formats.write_onnx(program, folder / GRAPHS["onnx"], name)
    config = {
        "version": CONFIG_VERSION,
        "hypernas": version(),
        "study": study.name,
        "trial": trial.number,
        "space": study.space.name,
        **cost_json(space, arch),
        "training": training_json(study, trial),
        "values": dict(trial.values),
        "data": {
            "name": study.data_name,
            "hash": study.data_hash,
            "path": study.settings.data_path,
            "seed": study.settings.seed,
            **study.settings.scaling,
        },
        "provenance": dict(trial.provenance),
        "sha256": {path.name: digest(path) for path in sorted(folder.iterdir())},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    graphs = graph_notes(kinds, sizes, gated="gates" in config["parameters"] and config["parameters"]["gates"] > 0)
    (folder / CARD).write_text(model_card(title, study, trial, config, graphs, list_files(folder)))
    return sizes


def graph_notes(kinds: tuple[str, ...], sizes: list[int | None], gated: bool) -> str:
    """What the card says of the formats beside the source."""
    lines = []
    shape = "any batch" + ("" if len(sizes) > 2 else " and any length" if sizes[1] is None else f", {sizes[1]} tokens")
    if "pt2" in kinds:
        lines.append(f'- `model.pt2`: `torch.export.load("model.pt2").module()(inputs)`, {shape}.')
    if "onnx" in kinds:
        lines.append(f"- `model.onnx`: for ONNX runtimes, float32, {shape}.")
    if lines and gated:
        lines.append(
            "\nGraphs take no decisions on data: they compute what a gate skips and multiply it by 0. The numbers are "
            "the same, the FLOPs are those of the whole architecture; `model.py` skips for real."
        )
    return "\n## Other formats\n\n" + "\n".join(lines) + "\n" if lines else ""


def model_card(title: str, study: StudyRow, trial: Trial, config: dict[str, Any], graphs: str, hashes: str) -> str:
    """What it is, how it was found, what it scored, how to load it."""
    flops = next(value for name, value in config.items() if name.startswith("flops_per_"))
    usage = LM_USAGE if "vocab" in trial.arch else IMAGE_USAGE.format(
        shape=", ".join(str(trial.arch[f"image.{side}"]) for side in ("channels", "height", "width"))
    )  # fmt: skip
    arch = "\n".join(f"| `{name}` | {value} |" for name, value in trial.arch.items())
    parts = "\n".join(
        f"| {part} | {config['parameters'].get(part, ''):,} | {count:,} |"
        if part in config["parameters"]
        else f"| {part} | | {count:,} |"
        for part, count in flops.items()
    )
    training = ", ".join(f"{name} {value}" for name, value in config["training"].items())
    return f"""# {title}

{describe_values(trial.values)}; {trial.parameters:,} parameters.

Run in this folder; it needs only torch and safetensors:

```python
{usage}```
{graphs}
## What it is

| key | value |
|---|---|
{arch}

| part | parameters | FLOPs, forward |
|---|---|---|
{parts}

1 multiply-accumulate is 2 FLOPs. FLOPs here are of the whole architecture; a gated net's measured value, above, counts
its gates by the share of inputs that they let through on validation.

## How it was found

By hypernas {config["hypernas"]}, study {study.name!r}, trial {trial.number} ({trial.origin}).
Trained on {study.data_name} (sha256 {study.data_hash[:16]}...): {training}.
Trained with torch {trial.provenance.get("torch")}, Python {trial.provenance.get("python")} on
{trial.provenance.get("device")} ({trial.provenance.get("cpu")}).

{hashes}
"""
