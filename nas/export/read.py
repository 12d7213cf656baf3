"""An exported folder on its way back in: checked against its model card, and loaded. It runs none of the folder's code.

The weights are a safetensors file, which holds tensors and no code; the network is built by the installed hypernas from
the architecture in config.json.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from hypernas.data.tasks import TASKS
from hypernas.errors import UserError
from hypernas.export.card import read_config, require
from hypernas.records import Recipe, SpaceSpec, shorten
from hypernas.search_spaces import is_built_in, stored_space
from hypernas.search_spaces.base import Space, SpaceError
from hypernas.search_spaces.blocks import BLOCK_NETS, cut
from hypernas.training.device import deterministic, worker_device
from hypernas.training.model import score

SCORED_AT_ONCE = 8192  # tokens, or images
# Times the numbers that weights hold: nets in blocks were dense before they were cut, and positions are computed.
LARGER = 64


def load(folder: str | Path, *, space: str | None = None) -> nn.Module:
    """The trained network of an export, in evaluation mode, built of the installed layers with their fast kernels.

    `space` names the code of a space of one's own, FILE.py:Class or pkg.module:Class: no export names code for others
    to run. Raises UserError as `read_config`, and where the architecture is of a space that is not here.
    """
    return _load(folder, read_config(folder), space)


def _load(folder: str | Path, config: Mapping[str, Any], own: str | None = None) -> nn.Module:
    """`load` of a folder whose files were checked."""
    space, arch = space_of(folder, config, own)
    path = Path(folder) / "model.safetensors"
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}; copy it again or export anew") from error
    return build_trained(str(path), space, arch, tensors, config.get("blocks") or {})


def build_trained(
    path: str,
    space: Space,
    arch: Any,
    tensors: Mapping[str, torch.Tensor],
    blocks: Mapping[str, Sequence[Sequence[int]]] | None = None,
) -> nn.Module:
    """The network with these weights, which are of `path`, in evaluation mode.

    `blocks` are coordinates and units by the name of a feed-forward net. Raises UserError where the weights are not the
    architecture's, before memory is taken for one that is far larger than they are.
    """
    blocks = {name: sizes for name, sizes in (blocks or {}).items() if sizes}
    _check_size(path, space, arch, tensors, LARGER if blocks else 1)
    model: nn.Module = space.build(arch)
    for name, sizes in blocks.items():
        _put_blocks(path, model, name, sizes)
    _check_tensors(path, model, tensors)
    model.load_state_dict(tensors)
    return model.eval()


def _check_size(path: str, space: Space, arch: Any, tensors: Mapping[str, torch.Tensor], larger: int) -> None:
    """Raises UserError where the architecture would take far more memory than the weights that it is said to have.

    A space of one's own is taken at its word.
    """
    if not is_built_in(space):
        return
    held, parameters = sum(tensor.numel() for tensor in tensors.values()), space.cost(arch).parameters_total
    places: int = getattr(arch, "context", 0) or getattr(arch, "tokens", 0)
    positions = places * max(getattr(arch, "head_dim", 0), getattr(arch, "d_model", 0))
    if parameters > held * larger or positions > held * LARGER:
        raise UserError(
            f"{path} cannot be of its architecture, which has {parameters:,} parameters, and this holds {held:,} "
            "numbers: copy the whole folder again or export anew"
        )


def _put_blocks(path: str, model: nn.Module, name: str, sizes: Sequence[Sequence[int]]) -> None:
    """Puts blocks of these coordinates and units in place of a dense net. Raises UserError where they do not fit."""
    try:
        net: Any = model.get_submodule(name)
        outputs, units = net.out.weight.shape if type(net) in BLOCK_NETS else (0, 0)
    except AttributeError:
        outputs, units = 0, 0
    parts = list(zip(*sizes, strict=False)) if all(len(size) == 2 and min(size) >= 0 for size in sizes) else []
    if len(parts) != 2 or sum(parts[0]) > outputs or sum(parts[1]) > units:
        raise UserError(f"{path} cannot run in the blocks that its config.json has for {name!r}: export it anew")
    model.set_submodule(name, cut(net, *([torch.arange(count) for count in part] for part in parts)))


def _check_tensors(path: str, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises UserError naming the first tensor that is not as the model has it, or holds what is no number."""
    wanted = model.state_dict()
    for name, tensor in wanted.items():
        found = tensors.get(name)
        if found is None:
            said = f"{name} is missing"
        elif found.shape != tensor.shape or found.dtype != tensor.dtype:
            said = f"{name} is {found.dtype} {tuple(found.shape)}, wanted {tensor.dtype} {tuple(tensor.shape)}"
        elif not found.isfinite().all():
            said = f"{name} holds values that are no finite numbers"
        else:
            continue
        raise UserError(f"{path} has other weights than its architecture: {said}; copy it again or export anew")
    if more := sorted(tensors.keys() - wanted.keys()):
        raise UserError(f"{path} has more than its architecture has: {shorten(more[0])}; copy it again or export anew")


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
    require(folder, config, "training", {"optim.lr": float, f"train.{task.unit}s": int})
    numbers = {name: Sequence[float] for name in ("mean", "std") if space.task == "images"}
    require(folder, config, "data", {"path": str | None, "hash": str, **numbers})
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
