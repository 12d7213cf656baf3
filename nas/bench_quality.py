"""`nas bench search --part quality`: how good a front each method finds for the same training compute.

Every method searches the recorded table (nas/table.py) on a simulated clock that counts training FLOPs, so that a
search of an hour takes milliseconds and every claim rests on many seeds. Ours is the product's own proposals and
halving; the peers are the real libraries, at their defaults, where they are installed.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from heapq import heappop, heappush
from importlib.metadata import version
from importlib.util import find_spec
from math import inf
from types import SimpleNamespace
from typing import Any, Protocol

import click
import numpy as np
from rich.console import Console
from rich.progress import Progress

from nas import pareto
from nas.config import StudyConfig
from nas.proposals import Proposals
from nas.records import RUNGS, Failure, FailureKind, Report, State, Trial
from nas.store import Proposal
from nas.table import Recorded, Table, load_table
from search_spaces.base import Uniform

WORKERS = 2
LAST = len(RUNGS) - 1
EIGHTHS = 8  # a full training, in units of the first rung
REDUCTION = 3  # as our own halving, and Syne Tune's default


class Method(Protocol):
    """A way to search: it is asked for configurations, and told of every rung and every end."""

    def ask(self, number: int) -> Recorded | None:
        """What trial `number` trains; None when there is nothing left."""
        ...

    def goes_on(self, number: int, rung: int, loss: float) -> bool:
        """A trial reached a rung that is not the last one."""
        ...

    def ended(self, number: int) -> None:
        """A trial was trained to its end."""
        ...


@dataclass(frozen=True, slots=True)
class Curve:
    """Hypervolume over training FLOPs: `volume[i]` from `spent[i]` on."""

    spent: tuple[float, ...]
    volume: tuple[float, ...]
    trials: int

    def at(self, spent: float) -> float:
        place = int(np.searchsorted(self.spent, spent, side="right"))
        return self.volume[place - 1] if place else 0.0

    def reaches(self, volume: float) -> float:
        """The training FLOPs after which the hypervolume is reached; infinite where it never is."""
        return next((s for s, v in zip(self.spent, self.volume, strict=True) if v >= volume), inf)


def replay(table: Table, method: Method, budget: float, workers: int = WORKERS) -> Curve:
    """Searches the table until all workers together have spent `budget` training FLOPs."""
    events: list[tuple[float, int, int]] = []  # (when, trial, rung that it reaches)
    running: dict[int, Recorded] = {}
    clock = spent = 0.0
    number = 0
    points: list[tuple[float, ...]] = []
    steps, volumes = [0.0], [0.0]
    while True:
        while len(running) < workers and (entry := method.ask(number)) is not None:
            running[number] = entry
            heappush(events, (clock + RUNGS[0] * entry.training_flops, number, 0))
            number += 1
        if not events:
            break
        clock, trial, rung = heappop(events)
        entry = running[trial]
        spent += (RUNGS[rung] - (RUNGS[rung - 1] if rung else 0.0)) * entry.training_flops
        if spent > budget:
            break
        if rung == LAST or not rung < len(entry.losses):
            del running[trial]
            method.ended(trial)
            if entry.values:
                points.append(pareto.costs(table.plan.objectives, entry.values))
                steps.append(spent)
                volumes.append(pareto.hypervolume(points, table.reference))
        elif method.goes_on(trial, rung, entry.losses[rung]):
            heappush(events, (clock + (RUNGS[rung + 1] - RUNGS[rung]) * entry.training_flops, trial, rung + 1))
        else:
            del running[trial]
    return Curve(tuple(steps), tuple(volumes), number)


class Ours:
    """The product's proposals, prefetched as its driver does, and its halving."""

    def __init__(self, table: Table, sampler: str, halving: bool, seed: int, baselines: bool = True) -> None:
        plan = table.plan
        self._table, self._halving = table, halving
        given = [(arch, recipe, "baseline") for arch, recipe in plan.baselines() if baselines]
        self._proposals = Proposals(plan, sampler, seed, table.reference, given)
        self._ready: deque[Proposal] = deque()
        self._trials: dict[int, Trial] = {}
        self._entries: dict[int, Recorded] = {}
        self._curves: dict[int, list[Report]] = {}

    def ask(self, number: int) -> Recorded | None:
        while len(self._ready) <= WORKERS:
            proposal = self._proposals.given() or self._proposals.drawn(number + len(self._ready))
            if proposal is None:
                break
            self._ready.append(proposal)
        if not self._ready:
            return None
        proposal = self._ready.popleft()
        self._proposals.leased(number, proposal)
        self._trials[number], self._curves[number] = _running(number, proposal), []
        self._entries[number] = entry = self._table.recorded[proposal.config_hash]
        return entry

    def goes_on(self, number: int, rung: int, loss: float) -> bool:
        trial, flops = self._trials[number], self._entries[number].training_flops
        tokens = round(RUNGS[rung] * trial.recipe.tokens)
        self._curves[number].append(Report(number, rung, rung, tokens, RUNGS[rung] * flops, loss, 0.0))
        self._proposals.told(trial, self._curves[number])
        if not self._halving or self._proposals.goes_on(number, rung):
            return True
        self._proposals.told(replace(trial, state=State.STOPPED), self._curves[number])
        return False

    def ended(self, number: int) -> None:
        values = self._entries[number].values
        failure = None if values else Failure(FailureKind.DIVERGED, "diverged when it was recorded")
        state = State.COMPLETE if values else State.FAILED
        self._proposals.told(replace(self._trials[number], state=state, values=values, failure=failure), ())


def _running(number: int, proposal: Proposal) -> Trial:
    """A trial as the store would hold it, as far as anybody looks."""
    return Trial(
        number=number,
        state=State.RUNNING,
        params=proposal.params,
        arch=proposal.arch,
        arch_hash=proposal.arch_hash,
        recipe=proposal.recipe,
        origin=proposal.origin,
        sampler_attrs=proposal.sampler_attrs,
        token=1,
        attempts=1,
        values={},
        parameters=None,
        driver=None,
        worker=None,
        created=datetime.now(UTC),
        started=None,
        finished=None,
        train_seconds=None,
        evaluate_seconds=None,
        provenance={},
        diagnostics={},
        failure=None,
        seq=number,
    )


# ---- the peers, as their own documentation starts them --------------------------------------------------------


class Stock:
    """Optuna's own study, asked and told as its users do: full trainings, and repeats are trained again."""

    def __init__(self, table: Table, sampler: str, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        kinds = {
            "random": optuna.samplers.RandomSampler,
            "nsgaii": optuna.samplers.NSGAIISampler,
            "tpe": optuna.samplers.TPESampler,  # the default for several objectives since Optuna 5
        }
        self._table = table
        self._study = optuna.create_study(
            directions=["minimize"] * len(table.plan.objectives), sampler=kinds[sampler](seed=seed)
        )
        self._running: dict[int, tuple[Any, Recorded]] = {}

    def ask(self, number: int) -> Recorded:
        trial = self._study.ask()
        entry = self._table.entry(trial)
        self._running[number] = trial, entry
        return entry

    def goes_on(self, number: int, rung: int, loss: float) -> bool:
        return True

    def ended(self, number: int) -> None:
        trial, entry = self._running.pop(number)
        costs = list(pareto.costs(self._table.plan.objectives, entry.values)) if entry.values else None
        self._study.tell(trial, costs, skip_if_finished=costs is None)  # Optuna notes a failure where there are none


class RayAsha:
    """Ray Tune's ASHA on the loss, the one metric it takes, over random configurations."""

    def __init__(self, table: Table, seed: int) -> None:
        from ray.tune.schedulers import AsyncHyperBandScheduler

        self._table, self._uniform = table, Uniform(np.random.default_rng(seed))
        self._scheduler = AsyncHyperBandScheduler(
            time_attr="eighths", metric="loss", mode="min", max_t=EIGHTHS, grace_period=1, reduction_factor=REDUCTION
        )

    def ask(self, number: int) -> Recorded:
        self._scheduler.on_trial_add(None, _named(number))  # type: ignore[arg-type]
        return self._table.entry(self._uniform)

    def goes_on(self, number: int, rung: int, loss: float) -> bool:
        result = {"eighths": round(EIGHTHS * RUNGS[rung]), "loss": loss}
        decision = self._scheduler.on_trial_result(None, _named(number), result)  # type: ignore[arg-type]
        return decision == self._scheduler.CONTINUE

    def ended(self, number: int) -> None:
        """ASHA learns nothing from the end of a trial that its last rung did not tell it."""


class SyneTuneMoasha:
    """Syne Tune's multi-objective ASHA, over random configurations; FLOPs count at every rung, as ours do."""

    def __init__(self, table: Table, seed: int) -> None:
        from syne_tune.optimizer.schedulers.multiobjective.moasha import MOASHA

        self._table, self._uniform = table, Uniform(np.random.default_rng(seed))
        self._scheduler = MOASHA(
            config_space={},
            metrics=["loss", "flops"],
            time_attr="eighths",
            max_t=EIGHTHS,
            grace_period=1,
            reduction_factor=REDUCTION,
            random_seed=seed,
        )
        self._running: dict[int, Recorded] = {}

    def ask(self, number: int) -> Recorded:
        entry = self._running[number] = self._table.entry(self._uniform)
        self._scheduler.on_trial_add(_named(number))
        return entry

    def goes_on(self, number: int, rung: int, loss: float) -> bool:
        flops = float(np.log10(self._running[number].training_flops))
        result = {"eighths": round(EIGHTHS * RUNGS[rung]), "loss": loss, "flops": flops}
        return str(self._scheduler.on_trial_result(_named(number), result)) == "CONTINUE"

    def ended(self, number: int) -> None:
        self._running.pop(number)


def _named(number: int) -> Any:
    """As much of a trial as a scheduler looks at."""
    return SimpleNamespace(trial_id=str(number))


# ---- what is printed -----------------------------------------------------------------------------------------

TRAININGS = 40  # the budget N, in full trainings of the mean configuration: what `--preset small` asks for
SHARES = (1 / 4, 1 / 2, 1.0)
DEFAULT = "default"  # what a search does unless told otherwise
BARE = "default, without its baselines"  # three trainings that no peer pays for, of the largest net here
YARDSTICK = "random, full trainings"


def methods(table: Table) -> tuple[dict[str, Callable[[int], Method]], list[str]]:
    """By name, how each method is made from a seed; and why others are left out."""
    default = StudyConfig()
    found: dict[str, Callable[[int], Method]] = {
        DEFAULT: lambda seed: Ours(table, default.sampler, default.halving, seed),
        BARE: lambda seed: Ours(table, default.sampler, default.halving, seed, baselines=False),
        YARDSTICK: lambda seed: Stock(table, "random", seed),
        "optuna nsgaii": lambda seed: Stock(table, "nsgaii", seed),
        "optuna tpe": lambda seed: Stock(table, "tpe", seed),
        "ray tune asha": lambda seed: RayAsha(table, seed),
        "syne tune moasha": lambda seed: SyneTuneMoasha(table, seed),
    }
    for sampler in ("evolution", "nsgaii", "tpe", "random"):
        if sampler != default.sampler:
            found[f"{sampler}, halving on"] = partial(Ours, table, sampler, True)
    found[f"{default.sampler}, halving off"] = partial(Ours, table, default.sampler, False)
    missing = []
    if find_spec("syne_tune") is None:
        del found["syne tune moasha"]
        missing.append("syne tune moasha is left out: pip install syne-tune")
    return found, missing


def compare(seeds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """`nas bench --json`, and for the figure each method's quartiles over the budget. Raises UserError."""
    table = load_table()
    curves = searched(table, seeds)
    versions = ", ".join(f"{name} {version(name)}" for name in ("hypernas", "optuna", "ray", "syne-tune") if _has(name))
    device = f"{len(table.recorded)} recorded trainings of lm, {seeds} seeds, {WORKERS} workers"
    return {"device": device, "versions": versions, "rows": rows(table, curves)}, spread(table, curves)


def _has(package: str) -> bool:
    return find_spec(package.replace("-", "_").replace("hypernas", "nas")) is not None


def searched(table: Table, seeds: int, trainings: int = TRAININGS) -> dict[str, list[Curve]]:
    """Every method's curves, one a seed."""
    made, missing = methods(table)
    for line in missing:
        click.echo(line, err=True)
    curves: dict[str, list[Curve]] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("searching", total=len(made) * seeds)
        for name, make in made.items():
            for seed in range(seeds):
                np.random.seed(seed)  # Ray Tune and Syne Tune draw their brackets from the global generator
                curves.setdefault(name, []).append(replay(table, make(seed), trainings * table.mean_flops))
                progress.advance(bar)
    return curves


def spread(table: Table, curves: Mapping[str, Sequence[Curve]], trainings: int = TRAININGS) -> dict[str, Any]:
    """By method, the quartiles of the hypervolume (as a share of the table's) over the budget."""
    spent = np.linspace(0.0, trainings, 101)
    return {
        name: {
            "trainings": spent.tolist(),
            "quartiles": np.percentile(
                [[curve.at(s * table.mean_flops) / table.best for s in spent] for curve in runs], (25, 50, 75), axis=0
            ).tolist(),
        }
        for name, runs in curves.items()
    }


def rows(table: Table, curves: Mapping[str, Sequence[Curve]], trainings: int = TRAININGS) -> list[dict[str, Any]]:
    """Hypervolume as a share of the whole table's: median over the seeds, and quartiles, at three budgets.

    Then the median share of the budget after which a method has the hypervolume that random search with full trainings
    has at its end; methods that mostly never have it are left out there.
    """
    budget = trainings * table.mean_flops
    found = []
    for share in SHARES:
        reached = {name: [c.at(share * budget) / table.best for c in runs] for name, runs in curves.items()}
        base = float(np.median(reached[YARDSTICK]))
        for name, values in reached.items():
            low, middle, high = (float(x) for x in np.percentile(values, (25, 50, 75)))
            found.append(_row(f"hypervolume at {share * trainings:g} trainings", name, middle, base, low, high))
    goal = float(np.median([c.at(budget) for c in curves[YARDSTICK]]))
    for name, runs in curves.items():
        spent = [c.reaches(goal) / budget for c in runs]
        low, middle, high = (float(x) for x in np.percentile(spent, (25, 50, 75), method="nearest"))
        if middle < inf:  # half of the seeds get there
            found.append(_row(f"budget to random's at {trainings}", name, middle, 1.0, low, high))
    return found


def _row(name: str, method: str, value: float, base: float, low: float, high: float) -> dict[str, Any]:
    return {
        "name": name,
        "backend": method,
        "value": value,
        "unit": "share",
        "baseline": YARDSTICK,
        "ratio": value / base,
        "quartiles": [low, high if high < inf else None],  # None: not within the budget
    }
