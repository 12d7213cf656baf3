"""What to train next, and which running trial is stopped: the mind of a study, without its store.

It knows nothing but what it is told, in the order in which it is told, and each draw has a generator of its own. Every
proposal notes what was told since the one before it, so that a search can be replayed to the same proposals whatever
its workers' speed was (nas/study/replay.py).
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from math import isfinite
from typing import Any

import numpy as np

from hypernas import pareto
from hypernas.config.plan import Plan
from hypernas.data.tasks import TASKS
from hypernas.records import FINISHED, POLICIES, Policy, Proposal, Recipe, Report, State, Trial, is_lost
from hypernas.search_spaces.base import SpaceError, Uniform, arch_to_json, digest
from hypernas.strategy import halving, samplers
from hypernas.strategy.optuna_study import FAILED, Outcome, Proposer
from hypernas.strategy.samplers import first_generation, population_size
from hypernas.training.inherit import INHERITED, PARENT, change, obstacle
from hypernas.yardstick import Yardstick

CHEAPEST_OF = 4  # until the sampler has learned something, the cheapest of this many uniform draws is trained
MAX_STALE_DRAWS = 20  # after this many known or refused draws of the sampler in a row, draw uniformly
MAX_DRAWS = 5000  # after this many uniform draws that find nothing new, the space counts as exhausted
JOURNAL = "journal"  # beside the sampler's own attributes of a trial
OURS = (JOURNAL, PARENT, INHERITED)


def config_hash(arch_hash: str, recipe: Recipe) -> str:
    """Names what a trial trains and how, its seed included."""
    return digest({"arch": arch_hash, **asdict(recipe)})


def latency_excess(trial: Trial, limit: float | None) -> float | None:
    """How far a trial's latency is over the limit, as a share of it: at most 0 within it. None without a limit.

    0 where nobody measured it: a trial that halving stopped, or that failed of something else. (Optuna's GP wants the
    same constraints of every trial.)
    """
    if limit is None:
        return None
    measured = trial.values.get("latency_ms", trial.diagnostics.get("latency_ms"))  # of a failed one there, no value
    return 0.0 if measured is None else measured / limit - 1


class Proposals:
    """Proposes configurations that nobody trained, from what it is told of the others.

    `cache_hits` counts draws that needed no training, as their outcome was known; `refused` those over a limit.
    """

    def __init__(
        self,
        plan: Plan,
        sampler: str,
        seed: int,
        reference: pareto.Point,
        given: Iterable[tuple[Any, Recipe, str]] = (),
        session: str = "",
        yardstick: Yardstick | None = None,
        inherit: bool = False,
    ) -> None:
        self.cache_hits = self.refused = 0
        self._plan, self._seed, self._yardstick, self._inherit = plan, seed, yardstick, inherit
        self.sampler = sampler
        self._journal = {"session": session, "sampler": sampler, "trials": plan.trials}
        task = TASKS[plan.space.task]
        self._loss, self._flops = task.loss, f"flops_per_{task.unit}"
        self._proposer = Proposer(
            sampler, seed, population_size(plan.trials), objectives=len(plan.objectives), suggest=plan.suggest
        )
        self._foreknown = (self._flops, "parameters")
        self._axis = next((i for i, name in enumerate(plan.objectives) if name in self._foreknown), None)
        self._known: dict[str, Outcome | None] = {}  # config hash -> what came of it; None while unknown
        self._asked: dict[str, int] = {}  # config hash -> the sampler's handle, until a worker takes the proposal
        self._handles: dict[int, int] = {}  # trial number -> the sampler's handle
        self._configs: dict[int, str] = {}  # the sampler's handle -> config hash
        self._answered: dict[tuple[Any, ...], str] = {}  # the sampler's answers -> config hash, of all it drew
        self._numbers: dict[str, int] = {}  # config hash -> number of the trial that ended with it
        self._archs_with_weights: dict[str, Mapping[str, Any]] = {}  # by config hash
        self._rungs: dict[int, halving.Rung] = {}
        self._costs: dict[int, dict[str, float]] = {}  # running trial -> what its architecture costs
        self._worst = tuple(reference)  # of every objective, what a model scores that learned nothing
        self._observed: list[list[int]] = []  # [trial number, whether it is finished] since the last proposal
        self._given = deque(self._make(arch, recipe, origin) for arch, recipe, origin in given)
        baselines = sum(proposal.origin == "baseline" for proposal in self._given)
        generation = first_generation(sampler, plan.trials)
        self._unlearned = generation and baselines + generation

    # ---- observing -------------------------------------------------------------------------------------------

    def assign(self, number: int, proposal: Proposal) -> None:
        """Notes that a worker took up the proposal, as trial `number`."""
        if proposal.config_hash in self._asked:
            self._handles[number] = self._asked.pop(proposal.config_hash)

    def observe(self, trial: Trial, curve: Sequence[Report]) -> None:
        """Takes in that a trial is in another state than it was, or has new points on its curve."""
        config = config_hash(trial.arch_hash, trial.recipe)
        for report in curve:
            rung = self._rungs.setdefault(report.rung, halving.Rung(self._axis))
            rung.add(trial.number, self._point(trial.arch, report))
        if trial.state in FINISHED and not is_lost(trial):  # nothing is known of it, and it may be tried again
            self._observe_end(trial, config, self._outcome(trial, curve))
        elif config not in self._known:
            self._known[config] = None
            self._observed.append([trial.number, 0])

    def _observe_end(self, trial: Trial, config: str, outcome: Outcome | None) -> None:
        if outcome is not None and outcome.unfinished < FAILED:
            self._worst = tuple(map(max, self._worst, outcome.costs))
        self._known[config] = outcome
        self._numbers[config] = trial.number
        self._costs.pop(trial.number, None)
        if self._inherit and trial.state == State.COMPLETE:  # one that was stopped has no weights
            self._archs_with_weights[config] = trial.arch
        self._observed.append([trial.number, 1])
        handle = self._handles.pop(trial.number, None)
        if handle is not None:
            self._proposer.tell(handle, outcome)
        elif trial.params:  # another driver's, an earlier run's, or a baseline inside the searched space
            attrs = {name: value for name, value in trial.sampler_attrs.items() if name not in OURS}
            self._configs[self._proposer.add(trial.params, attrs, outcome)] = config

    def _outcome(self, trial: Trial, curve: Sequence[Report]) -> Outcome | None:
        """The outcome that the sampler is told of; None where a trial's end says nothing of its architecture."""
        outcome = self._measured_outcome(trial, curve)
        if trial.failure is not None and POLICIES[trial.failure.kind] not in (Policy.TEACH, Policy.SHRINK):
            return None
        if outcome is None or not all(map(isfinite, outcome.costs)):
            outcome = Outcome(self._worst, unfinished=FAILED)
        return replace(outcome, slow=latency_excess(trial, self._plan.latency))

    def _measured_outcome(self, trial: Trial, curve: Sequence[Report]) -> Outcome | None:
        """The outcome that was measured of a trial that ended; None when it failed."""
        if trial.state == State.COMPLETE:
            return Outcome(pareto.costs(self._plan.objectives, trial.values))
        if trial.state == State.STOPPED and curve:
            last = max(curve, key=lambda report: report.rung)
            point = dict(zip(self._plan.objectives, self._point(trial.arch, last), strict=True))
            # A rung knows the loss, what follows from it, and the costs; what else will be measured counts as the
            # worst seen.
            costs = (
                point[name] if name in (self._loss, "ceg", *self._foreknown) else worst
                for name, worst in zip(self._plan.objectives, self._worst, strict=True)
            )
            return Outcome(tuple(costs), unfinished=1 - last.tokens / trial.recipe.tokens)
        return None

    # ---- rungs -----------------------------------------------------------------------------------------------

    def should_continue(self, number: int, rung: int) -> bool:
        """Whether a trial that reached a rung trains on, beside all that reached it before."""
        return halving.is_exempt(number) or self._rungs[rung].keeps(number)

    def _point(self, arch: Mapping[str, Any], report: Report) -> tuple[float, ...]:
        """A trial's costs at a rung: its loss there, and what its architecture costs at its gates' target rates."""
        known = self._costs.get(report.trial)
        if known is None:
            known = self._costs[report.trial] = self._cost(self._plan.space.from_json(arch))
        if self._yardstick is not None:
            # Of a loss on its way down: low for all that are compared at a rung, as none has seen its schedule's end.
            known = known | {"ceg": self._yardstick.gain(report.loss, report.training_flops)}
        return tuple(pareto.cost(name, known[name]) if name in known else report.loss for name in self._plan.objectives)

    def _cost(self, arch: Any) -> dict[str, float]:
        """What is known of an architecture before its training, with its gates at their target rate."""
        cost = self._plan.space.cost(arch)
        rate = float(arch_to_json(arch).get("gates.rate") or 1.0)
        flops = cost.flops_executed([rate] * len(cost.gated_flops))
        return {"parameters": float(cost.parameters_total), self._flops: flops}

    # ---- proposing -------------------------------------------------------------------------------------------

    def take_given(self) -> Proposal | None:
        """Takes the next configuration that is trained before the sampler is asked; None when there are no more."""
        while self._given:
            proposal = self._given.popleft()
            if proposal.config_hash not in self._known:
                self._known[proposal.config_hash] = None
                return proposal
        return None

    def draw(self, number: int) -> Proposal | None:
        """Draws a configuration that nobody has trained or is training, from the sampler; None when none is found.

        `number` is the one its trial is expected to get; it seeds the draw.
        """
        if number < self._unlearned and (params := self._draw_uniformly(number, CHEAPEST_OF)) is not None:
            return self._draw_once(number, 0, params)
        for attempt in range(MAX_STALE_DRAWS):
            proposal = self._draw_once(number, attempt)
            if proposal is not None:
                return proposal
        params = self._draw_uniformly(number)
        return None if params is None else self._draw_once(number, MAX_STALE_DRAWS, params)

    def _draw_once(self, number: int, attempt: int, params: Mapping[str, Any] | None = None) -> Proposal | None:
        """Asks the sampler once, or takes `params` for its answer; None where that is over a limit, or known."""
        handle, answers, attrs, drawn = self._proposer.ask(number, attempt, params)
        if drawn is None or not self._plan.allows(drawn[0]):
            # Not told as bad: a sampler that is told would shun whatever is large.
            self.refused += 1
            self._proposer.tell(handle, None)
            return None
        key = tuple(answers.items())
        proposal = None if key in self._answered else self._make(*drawn, "sampler", answers)
        config = self._answered.setdefault(key, proposal.config_hash if proposal else "")
        self._configs[handle] = config
        if proposal is None or config in self._known:
            # A known outcome is told at once: evolution goes on from it, and nothing is trained twice.
            self.cache_hits += 1
            self._proposer.tell(handle, self._known[config])
            return None
        self._known[proposal.config_hash] = None
        self._asked[proposal.config_hash] = handle
        journal = {**self._journal, "asked": number, "told": self._observed}
        if self._plan.memory is not None:
            journal["memory"] = self._plan.memory
        self._observed = []
        sampled = attrs.pop(samplers.PARENT, None)
        # Where `params` took the place of the sampler's answer, they are nobody's child.
        descent = self._descent(sampled, drawn[0]) if params is None and sampled is not None else {}
        return replace(proposal, sampler_attrs={**attrs, **descent, JOURNAL: journal})

    def _descent(self, handle: int, arch: Any) -> dict[str, Any]:
        """What the row of a child says of its parent: its number, and what is new where its weights are inherited."""
        config = self._configs[handle]
        found: dict[str, Any] = {PARENT: self._numbers[config]}
        if config in self._archs_with_weights:
            parent = self._archs_with_weights[config]
            if obstacle(self._plan.space, self._plan.space.from_json(parent), arch) is None:
                found[INHERITED] = change(parent, arch_to_json(arch))
        return found

    def _draw_uniformly(self, number: int, among: int = 1) -> dict[str, Any] | None:
        """Draws parameters uniformly: of `among` configurations that are new and within the limits, the cheapest; None
        when none is found."""
        rng = np.random.default_rng([self._seed, number])
        found: list[tuple[float, dict[str, Any]]] = []
        for _ in range(MAX_DRAWS):
            trial = Uniform(rng)
            try:
                arch, recipe = self._plan.suggest(trial)
            except SpaceError:
                continue
            known = config_hash(self._plan.space.arch_hash(arch), recipe) in self._known
            if not known and self._plan.allows(arch):
                found.append((recipe.tokens * self._cost(arch)[self._flops], trial.answers))
            if len(found) == among:
                break
        return min(found, key=lambda entry: entry[0], default=(0.0, None))[1]

    def withdraw_duplicate(self, proposal: Proposal) -> None:
        """Tells the sampler that another driver leased this configuration first."""
        if proposal.config_hash in self._asked:
            self._proposer.tell(self._asked.pop(proposal.config_hash), self._known.get(proposal.config_hash))

    def _make(self, arch: Any, recipe: Recipe, origin: str, params: Mapping[str, Any] | None = None) -> Proposal:
        if params is None:
            try:
                params = self._plan.params(arch, recipe)
            except SpaceError:
                params = {}  # a baseline outside the searched space is measured, but cannot teach the sampler
        arch_hash = self._plan.space.arch_hash(arch)
        return Proposal(
            params=params,
            arch=arch_to_json(arch),
            arch_hash=arch_hash,
            config_hash=config_hash(arch_hash, recipe),
            recipe=recipe,
            origin=origin,
            sampler_attrs={},
        )
