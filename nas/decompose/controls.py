"""Control nets: trained as the model was, with other seeds, to tell structure from chance."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from hypernas.decompose.nets import nets_of
from hypernas.errors import UserError
from hypernas.files import write_whole
from hypernas.training.run import Setting, prepare

CO_ACTIVE_TOKENS = 4096  # of validation, for the graph of co-activation


def train(setting: Setting, name: str, say: Callable[[str], None], shuffled_by: int | None = None) -> nn.Module:
    """The setting's own training, from its own initial weights, on the same inputs in the same order.

    With `shuffled_by` the targets of every batch are shuffled, by that number: all that training does to weights where
    there is nothing to learn.
    """
    run = prepare(setting)
    for step in range(run.steps):
        inputs, classes = setting.batch(step)
        if shuffled_by is not None:
            seed = int(np.random.SeedSequence([shuffled_by, step]).generate_state(1)[0])
            order = torch.randperm(classes.numel(), generator=torch.Generator().manual_seed(seed)).to(setting.device)
            classes = classes.flatten()[order].view_as(classes)
        run.step((inputs, classes))
        if 10 * run.done // run.steps > 10 * step // run.steps:
            say(f"{name}: step {run.done} of {run.steps}, loss {run.loss():.4f}")
    return run.model.eval()


def load_or_train(
    setting: Setting, name: str, folder: Path, say: Callable[[str], None], shuffled_by: int | None = None
) -> nn.Module:
    """The model that `train` gives; where an earlier call left it in `folder`, it is read from there."""
    path = folder / f"{name.replace(' ', '-')}.safetensors"
    if path.exists():
        model = setting.build()
        model.load_state_dict(load_file(path))
        return model.eval()
    model = train(setting, name, say, shuffled_by)
    write_whole(path, save({name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}))
    return model


@torch.no_grad()
def activities(model: nn.Module, setting: Setting) -> dict[str, np.ndarray]:
    """What the hidden units of each net do on validation: (N, H), N up to CO_ACTIVE_TOKENS where no gate skips."""
    seen: dict[str, list[Tensor]] = {name: [] for name in nets_of(model)}
    hooks = [
        net.out.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0].flatten(0, -2)))
        for name, net in nets_of(model).items()
    ]
    for count, (inputs, _) in enumerate(setting.validation(), 1):
        model(inputs.to(setting.device))
        if count * setting.steps.units >= CO_ACTIVE_TOKENS:
            break
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts).float().cpu().numpy() for name, parts in seen.items()}


def controls_folder(target: Path, config: Mapping[str, Any]) -> Path:
    """Where controls are kept while the command runs. Raises UserError where those of another model are."""
    scratch = target.with_name(f"{target.name}.controls")
    scratch.mkdir(exist_ok=True)
    owner = scratch / "of"
    mine = config["sha256"]["model.safetensors"]
    if owner.exists() and owner.read_text() != mine:
        raise UserError(f"{scratch} has the controls of another model: delete it, or name another --out")
    owner.write_text(mine)
    return scratch
