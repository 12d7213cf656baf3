"""A recorded table searched on a simulated clock that counts training FLOPs: our search, and its peers.

Ours is the product's own proposals and halving; the peers are the real libraries, at their defaults, as their own
documentation starts them.
"""

from collections import deque
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from heapq import heappop, heappush
from math import inf
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

from hypernas import pareto
from hypernas.bench.table import Recorded, Table
from hypernas.records import RUNGS, Failure, FailureKind, Proposal, Report, State, Trial
from hypernas.search_spaces.base import Uniform
from hypernas.strategy.proposals import Proposals

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
    """Hypervolume over training FLOPs: `volume[i]` from `spent[i]` on, where `spent[-1]` is all that was spent."""

    spent: tuple[float, ...]
    volume: tuple[float, ...]
    ended: tuple[Recorded, ...]  # trained to their end, in that order
    trials: int  # started

    def at(self, spent: float) -> float:
        place = int(np.searchsorted(self.spent, spent, side="right"))
        return self.volume[place - 1] if place else 0.0

    def reaches(self, volume: float) -> float:
        """The training FLOPs after which the hypervolume is reached; infinite where it never is."""
        return next((s for s, v in zip(self.spent, self.volume, strict=True) if v >= volume), inf)


def replay(
    table: Table, method: Method, budget: float = inf, trials: int | None = None, workers: int = WORKERS
) -> Curve:
    """Searches the table until all workers together have spent `budget` training FLOPs, or `trials` have ended."""
    events: list[tuple[float, int, int]] = []  # (when, trial, rung that it reaches)
    running: dict[int, Recorded] = {}
    clock = spent = 0.0
    number = 0
    ended: list[Recorded] = []
    points: list[tuple[float, ...]] = []
    steps, volumes = [0.0], [0.0]
    while True:
        while len(running) < workers and number != trials and (entry := method.ask(number)) is not None:
            running[number] = entry
            heappush(events, (clock + RUNGS[0] * entry.training_flops, number, 0))
            number += 1
        if not events:
            break
        clock, trial, rung = heappop(events)
        entry = running[trial]
        taken = (RUNGS[rung] - (RUNGS[rung - 1] if rung else 0.0)) * entry.training_flops
        if spent + taken > budget:
            break
        spent += taken
        if rung == LAST or not rung < len(entry.losses):
            del running[trial]
            method.ended(trial)
            ended.append(entry)
            if entry.values:
                points.append(pareto.costs(table.plan.objectives, entry.values))
                steps.append(spent)
                volumes.append(pareto.hypervolume(points, table.reference))
        elif method.goes_on(trial, rung, entry.losses[rung]):
            heappush(events, (clock + (RUNGS[rung + 1] - RUNGS[rung]) * entry.training_flops, trial, rung + 1))
        else:
            del running[trial]
    return Curve((*steps, spent), (*volumes, volumes[-1]), tuple(ended), number)


class Ours:
    """The product's proposals, prefetched as its driver does, and its halving."""

    def __init__(self, table: Table, sampler: str, halving: bool, seed: int, baselines: bool = True) -> None:
        plan = table.plan
        self._table, self._halving = table, halving
        self._proposals = Proposals(plan, sampler, seed, table.reference, plan.first() if baselines else ())
        self._ready: deque[Proposal] = deque()
        self._trials: dict[int, Trial] = {}
        self._entries: dict[int, Recorded] = {}
        self._curves: dict[int, list[Report]] = {}

    def ask(self, number: int) -> Recorded | None:
        while len(self._ready) <= WORKERS:
            proposal = self._proposals.take_given() or self._proposals.draw(number + len(self._ready))
            if proposal is None:
                break
            self._ready.append(proposal)
        if not self._ready:
            return None
        proposal = self._ready.popleft()
        self._proposals.assign(number, proposal)
        self._trials[number] = proposal.running(number, seq=number, driver=None, at=datetime.now(UTC))
        self._curves[number] = []
        self._entries[number] = entry = self._table.recorded[proposal.config_hash]
        return entry

    def goes_on(self, number: int, rung: int, loss: float) -> bool:
        trial, flops = self._trials[number], self._entries[number].training_flops
        tokens = round(RUNGS[rung] * trial.recipe.tokens)
        self._curves[number].append(Report(number, rung, rung, tokens, RUNGS[rung] * flops, loss, 0.0))
        self._proposals.observe(trial, self._curves[number])
        if not self._halving or self._proposals.should_continue(number, rung):
            return True
        self._proposals.observe(replace(trial, state=State.STOPPED), self._curves[number])
        return False

    def ended(self, number: int) -> None:
        values = self._entries[number].values
        failure = None if values else Failure(FailureKind.DIVERGED, "diverged when it was recorded")
        state = State.COMPLETE if values else State.FAILED
        self._proposals.observe(replace(self._trials[number], state=state, values=values, failure=failure), ())


# ---- the peers -----------------------------------------------------------------------------------------------


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
        self._scheduler.on_trial_add(None, _make_trial(number))  # type: ignore[arg-type]
        return self._table.entry(self._uniform)

    def goes_on(self, number: int, rung: int, loss: float) -> bool:
        result = {"eighths": round(EIGHTHS * RUNGS[rung]), "loss": loss}
        decision = self._scheduler.on_trial_result(None, _make_trial(number), result)  # type: ignore[arg-type]
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
        self._scheduler.on_trial_add(_make_trial(number))
        return entry

    def goes_on(self, number: int, rung: int, loss: float) -> bool:
        flops = float(np.log10(self._running[number].training_flops))
        result = {"eighths": round(EIGHTHS * RUNGS[rung]), "loss": loss, "flops": flops}
        return str(self._scheduler.on_trial_result(_make_trial(number), result)) == "CONTINUE"

    def ended(self, number: int) -> None:
        self._running.pop(number)


def _make_trial(number: int) -> Any:
    """As much of a trial as a scheduler looks at."""
    return SimpleNamespace(trial_id=str(number))
