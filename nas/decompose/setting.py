"""The setting of an exported model, read back from its folder."""

from collections.abc import Mapping
from typing import Any, get_type_hints

import torch

from hypernas.config.keys import COUNTED, SEARCHED
from hypernas.data.tasks import TASKS
from hypernas.errors import UserError
from hypernas.export.card import require
from hypernas.export.read import space_of
from hypernas.records import Recipe
from hypernas.training.device import worker_device
from hypernas.training.model import load_checked_data
from hypernas.training.run import Setting


def read_setting(
    folder: str,
    config: Mapping[str, Any],
    data_path: str | None,
    device: torch.device | None = None,
    own: str | None = None,
) -> Setting:
    """The setting of an export; `own` names its space's code.

    Raises UserError, and DataError when the data is not the data it was trained on.
    """
    space, arch = space_of(folder, config, own)
    training, data = config["training"], config["data"]
    if "seed" not in data:
        raise UserError(
            f"{folder} does not say in which order it saw its data, so no control can be trained: export anew"
        )
    total, batch = COUNTED[space.task]
    kinds = get_type_hints(Recipe)
    counts = dict.fromkeys((total, batch, "train.seed"), int)
    require(folder, config, "training", {name: kinds[attribute] for name, attribute in SEARCHED.items()} | counts)
    require(folder, config, "data", {"path": str | None, "hash": str, "seed": int})
    searched = {attribute: training[name] for name, attribute in SEARCHED.items()}
    recipe = Recipe(**searched, tokens=training[total], batch_tokens=training[batch], seed=training["train.seed"])
    found = load_checked_data(space.task, data_path or data["path"], data["hash"])
    return Setting(space, arch, TASKS[space.task], found, recipe, data["seed"], device or worker_device())
