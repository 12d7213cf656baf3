"""`nas bench search --part quality`: how good a front each method finds for the same training compute.

Every method searches the recorded table (nas/table.py) on a simulated clock that counts training FLOPs, so that a
search of an hour takes milliseconds and every claim rests on many seeds. Ours is the product's own proposals and
halving; the peers are the real libraries, at their defaults, where they are installed.
"""

from collections import deque
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from heapq import heappop, heappush
from typing import Protocol

import numpy as np

from nas import pareto
from nas.proposals import Proposals
from nas.records import Failure, FailureKind, Report, State, Trial
from nas.store import Proposal
from nas.table import Recorded, Table
from nas.train import RUNGS

WORKERS = 2
LAST = len(RUNGS) - 1


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

    def __init__(self, table: Table, sampler: str, halving: bool, seed: int) -> None:
        plan = table.plan
        self._table, self._halving = table, halving
        given = [(arch, recipe, "baseline") for arch, recipe in plan.baselines()]
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
