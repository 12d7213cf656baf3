"""A training under way: what is trained on what (`Setting`), and how far that is (`Run`).

Whoever trains prepares a run, hands it one batch after the other, and scores it; which batches, how long, and what is
said meanwhile is theirs. A search's trial (evaluate.py), its re-training (nas/export/retrain.py), the controls of a
decomposition, the measurement of a study's reference and the estimate of a ladder's time are all trained here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hypernas.data.tasks import TASKS, Batch, Steps, Task, steps_of, to_device
from hypernas.records import RUNGS, Job, Recipe, Report
from hypernas.search_spaces.base import Cost, Space
from hypernas.search_spaces.gates import execution_rates, reset_rates
from hypernas.training import cuda_graph
from hypernas.training.device import compile_parts, mixed_precision, worker_device
from hypernas.training.model import Score, load_checked_data, name_values, score, scoring_samples, seeded_build
from hypernas.training.step import Losses, make_optimizers, train_step, training_flops


@dataclass(frozen=True, slots=True)
class Setting:
    """An architecture, what it is trained on, how and where."""

    space: Space
    arch: Any
    task: Task
    data: Any
    recipe: Recipe
    data_seed: int
    device: torch.device = field(default_factory=worker_device)

    @property
    def steps(self) -> Steps:
        return steps_of(self.task, self.arch, self.recipe)

    @property
    def cost(self) -> Cost:
        return self.space.cost(self.arch)

    def build(self) -> nn.Module:
        """The model on the device, its initial weights drawn from the recipe's seed."""
        return seeded_build(self.space, self.arch, self.recipe.seed).to(self.device)

    def batch(self, step: int, samples: int | None = None, part: int = 0, parts: int = 1) -> Batch:
        """The batch of a step on the device, by default of as many samples as the recipe says; or one of its parts."""
        samples = samples or self.steps.samples
        batch = self.task.batch(self.data, self.arch, self.data_seed, step, samples)
        inputs, classes = (tensor.chunk(parts)[part] for tensor in batch)
        return to_device((inputs, classes), self.device)

    def validation(self, samples: int | None = None) -> Iterator[Batch]:
        """The batches to score a model on, not yet on the device; by default as large as those it is trained on."""
        return self.task.validation(self.data, self.arch, self.recipe, samples or self.steps.samples)


def job_setting(job: Job, space: Space, device: torch.device) -> Setting:
    """The setting of a job. Raises DataError where the data here is not its study's; SpaceError."""
    data = load_checked_data(space.task, job.data_path, job.data_hash)
    return Setting(space, space.from_json(job.arch), TASKS[space.task], data, job.recipe, job.data_seed, device)


@dataclass(slots=True)
class Run:
    """A training of `steps` steps, of which `done` are done. `stepped` is the model as a step calls it: itself, on CUDA
    graphs, or shared with other processes; weights are the model's own in each."""

    setting: Setting
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    stepped: nn.Module
    losses: Losses
    steps: int
    micro_batches: int
    done: int = 0
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    cuda_graph: str | None = None  # whether its steps are on CUDA graphs, and why not; None where there is no GPU

    def capture(self, *, compiled: bool) -> None:
        """Puts the steps on CUDA graphs, on a GPU and where that can be."""
        if self.setting.device.type == "cuda":
            inputs, _ = self.setting.batch(self.done)
            self.stepped, self.cuda_graph = cuda_graph.try_capture(
                self.setting.space,
                self.model,
                inputs,
                mixed_precision,
                compiled=compiled,
                micro_batches=self.micro_batches,
            )

    def step(self, batch: Batch) -> None:
        """Trains on a batch. Raises DivergedError where a loss is not finite; on a GPU as late as `Losses` reads it."""
        loss = train_step(
            self.stepped, self.optimizers, batch, self.setting.recipe, self.done, self.steps, self.micro_batches
        )
        self.losses.add(self.done, loss)
        self.done += 1

    def loss(self) -> float:
        """The last step's loss, in the task's unit. Waits for a GPU; raises DivergedError."""
        return self.losses.read() / self.setting.task.nats

    @property
    def scoring_samples(self) -> int:
        """Samples in a batch of `score`."""
        return scoring_samples(self.setting.steps, self.setting.cost, self.micro_batches, self.setting.device)

    def score(self) -> Score:
        """Scores the model on validation; the share of what its gates execute is counted meanwhile."""
        reset_rates(self.model)
        scored = score(self.model, self.setting.validation(self.scoring_samples), self.setting.task.nats)
        self.model.train()
        return scored

    def report(self, trial: int, rung: int, loss: float) -> Report:
        """How far the training of a trial is."""
        seconds = self.train_seconds + self.evaluate_seconds
        return report_at(self.done, self.setting.steps, self.setting.cost, trial, rung, loss, seconds)

    def values(self, scored: Score) -> dict[str, float]:
        """The values of a trial that ended so. Nothing may have run the model since it was scored."""
        cost = self.setting.cost
        executed = float(cost.flops_executed(execution_rates(self.model)))
        whole = training_flops(cost.flops_total, self.steps * self.setting.steps.units)
        named = name_values(self.setting.task, scored, executed, float(cost.parameters_total))
        return {**named, "training_flops": float(whole)}


def report_at(step: int, steps: Steps, cost: Cost, trial: int, rung: int, loss: float, seconds: float) -> Report:
    """The point of a trial's learning curve after a step."""
    units = step * steps.units
    return Report(trial, rung, step, units, training_flops(cost.flops_total, units), loss, seconds)


def rung_step(rung: int, steps: int) -> int:
    """The step, of `steps`, after which a trial is scored for a rung."""
    return max(1, round(RUNGS[rung] * steps))


def prepare(
    setting: Setting,
    *,
    model: nn.Module | None = None,
    steps: int | None = None,
    micro_batches: int = 1,
    compile: bool = False,
) -> Run:
    """A run at its beginning: of a `model` given, or of one with its initial weights; by default of the recipe's steps.

    Raises SpaceError when the architecture cannot be built.
    """
    model = setting.build() if model is None else model
    if compile:
        compile_parts(model)
    steps = setting.steps.count if steps is None else steps
    return Run(setting, model, make_optimizers(model, setting.recipe), model, Losses(steps), steps, micro_batches)
