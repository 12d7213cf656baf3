"""An exported folder on its way back in: checked against its model card, and loaded. It runs none of the folder's code.

The weights are a safetensors file, which holds tensors and no code; the network is built by the installed hypernas from
the architecture in config.json.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from hypernas.data.tasks import TASKS
from hypernas.errors import UserError
from hypernas.export.card import read_config
from hypernas.records import Recipe, SpaceSpec
from hypernas.search_spaces import stored_space
from hypernas.search_spaces.base import Space, SpaceError
from hypernas.search_spaces.blocks import cut
from hypernas.training.device import deterministic, worker_device
from hypernas.training.model import score

SCORED_AT_ONCE = 8192  # tokens, or images


def load(folder: str | Path, *, space: str | None = None) -> nn.Module:
    """The trained network of an export, in evaluation mode, built of the installed layers with their fast kernels.

    `space` names the code of a space of one's own, FILE.py:Class or pkg.module:Class: no export names code for others
    to run. Raises UserError as `read_config`, and where the architecture is of a space that is not here.
    """
    return _load(folder, read_config(folder), space)


def _load(folder: str | Path, config: Mapping[str, Any], own: str | None = None) -> nn.Module:
    """`load` of a folder whose files were checked."""
    space, arch = space_of(folder, config, own)
    model: nn.Module = space.build(arch)
    for name, sizes in config.get("blocks", {}).items():
        if sizes:
            some = ([torch.arange(count) for count in part] for part in zip(*sizes, strict=True))
            model.set_submodule(name, cut(model.get_submodule(name), *some))
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return model.eval()


def space_of(folder: str | Path, config: Mapping[str, Any], own: str | None = None) -> tuple[Space, Any]:
    """The space and the architecture of an export; `own` names its space's code where that is not ours.

    Raises UserError where they are not here, or nobody but the folder names the code.
    """
    try:
        space = stored_space(SpaceSpec(own or str(config["space"]), own=own is not None))
        return space, space.from_json(config["arch"])
    except SpaceError as error:
        raise UserError(f"{folder} cannot be built here: {error}; its model.py stands alone") from error


def generate(
    folder: str,
    prompt: str,
    *,
    count: int,
    temperature: float,
    seed: int,
    device: torch.device | None = None,
    space: str | None = None,
) -> str:
    """`prompt` and `count` sampled bytes after it. Raises UserError for a model of images or an empty prompt.

    `space` is as in `load`. A seed draws the same bytes on the same kind of device; None is the GPU, if there is one.
    """
    config = read_config(folder)
    if "vocab" not in config["arch"]:
        raise UserError(f"{folder} classifies images: only a language model continues a text")
    tokens = list(prompt.encode())
    if not tokens:
        raise UserError("--prompt: wanted some text to continue")
    if max(tokens) >= config["arch"]["vocab"]:
        raise UserError(f"--prompt: {folder} has {config['arch']['vocab']} tokens, and bytes go up to {max(tokens)}")
    device = device or worker_device()
    model: Any = _load(folder, config, space).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    out = model.generate(torch.tensor([tokens], device=device), count, temperature, generator)
    return bytes(min(token, 255) for token in out[0].tolist()).decode(errors="replace")


def evaluate(
    folder: str,
    data_path: str | None,
    device: torch.device | None = None,
    say: Callable[[str], None] = lambda line: None,
    *,
    own: str | None = None,
) -> dict[str, Any]:
    """Scores the model on the validation part of `data_path`, or of the data it was trained on.

    On `device`; None is the GPU, where there is one. `say` takes a line of what was read and what left out. `own` names
    its space's code, as `space` of `load`.

    Returns `nas evaluate --json`: the data's name and hash, loss and accuracy. Raises UserError, and DataError when
    the data cannot be read.
    """
    config = read_config(folder)
    space, arch = space_of(folder, config, own)
    task = TASKS[space.task]
    model = _load(folder, config, own).to(device or worker_device())
    data = task.load(data_path or config["data"]["path"])
    say(data.reading.describe(data.name))
    trained = config["training"]
    if space.task == "images":
        shape = data.test_images.shape[1:]
        if shape != arch.input_shape:
            raise UserError(f"{data.name} has images of {shape}, {folder} reads {arch.input_shape}")
        # As the model saw its images, whatever these ones' own mean is.
        data = replace(data, mean=tuple(config["data"]["mean"]), std=tuple(config["data"]["std"]))
    deterministic(space)
    recipe = Recipe(trained["optim.lr"], tokens=trained[f"train.{task.unit}s"])
    samples = max(1, SCORED_AT_ONCE // task.units(arch))
    scored = score(model, task.validation(data, arch, recipe, samples), task.nats)
    return {
        "data": data.name,
        "hash": data.hash,
        "trained_on_it": data.hash == config["data"]["hash"],
        task.loss: scored.loss,
        "accuracy": scored.accuracy,
    }
