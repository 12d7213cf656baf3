"""`nas scale`: does the gain of a found architecture survive scale?

A ladder is several sizes of each contender, every one trained to the end of its schedule with tokens in a fixed
relation to its size. `climb` trains what the ladder's study does not hold yet, by the engines and the store of a
search; `analyse` fits laws to what came out and compares each contender with the baseline.

Learning rates are found alike for everybody: each contender's two smallest sizes on one grid, then a straight line in
log rate over log size. Sources: 2203.15556 (tokens in proportion to parameters), 2001.08361 (parameters growing as
C^0.73, tokens as C^0.27), 2511.21622 (gains, ablations).
"""

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from hypernas.config import COUNTED, RATE_GRID, Plan, StudyConfig, picked
from hypernas.data.tasks import EVALUATION_SHARE, TASKS, steps_of, to_device
from hypernas.engines.protocol import Executor
from hypernas.errors import UserError
from hypernas.records import Recipe, State, StudyRow, Trial
from hypernas.scaling import Fit, Run, fit_laws, fit_surface, gains, growth, interaction, measured_range
from hypernas.search_spaces import load_space
from hypernas.search_spaces.base import Space, SpaceError, arch_to_json
from hypernas.search_spaces.gallery import named
from hypernas.search_spaces.grid import GridSpace
from hypernas.store import Store
from hypernas.sweep import sweep
from hypernas.training.device import deterministic, worker_device
from hypernas.training.evaluate import RUNGS
from hypernas.training.model import seeded_build
from hypernas.training.step import BACKWARD, make_optimizers, train_step
from hypernas.yardstick import Yardstick

KAPLAN = 0.27 / 0.73  # tokens grow as parameters to this power
STEEPEST = -0.5  # the learning rate's power of size; two noisy optima could ask for any
SIZE = ("depth", "d_model")  # what an ablation leaves to the ladder
BASELINE_SIZES = (1 / 4, 8**-0.5, 1 / 2, 2**-0.5, 1.0, 2**0.5)  # 1.5 decades of compute for 4 of its trainings
BEYOND = (10.0, 100.0, 1000.0)  # times the largest compute, where the laws are asked what they expect


@dataclass(frozen=True, slots=True)
class Ladder:
    """`sizes` in parameters, rising; tokens a parameter, one run for each; `seeds` for the smaller half of the sizes,
    one above. With the budget `kaplan` a smallest size trains as with `chinchilla`, and tokens grow more slowly."""

    sizes: tuple[int, ...] = (20_000, 35_000, 60_000, 105_000, 180_000)
    tokens_per_parameter: tuple[float, ...] = (20.0,)
    budget: str = "chinchilla"
    seeds: int = 3
    rates: tuple[float, ...] = RATE_GRID

    def __post_init__(self) -> None:
        if list(self.sizes) != sorted(set(self.sizes)) or len(self.sizes) < 2 or self.sizes[0] < 1:
            raise UserError(f"--ladder {','.join(map(str, self.sizes))}: wanted two rising sizes or more")
        if not self.tokens_per_parameter or not all(0 < ratio < math.inf for ratio in self.tokens_per_parameter):
            raise UserError(f"--tokens-per-parameter {self.tokens_per_parameter}: wanted numbers above 0")
        if self.budget not in BUDGETS:
            raise UserError(f"--budget {self.budget!r} is unknown; wanted one of {', '.join(BUDGETS)}")
        if self.seeds < 1:
            raise UserError(f"--seeds {self.seeds}: wanted 1 or more")

    def tokens(self, size: int, ratio: float) -> int:
        """The same for every family at a size, so that all are scored on the same windows of text."""
        return round(ratio * BUDGETS[self.budget](size, self.sizes[0]))

    def seeds_of(self, size: int) -> range:
        small = self.sizes.index(size) < (len(self.sizes) + 1) // 2
        return range(self.seeds if small else 1)


BUDGETS: Mapping[str, Callable[[int, int], float]] = {
    "chinchilla": lambda size, smallest: float(size),
    "kaplan": lambda size, smallest: smallest * (size / smallest) ** KAPLAN,
}


def parse_sizes(text: str) -> tuple[int, ...]:
    """`20k,50k,100k`, or `20k..160k` for a doubling each. Raises UserError."""
    if ".." in text:
        low, high = (_size(end) for end in text.split("..", 1))
        return tuple(low << k for k in range(max(0, int(math.log2(high / low) + 1e-9)) + 1))
    return tuple(_size(part) for part in text.split(","))


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kM]?)", text.strip())
    if found is None or float(found[1]) <= 0:
        raise UserError(f"--ladder {text.strip()!r}: wanted parameters, like 20k,50k,100k or 20k..160k")
    return round(float(found[1]) * {"": 1, "k": 1e3, "M": 1e6}[found[2]])


# ---- who climbs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Contender:
    """A shape and how it is trained; `trial` its number in the searched study, if it comes from there."""

    name: str
    arch: Mapping[str, Any]
    training: Mapping[str, Any] = field(default_factory=dict)  # optim.name, optim.weight_decay, optim.schedule
    trial: int | None = None


def contenders(store: Store, study: StudyRow, trials: str, baseline: str) -> list[Contender]:
    """The baseline, then the trials named (`front`, or numbers like 3,14). Raises UserError and SpaceError."""
    task = study.settings["task"]
    if task != "text":
        raise UserError(f"study {study.name!r} trains on {task}: nas scale compares language models, space lm")
    if trials == "front":
        chosen = [trial for trial in store.front(study) if trial.origin != "baseline"]
    else:
        chosen = [store.trial(study, _number(part)) for part in trials.split(",")]
    if not chosen:
        raise UserError(f"the front of {study.name!r} holds baselines alone: name others with --trials N,M")
    usual = next(iter(store.trials(study, origin="baseline")), chosen[0])
    if baseline == "baseline":
        arch: Mapping[str, Any] = usual.arch
    else:
        # Of a named architecture the shape counts, not how long its windows are.
        settings = {**named(study.space.name, baseline), "context": str(usual.arch["context"])}
        arch = arch_to_json(load_space(study.space.name).from_json(settings))
    found = [Contender(baseline, arch, _training(usual.recipe))]
    return found + [Contender(f"trial {t.number}", t.arch, _training(t.recipe), t.number) for t in chosen]


def _number(text: str) -> int:
    if not text.strip().isdigit():
        raise UserError(f"--trials {text.strip()!r}: wanted front, or numbers of trials like 3,14")
    return int(text)


def _training(recipe: Recipe) -> dict[str, Any]:
    return {
        "optim.name": recipe.optimizer,
        "optim.weight_decay": recipe.weight_decay,
        "optim.schedule": recipe.schedule,
        "train.batch_tokens": recipe.batch_tokens,
    }


def ablation(space: Space, baseline: Contender, candidate: Contender) -> list[Contender]:
    """The baseline, the baseline with each of the candidate's components by itself, and with all of them.

    A component is what keys before a dot have in common (ffn, streams), or a key without one. Raises UserError where
    the two are one shape, SpaceError where a component cannot be had by itself.
    """
    own, other = dict(candidate.arch), dict(baseline.arch)
    if own.get("family") != other.get("family"):
        raise UserError(f"{candidate.name} and {baseline.name} are of different families: nothing to take apart")
    changed = [name for name in {**other, **own} if own.get(name) != other.get(name) and name not in SIZE]
    components = list(dict.fromkeys(name.partition(".")[0] for name in changed))
    if len(components) < 2:
        raise UserError(f"{candidate.name} and {baseline.name} differ in {', '.join(components) or 'size alone'}: "
                        "an ablation wants two components or more")  # fmt: skip

    def having(parts: Sequence[str]) -> Mapping[str, Any]:
        kept = {name: value for name, value in other.items() if name.partition(".")[0] not in parts}
        return kept | {name: value for name, value in own.items() if name.partition(".")[0] in parts}

    def contender(name: str, parts: Sequence[str]) -> Contender:
        try:
            arch = arch_to_json(space.from_json(having(parts)))
        except SpaceError as error:
            raise SpaceError(f"{', '.join(parts)} of {candidate.name} in {baseline.name}: {error}") from error
        return Contender(name, arch, baseline.training)

    together = replace(contender(TOGETHER, components), trial=candidate.trial)
    return [baseline, *(contender(f"+ {part}", [part]) for part in components), together]


TOGETHER = "all together"


# ---- climbing ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Climbed:
    """What a ladder came to: runs whose schedule ended, by contender the learning rate at each size, and failures."""

    runs: tuple[Run, ...]
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
    scaled = {(climber.name, size): _scaled(space, climber, size) for climber in climbers for size in ladder.sizes}
    loss = TASKS[space.task].loss

    def settings(climber: Contender, size: int, ratio: float, rate: float, seed: int) -> dict[str, Any]:
        own = {"optim.lr": rate, "train.seed": seed, "train.tokens": ladder.tokens(size, ratio)}
        return {**climber.training, **scaled[climber.name, size], **own}

    tried = [(c, size, rate) for c in climbers for size in ladder.sizes[:2] for rate in ladder.rates]
    first = ladder.tokens_per_parameter[0]
    tuning = [settings(c, size, first, rate, 0) for c, size, rate in tried]
    steps = [
        (c, size, ratio, seed)
        for c in climbers
        for size in ladder.sizes
        for ratio in ladder.tokens_per_parameter
        for seed in ladder.seeds_of(size)
    ]
    # Rates are not known yet, and cost nothing.
    trainings = tuning + [settings(c, s, r, 1e-3, seed) for c, s, r, seed in steps]
    seconds = expected_seconds(space, config, trainings, worker_device("auto" if executor.gpus else "cpu"))
    say(
        f"{len(tuning)} trainings to find learning rates, then {len(steps)}; all of them take about "
        f"{_lasting(seconds / executor.workers)} with {executor.workers} workers, by the time of a step of each"
    )
    tuned: dict[str, dict[int, dict[float, float]]] = {
        c.name: {size: {} for size in ladder.sizes[:2]} for c in climbers
    }
    for (climber, size, rate), trial in zip(tried, sweep(store, executor, config, tuning), strict=True):
        tuned[climber.name][size][rate] = trial.values[loss] if trial.state == State.COMPLETE else math.inf
    rates, notes = {}, []
    for name, losses in tuned.items():
        best = {size: best_rate(some) for size, some in losses.items()}
        if None in best.values():
            raise UserError(
                f"{name}: at its smallest sizes no training ended; nas status --study {config.study} says why"
            )
        notes += [
            f"{name}: at {size:,} parameters the best learning rate, {rate:g}, is an end of the grid"
            for size, rate in best.items()
            if len(ladder.rates) > 1 and rate in (min(ladder.rates), max(ladder.rates))
        ]
        rates[name] = {size: extrapolated_rate(best, size) for size in ladder.sizes}
    say("learning rates: " + "; ".join(f"{name} {_ends(own)}" for name, own in rates.items()))
    ladder_runs = [settings(c, size, ratio, rates[c.name][size], seed) for c, size, ratio, seed in steps]
    runs, failed = [], []
    for (climber, size, _, _), trial in zip(steps, sweep(store, executor, config, ladder_runs), strict=True):
        if trial.state == State.COMPLETE:
            runs.append(run_of(climber.name, trial, loss))
        else:
            why = trial.failure.kind if trial.failure else trial.state
            failed.append(f"trial {trial.number}, {climber.name} with about {size:,} parameters: {why}")
    return Climbed(tuple(runs), rates, tuple(failed), tuple(notes))


def _scaled(space: GridSpace, climber: Contender, size: int) -> Mapping[str, Any]:
    try:
        return arch_to_json(space.scaled(space.from_json(climber.arch), size))
    except SpaceError as error:
        raise SpaceError(f"{climber.name} cannot be had with about {size:,} parameters: {error}") from error


def _lasting(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds > 120 else f"{seconds:.0f} seconds"


def _ends(rates: Mapping[int, float]) -> str:
    values = list(rates.values())
    return f"{values[0]:.2g} to {values[-1]:.2g}"


def run_of(family: str, trial: Trial, loss: str) -> Run:
    """A trial whose schedule ended, as a point of a family's law."""
    return Run(
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
    space: Space, config: StudyConfig, configurations: Sequence[Mapping[str, Any]], device: torch.device
) -> float:
    """Of one worker on such a device for all of them: every different net takes three steps here, the last two on the
    clock."""
    deterministic(space)
    task = TASKS[space.task]
    data = task.load(config.settings.get("data.path"))
    seconds_of: dict[tuple, float] = {}
    total = 0.0
    for given in configurations:
        flat = {name: value for name, value in given.items() if name in space.keys}
        batch_tokens, tokens = int(given["train.batch_tokens"]), int(given["train.tokens"])
        arch = space.from_json(flat)
        key = (space.arch_hash(arch), batch_tokens)
        recipe = Recipe(learning_rate=1e-3, tokens=tokens, batch_tokens=batch_tokens)
        spent = steps_of(task, arch, recipe)
        if key not in seconds_of:
            model = seeded_build(space, arch, 0).to(device)
            optimizers = make_optimizers(model, recipe)
            batch = to_device(task.batch(data, arch, 0, 0, spent.samples), device)
            float(train_step(model, optimizers, batch, recipe, 0, 3))  # a GPU is waited for by the number
            start = time.perf_counter()
            for step in (1, 2):
                float(train_step(model, optimizers, batch, recipe, step, 3))
            seconds_of[key] = (time.perf_counter() - start) / 2
        total += spent.count * seconds_of[key] * (1 + len(RUNGS) * EVALUATION_SHARE / (1 + BACKWARD))
    return total


# ---- the baseline alone, before a search ---------------------------------------------------------------------


def measure_baseline(
    store: Store, executor: Executor, config: StudyConfig, plan: Plan, say: Callable[[str], None]
) -> Yardstick:
    """The law of a study's baseline, by which its trials' gains are estimated: what `ceg` is as an objective.

    The baseline's shape is trained at some sizes around its own, with the study's tokens in proportion to size, as the
    study NAME-baseline; so the baseline's own gain is about 1. All with one learning rate: `nas scale` takes more care.
    Raises UserError where losses allow no law, KeyboardInterrupt when interrupted: the same call then goes on.
    """
    space = load_space(config.space)
    if not isinstance(space, GridSpace):
        raise UserError(f"space {config.space} cannot scale its baseline, which ceg is measured against; "
                        "wanted one made of a GridSpace, or other objectives")  # fmt: skip
    arch, recipe = plan.baselines()[0]
    total, batch = COUNTED[space.task]
    own = space.cost(arch).parameters_total
    ladder = [
        {
            **arch_to_json(space.scaled(arch, round(share * own))),
            **picked(recipe),
            total: round(share * recipe.tokens),
            batch: recipe.batch_tokens,
            "train.seed": recipe.seed,
        }
        for share in BASELINE_SIZES
    ]
    name = f"{config.study}-baseline"
    path = {"data.path": plan.data_path} if plan.data_path else {}
    say(f"ceg: first the baseline at {len(ladder)} sizes, as study {name!r}")
    trials = sweep(store, executor, replace(config, study=name, settings=path, objectives=(), halving=False), ladder)
    loss = TASKS[space.task].loss
    runs = [run_of("baseline", trial, loss) for trial in trials if trial.state == State.COMPLETE]
    law = fit_laws(runs, seed=config.seed).laws["baseline"]
    largest = max(run.flops for run in runs)
    say(
        f"ceg: the baseline's loss(C) = {law.irreducible:.4g} + {law.scale:.4g} C^-{law.exponent:.3f}, measured from "
        f"{min(run.flops for run in runs):.2e} to {largest:.2e} FLOPs"
    )
    return Yardstick(law, BEYOND[-1] * largest)


# ---- what came of it -----------------------------------------------------------------------------------------


def analyse(climbed: Climbed, climbers: Sequence[Contender], *, seed: int) -> dict[str, Any]:
    """`nas scale --json`: laws, gains over the first contender with whether they were measured, and what failed.

    Raises UserError where there is too little to fit a law to.
    """
    baseline = climbers[0].name
    fit = fit_laws(climbed.runs, seed=seed)
    data: dict[str, Any] = {
        "baseline": baseline,
        "irreducible": asdict(fit.irreducible()),
        "noise": fit.noise,
        "families": [_family_json(fit, climbed, climber) for climber in climbers],
        "gains": [_gains_json(fit, climber, baseline) for climber in climbers[1:]],
        "failed": list(climbed.failed),
        "notes": list(climbed.notes),
    }
    if climbers[-1].name == TOGETHER:
        parts = [climber.name for climber in climbers[1:-1]]
        try:
            at = min(measured_range(fit, name, baseline)[1] for name in (*parts, TOGETHER))
            data["interaction"] = asdict(interaction(fit, baseline, parts, TOGETHER, at))
        except UserError as error:
            data["interaction"] = {"missing": str(error)}
    return data


def _family_json(fit: Fit, climbed: Climbed, climber: Contender) -> dict[str, Any]:
    own = [run for run in climbed.runs if run.family == climber.name]
    law, points = fit.laws[climber.name], fit.frontiers[climber.name]
    first, last = float(points.flops[0]), float(points.flops[-1])
    at = np.append(np.geomspace(first, last, 20), np.geomspace(last, last * BEYOND[-1], 20)[1:])
    low, high = fit.band(climber.name, at)
    try:
        surface: dict[str, Any] = asdict(fit_surface(own))
    except UserError as error:
        surface = {"missing": str(error)}
    return {
        "name": climber.name,
        "trial": climber.trial,
        "law": {"scale": law.scale, "exponent": asdict(fit.exponent(climber.name))},
        "measured_flops": [first, last],
        "curve": {"flops": at.tolist(), "loss": law.loss(at).tolist(), "low": low.tolist(), "high": high.tolist()},
        "surface": surface,
        "learning_rates": {str(size): rate for size, rate in climbed.rates[climber.name].items()},
        "runs": [asdict(run) for run in own],
    }


def _gains_json(fit: Fit, climber: Contender, baseline: str) -> dict[str, Any]:
    head = {"candidate": climber.name, "trial": climber.trial}
    try:
        low, high = measured_range(fit, climber.name, baseline)
    except UserError as error:
        return {**head, "missing": str(error)}
    largest = max(frontier.flops[-1] for frontier in fit.frontiers.values())
    at = [*np.geomspace(low, high, 5).tolist(), *(factor * largest for factor in BEYOND)]
    points = [
        {"flops": g.flops, "loss": g.loss, "ceg": g.gain.value, "low": g.gain.low, "high": g.gain.high,
         "measured": g.measured}
        for g in gains(fit, climber.name, baseline, at)
    ]  # fmt: skip
    return {**head, "growth": asdict(growth(fit, climber.name, baseline)), "points": points}


def keep(store: Store, searched: StudyRow, ladder_study: str, data: Mapping[str, Any]) -> None:
    """Puts the analysis into the ladder's study, and into each trial its gain at the largest compute measured."""
    row = store.study(ladder_study)
    store.update_settings(row, {**row.settings, "scale": dict(data)})
    for entry in data["gains"]:
        if entry["trial"] is not None and "points" in entry and entry["candidate"] != TOGETHER:
            top = [point for point in entry["points"] if point["measured"]][-1]
            name = "ceg_at_scale" if "ceg" in searched.objectives else "ceg"  # an objective stays what it was
            values = {name: top["ceg"], "ceg_low": top["low"], "ceg_high": top["high"], "ceg_flops": top["flops"]}
            store.add_values(searched, entry["trial"], {**values, "ceg_growth": entry["growth"]["value"]})


def describe(data: Mapping[str, Any]) -> list[str]:
    """The analysis in lines of text."""
    E = data["irreducible"]
    lines = [f"loss(C) = E + A C^-alpha, E {_shown(E)}; a run's loss varies by {100 * data['noise']:.2f} %"]
    for family in data["families"]:
        low, high = family["measured_flops"]
        lines.append(
            f"{family['name']}: A {family['law']['scale']:.4g}, alpha {_shown(family['law']['exponent'])}, "
            f"{len(family['runs'])} runs from {low:.2e} to {high:.2e} FLOPs"
        )
        surface = family["surface"]
        if "missing" not in surface:
            lines.append("  loss(N, D) = {irreducible:.3g} + {A:.4g} N^-{a:.3f} + {B:.4g} D^-{b:.3f}".format(**surface))
    for entry in data["gains"]:
        lines += ["", f"compute-equivalent gain of {entry['candidate']} over {data['baseline']}"]
        if "missing" in entry:
            lines.append(f"  not known: {entry['missing']}")
            continue
        for point in entry["points"]:
            lines.append(
                f"  {point['flops']:.2e} FLOPs  {point['ceg']:8.3g}  [{point['low']:.3g}, {point['high']:.3g}]  "
                f"{'measured' if point['measured'] else 'extrapolated'}"
            )
        lines.append(f"  grows as C^{_shown(entry['growth'])}: {growth_verdict(entry['growth'])}")
    if "interaction" in data:
        lines += ["", *_interaction_lines(data["interaction"])]
    lines += [f"failed: {text}" for text in data["failed"]] + [f"note: {text}" for text in data["notes"]]
    return lines


def _interaction_lines(found: Mapping[str, Any]) -> list[str]:
    if "missing" in found:
        return [f"interaction not known: {found['missing']}"]
    kind = "measured" if found["measured"] else "extrapolated"
    lines = [f"one component at a time, at {found['flops']:.2e} FLOPs ({kind})"]
    lines += [f"  {name}: {_shown(value)}" for name, value in found["single"].items()]
    shown = {"their product": "product", "all together": "joint", "together over product": "interaction"}
    return lines + [f"  {label}: {_shown(found[name])}" for label, name in shown.items()]


def growth_verdict(value: Mapping[str, float]) -> str:
    """What the interval of a gain's exponent says."""
    if value["low"] > 0:
        return "the gain grows with scale"
    return "the gain shrinks with scale" if value["high"] < 0 else "whether it grows, these runs do not tell"


def _shown(value: Mapping[str, float]) -> str:
    return f"{value['value']:.3g} [{value['low']:.3g}, {value['high']:.3g}]"
