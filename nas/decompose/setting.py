"""A model of an export with its data, ready to be taken apart."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hypernas.config.keys import COUNTED, SEARCHED
from hypernas.data.tasks import TASKS, Batch, Steps, Task, steps_of, to_device
from hypernas.errors import UserError
from hypernas.export.read import space_of
from hypernas.records import Recipe
from hypernas.search_spaces.base import Space
from hypernas.training.device import worker_device
from hypernas.training.model import checked_data


@dataclass(frozen=True, slots=True)
class Setting:
    """What an exported model was trained on, and how."""

    space: Space
    arch: Any
    task: Task
    data: Any
    recipe: Recipe
    data_seed: int
    device: torch.device = field(default_factory=worker_device)  # where everything is trained and compared

    @property
    def steps(self) -> Steps:
        return steps_of(self.task, self.arch, self.recipe)

    def batch(self, step: int, device: torch.device) -> Batch:
        return to_device(self.task.batch(self.data, self.arch, self.data_seed, step, self.steps.samples), device)

    def validation(self) -> Iterator[Batch]:
        return self.task.validation(self.data, self.arch, self.recipe, self.steps.samples)


def read_setting(
    folder: str, config: Mapping[str, Any], data_path: str | None, device: torch.device | None = None
) -> Setting:
    """The setting of an export. Raises UserError, and DataError when the data is not the data it was trained on."""
    space, arch = space_of(folder, config)
    training, data = config["training"], config["data"]
    if "seed" not in data:
        raise UserError(
            f"{folder} does not say in which order it saw its data, so no control can be trained: export anew"
        )
    total, batch = COUNTED[space.task]
    searched = {attribute: training[name] for name, attribute in SEARCHED.items()}
    recipe = Recipe(**searched, tokens=training[total], batch_tokens=training[batch], seed=training["train.seed"])
    found = checked_data(space.task, data_path or data["path"], data["hash"])
    return Setting(space, arch, TASKS[space.task], found, recipe, data["seed"], device or worker_device())
