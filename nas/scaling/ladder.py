"""`nas scale`: does the gain of a found architecture survive scale?

A ladder is several sizes of each contender, every one trained to the end of its schedule with tokens in a fixed
relation to its size. `climb` trains what the ladder's study does not hold yet, by the engines and the store of a
search; `analyse` fits laws to what came out and compares each contender with the baseline.

Learning rates are found alike for everybody: each contender's two smallest sizes on one grid, then a straight line in
log rate over log size. Sources: 2203.15556 (tokens in proportion to parameters), 2001.08361 (parameters growing as
C^0.73, tokens as C^0.27), 2511.21622 (gains, ablations).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from hypernas.config.plan import check_memory, training_bytes
from hypernas.config.study_config import StudyConfig
from hypernas.data.tasks import EVALUATION_SHARE, TASKS
from hypernas.engines.protocol import Executor
from hypernas.errors import UserError
from hypernas.records import RUNGS, Recipe, State, Trial
from hypernas.scaling.contenders import Contender
from hypernas.scaling.fit import Measurement
from hypernas.scaling.shape import Ladder
from hypernas.search_spaces import load_space
from hypernas.search_spaces.base import Space, SpaceError, arch_to_json
from hypernas.search_spaces.grid import GridSpace
from hypernas.store import Store
from hypernas.study.sweep import sweep
from hypernas.training.device import deterministic, worker_device
from hypernas.training.run import Setting, prepare
from hypernas.training.step import training_flops

STEEPEST = -0.5  # the learning rate's power of size; two noisy optima could ask for any


@dataclass(frozen=True, slots=True)
class Climbed:
    """What a ladder came to: runs whose schedule ended, by contender the learning rate at each size, and failures."""

    runs: tuple[Measurement, ...]
    rates: Mapping[str, Mapping[int, float]]
    failed: tuple[str, ...]
    notes: tuple[str, ...]


def climb(
    store: Store,
    executor: Executor,
    config: StudyConfig,
    climbers: Sequence[Contender],
    ladder: Ladder,
    say: Callable[[str], None],
) -> Climbed:
    """Trains the ladder as the study `config.study`; what that holds is not trained again.

    Raises UserError and SpaceError before anything is trained, KeyboardInterrupt when interrupted: the same call then
    goes on.
    """
    space = load_space(config.space)
    if not isinstance(space, GridSpace):
        raise UserError(f"space {config.space} cannot scale its architectures: wanted one made of a GridSpace")
    scaled = {(climber.name, size): _scale_arch(space, climber, size) for climber in climbers for size in ladder.sizes}
    for (name, size), arch in scaled.items():
        needs = training_bytes(space, space.from_json(arch))
        check_memory(needs, executor.memory, f"{name} with about {size:,} parameters (--ladder)")
    loss = TASKS[space.task].loss

    def train(trainings: Sequence[_Training]) -> list[tuple[_Training, Trial]]:
        settings = [t.settings(ladder, scaled[t.contender.name, t.size]) for t in trainings]
        return list(zip(trainings, sweep(store, executor, config, settings), strict=True))

    tuning, steps = _trainings(climbers, ladder)
    everything = [t.settings(ladder, scaled[t.contender.name, t.size]) for t in (*tuning, *steps)]
    data = TASKS[space.task].load(config.settings.get("data.path"))
    say(data.reading.describe(data.name))
    seconds = expected_seconds(space, data, everything, worker_device("auto" if executor.gpus else "cpu"))
    say(
        f"{len(tuning)} trainings to find learning rates, then {len(steps)}; all of them take about "
        f"{_lasting(seconds / executor.workers)} with {executor.workers} workers, by the time of a step of each"
    )
    rates, notes = _find_rates(train(tuning), loss, ladder, config.study)
    say("learning rates: " + "; ".join(f"{name} {_ends(own)}" for name, own in rates.items()))
    runs, failed = [], []
    for training, trial in train([replace(t, rate=rates[t.contender.name][t.size]) for t in steps]):
        name = training.contender.name
        if trial.state == State.COMPLETE:
            runs.append(measurement_of(name, trial, loss))
        else:
            why = trial.failure.kind if trial.failure else trial.state
            failed.append(f"trial {trial.number}, {name} with about {training.size:,} parameters: {why}")
    return Climbed(tuple(runs), rates, tuple(failed), tuple(notes))


@dataclass(frozen=True, slots=True)
class _Training:
    """A contender at a size, in parameters, and how it is trained; `ratio` in tokens a parameter."""

    contender: Contender
    size: int
    ratio: float
    seed: int
    rate: float

    def settings(self, ladder: Ladder, arch: Mapping[str, Any]) -> dict[str, Any]:
        tokens = ladder.tokens(self.size, self.ratio)
        own = {"optim.lr": self.rate, "train.seed": self.seed, "train.tokens": tokens}
        return {**self.contender.training, **arch, **own}


def _trainings(climbers: Sequence[Contender], ladder: Ladder) -> tuple[list[_Training], list[_Training]]:
    """Those that find the learning rates, and those of the ladder; of the latter no rate is known yet."""
    first = ladder.tokens_per_parameter[0]
    tuning = [
        _Training(climber, size, first, 0, rate)
        for climber in climbers
        for size in ladder.sizes[:2]
        for rate in ladder.rates
    ]
    steps = [
        _Training(climber, size, ratio, seed, 1e-3)  # a placeholder: a step takes as long at any rate
        for climber in climbers
        for size in ladder.sizes
        for ratio in ladder.tokens_per_parameter
        for seed in ladder.seeds_of(size)
    ]
    return tuning, steps


def _find_rates(
    tuned: Sequence[tuple[_Training, Trial]], loss: str, ladder: Ladder, study: str
) -> tuple[dict[str, dict[int, float]], list[str]]:
    """By contender the learning rate at each size, and notes where the best one is an end of the grid.

    Raises UserError for a contender of which no training ended.
    """
    losses: dict[str, dict[int, dict[float, float]]] = {}
    for training, trial in tuned:
        of_size = losses.setdefault(training.contender.name, {}).setdefault(training.size, {})
        of_size[training.rate] = trial.values[loss] if trial.state == State.COMPLETE else math.inf
    rates, notes = {}, []
    for name, of_sizes in losses.items():
        best = {size: best_rate(some) for size, some in of_sizes.items()}
        if None in best.values():
            raise UserError(f"{name}: at its smallest sizes no training ended; nas status --study {study} says why")
        notes += [
            f"{name}: at {size:,} parameters the best learning rate, {rate:g}, is an end of the grid"
            for size, rate in best.items()
            if len(ladder.rates) > 1 and rate in (min(ladder.rates), max(ladder.rates))
        ]
        rates[name] = {size: extrapolated_rate(best, size) for size in ladder.sizes}
    return rates, notes


def _scale_arch(space: GridSpace, climber: Contender, size: int) -> Mapping[str, Any]:
    try:
        return arch_to_json(space.scaled(space.from_json(climber.arch), size))
    except SpaceError as error:
        raise SpaceError(f"{climber.name} cannot be had with about {size:,} parameters: {error}") from error


def _lasting(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds > 120 else f"{seconds:.0f} seconds"


def _ends(rates: Mapping[int, float]) -> str:
    values = list(rates.values())
    return f"{values[0]:.2g} to {values[-1]:.2g}"


def measurement_of(family: str, trial: Trial, loss: str) -> Measurement:
    """A trial whose schedule ended, as a point of a family's law."""
    return Measurement(
        family, int(trial.parameters or 0), trial.recipe.tokens, trial.values["training_flops"], trial.values[loss],
        trial.recipe.seed,
    )  # fmt: skip


def best_rate(losses: Mapping[float, float]) -> float | None:
    """Where the parabola through the best rate and its neighbours (log rate) is lowest; None when nothing ended.

    The best itself at an end of the grid, and beside one that diverged.
    """
    rates = sorted(losses)
    at = min(range(len(rates)), key=lambda i: losses[rates[i]])
    if not math.isfinite(losses[rates[at]]):
        return None
    some = rates[max(0, at - 1) : at + 2]
    if len(some) < 3 or not all(math.isfinite(losses[rate]) for rate in some):
        return rates[at]
    curve = np.polynomial.Polynomial.fit(np.log(some), [losses[rate] for rate in some], 2).convert()
    if curve.coef[2] <= 0:
        return rates[at]
    lowest = math.exp(-curve.coef[1] / (2 * curve.coef[2]))
    return min(max(lowest, some[0]), some[-1])


def extrapolated_rate(best: Mapping[int, float | None], size: int) -> float:
    """On the straight line in log rate over log size through two optima, no steeper than STEEPEST and never rising."""
    (small, low), (large, high) = ((math.log(s), math.log(r)) for s, r in sorted(best.items()) if r is not None)
    slope = min(max((high - low) / (large - small), STEEPEST), 0.0)
    rate = math.exp((low + high) / 2 + slope * (math.log(size) - (small + large) / 2))
    return float(f"{rate:.3g}")


def expected_seconds(
    space: Space, data: Any, configurations: Sequence[Mapping[str, Any]], device: torch.device
) -> float:
    """Of one worker on such a device for all of them: every different net takes three steps here, the last two on the
    clock."""
    deterministic(space)
    task = TASKS[space.task]
    seconds_of: dict[tuple, float] = {}
    total = 0.0
    for given in configurations:
        arch = space.from_json({name: value for name, value in given.items() if name in space.keys})
        batch_tokens, tokens = int(given["train.batch_tokens"]), int(given["train.tokens"])
        recipe = Recipe(learning_rate=1e-3, tokens=tokens, batch_tokens=batch_tokens)
        setting = Setting(space, arch, task, data, recipe, data_seed=0, device=device)
        key = (space.arch_hash(arch), batch_tokens)
        if key not in seconds_of:
            seconds_of[key] = _step_seconds(setting)
        # Evaluation is forward alone.
        evaluation = len(RUNGS) * EVALUATION_SHARE / training_flops(1, 1)
        total += setting.steps.count * seconds_of[key] * (1 + evaluation)
    return total


def _step_seconds(setting: Setting) -> float:
    run, batch = prepare(setting, steps=3), setting.batch(0)
    run.step(batch)
    run.losses.read()  # waits for a GPU
    start = time.perf_counter()
    for _ in range(2):
        run.step(batch)
        run.losses.read()
    return (time.perf_counter() - start) / 2
