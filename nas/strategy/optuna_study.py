"""The in-memory Optuna study that proposes. The store is the truth: this is refilled from it on every start.

Objectives reach Optuna as costs (smaller is better, log10 where ratios matter).
"""

import copy
import warnings
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from hypernas import pareto
from hypernas.search_spaces.base import SpaceError
from hypernas.strategy.samplers import Answers, answers, make_sampler

T = TypeVar("T")


FAILED = 2.0  # how unfinished a failed trial is: more than any that was stopped


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the sampler is told of a trial: costs, all finite, and the share of its training that it did not do.

    What is unfinished counts as infeasible: worse than whatever ran to its end, and the worse the earlier it ended.
    In a search with a limit on latency, `slow` is how far over it the trial was, as a share of the limit.
    """

    costs: tuple[float, ...]
    unfinished: float = 0.0
    slow: float | None = None

    @property
    def constraints(self) -> dict[str, float]:
        return {"unfinished": self.unfinished} | ({} if self.slow is None else {"latency_ms": self.slow})


class _Recorder:
    """Notes the distribution of every parameter it is asked for, and answers with stored ones or the first legal."""

    def __init__(self, params: Mapping[str, Any] | None = None) -> None:
        self._params = params
        self.distributions: dict[str, BaseDistribution] = {}

    def _answer(self, name: str, distribution: BaseDistribution, first: Any) -> Any:
        self.distributions[name] = distribution
        return first if self._params is None else self._params[name]

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._answer(name, CategoricalDistribution(choices), choices[0])

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        return int(self._answer(name, IntDistribution(low, high, log=log, step=step), low))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        return float(self._answer(name, FloatDistribution(low, high, log=log, step=step), low))


class _Draw(_Recorder):
    """Answers as the `optuna.Trial` of a sampler does, which compares and copies for each answer what is known here."""

    def __init__(self, study: optuna.Study, trial: FrozenTrial, space: Mapping[str, BaseDistribution]) -> None:
        super().__init__()
        self._study, self._trial, self._space = study, trial, space
        self._relative: dict[str, Any] | None = None

    def _answer(self, name: str, distribution: BaseDistribution, first: Any) -> Any:
        sampler, trial = self._study.sampler, self._trial
        if name in trial.params:
            return trial.params[name]
        if distribution.single():
            value = first
        else:
            if self._relative is None:
                self._relative = sampler.sample_relative(self._study, trial, dict(self._space))
            value = self._relative.get(name)
            if name not in self._relative or not distribution._contains(distribution.to_internal_repr(value)):
                value = sampler.sample_independent(self._study, trial, name, distribution)
        trial.params[name] = distribution.to_external_repr(distribution.to_internal_repr(value))
        trial.distributions[name] = distribution
        return value


def distributions(suggest: Callable[[Any], Any]) -> dict[str, BaseDistribution]:
    """Every parameter that `suggest` asks for, by name, in its order."""
    recorder = _Recorder()
    suggest(recorder)
    return recorder.distributions


LATEST = 300  # trials that a sampler sees, beside the front: each proposal takes time with every one of them
ENDED = 200  # that ended last, which it sees too: of a large cluster, the latest are all running
GONE = create_trial(state=TrialState.FAIL)  # in place of a trial that no sampler will see again


class _Latest(InMemoryStorage):
    """Shows a long study's latest trials and the best of all, so that the last proposal costs what the first did.

    Of one study, ids are numbers. Trials that are not shown any more are not kept, and those that are added finished
    are made when they are first shown: a study of a hundred thousand is resumed in a minute.
    """

    def __init__(self) -> None:
        super().__init__()
        self._latest: deque[int] = deque(maxlen=LATEST)
        self._ended: deque[int] = deque(maxlen=ENDED)
        self._front: list[int] = []
        self._front_costs = np.empty((0, 0))  # (trials of the front, objectives)
        self._unmade: dict[int, Callable[[], FrozenTrial]] = {}

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        number = super().create_new_trial(study_id, template_trial)
        self._append(self._latest, number)
        return number

    def add(self, study_id: int, make: Callable[[], FrozenTrial]) -> int:
        """A finished trial, made once it is shown; its number."""
        with self._lock:  # as create_new_trial, but for its copy, which takes longest of all that resuming does
            trials = self._studies[study_id].trials
            self._max_trial_id = number = len(trials)
            self._trial_id_to_study_id_and_number[number] = (study_id, number)
            trials.append(GONE)
        self._unmade[number] = make
        self._append(self._latest, number)
        return number

    def _append(self, shown: deque[int], number: int) -> None:
        oldest = shown[0] if len(shown) == shown.maxlen else None
        shown.append(number)
        if oldest is not None:
            self._release(oldest)

    def _release(self, number: int) -> None:
        """Frees a trial that is over, once nothing shows it."""
        if any(number in shown for shown in (self._latest, self._ended, self._front)):
            return
        trials = self._studies[0].trials
        if len(trials) > LATEST and (number in self._unmade or trials[number].state.is_finished()):
            self._unmade.pop(number, None)
            trials[number] = GONE

    def _get_trial(self, trial_id: int) -> FrozenTrial:
        make = self._unmade.pop(trial_id, None)
        if make is not None:
            trial = make()
            trial.number = trial._trial_id = trial_id
            self._set_trial(trial_id, trial)
        return super()._get_trial(trial_id)

    def forget(self, number: int) -> None:
        """A trial that nothing is known of is no use to a sampler."""
        if number in self._latest:
            self._latest.remove(number)
        self._release(number)

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        """Optuna's method without its check against earlier distributions and without a copy per answer."""
        trial = self._get_trial(trial_id)
        trial.params[param_name] = distribution.to_external_repr(param_value_internal)
        trial.distributions[param_name] = distribution

    def ended(self, number: int, costs: tuple[float, ...], *, trained: bool) -> None:
        """Takes in what a trial came to, and whether it was trained to its end."""
        if trained and not pareto.no_worse(self._front_costs.reshape(-1, len(costs)), np.array(costs)).any():
            stays = ~pareto.no_worse(np.array(costs), self._front_costs.reshape(-1, len(costs)))
            before = self._front
            self._front = [other for other, kept in zip(before, stays, strict=True) if kept] + [number]
            self._front_costs = np.vstack([self._front_costs.reshape(-1, len(costs))[stays], costs])
            for other in set(before).difference(self._front):
                self._release(other)
        self._append(self._ended, number)

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        """Of one objective; the one that Optuna notes may be gone."""
        if not self._front:
            raise ValueError("no trial was trained to its end yet")
        return self.get_trial(self._front[-1])

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        with self._lock:
            count = len(self._studies[study_id].trials)
            numbers: Iterable[int] = range(count)
            if states == (TrialState.WAITING,):  # one that waits is asked for before any other is made
                numbers = range(max(0, count - 1), count)
            elif count > LATEST:
                numbers = sorted({*self._front, *self._latest, *self._ended})
            for number in self._unmade.keys() & set(numbers):
                self._get_trial(number)
            trials = self._studies[study_id].trials
            shown = [trials[number] for number in numbers]
            if states is not None:
                shown = [trial for trial in shown if trial.state in states]
            return copy.deepcopy(shown) if deepcopy else shown


class Proposer(Generic[T]):
    """Asks and tells one in-memory study. A handle is Optuna's own number of a proposal.

    `suggest` draws one proposal from an `optuna.Trial` (or anything with its three methods).
    """

    def __init__(self, sampler: str, seed: int, population: int, objectives: int, suggest: Callable[[Any], T]) -> None:
        self._suggest = suggest
        self._distributions: dict[str, BaseDistribution] | None = distributions(suggest)
        self._sampler, self._seed, self._population = sampler, seed, population
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._storage = _Latest()
        self._study = optuna.create_study(storage=self._storage, directions=["minimize"] * objectives)
        self._asked: dict[int, optuna.Trial] = {}
        self._tried: set[Answers] = set()  # of every trial with an outcome
        self._pending: Counter[Answers] = Counter()  # of every proposal whose outcome is not known yet

    def ask(
        self, number: int, attempt: int, params: Mapping[str, Any] | None = None
    ) -> tuple[int, dict[str, Any], dict[str, Any], T | None]:
        """(handle, parameters, the sampler's attributes, what `suggest` returned) for proposal `number`; None in place
        of the last where `suggest` raised SpaceError, as a space with conditions of its own may.

        Drawn from a generator seeded by (study seed, number, attempt), whatever was asked before; with `params`, these
        are taken instead.
        """
        if params is not None:
            self._study.enqueue_trial(dict(params))
        name = self._sampler
        seed = int(np.random.SeedSequence([self._seed, number, attempt]).generate_state(1)[0])
        # The quasi-random sequence is one for the study; its position is kept there.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            seed = self._seed if name == "qmc" else seed
            sampler = make_sampler(name, seed, self._population, self._tried, self._pending)
        if self._distributions is not None:
            # Optuna would find these by comparing all trials, which takes longer with every one.
            sampler.infer_relative_search_space = lambda *_: dict(self._distributions or {})  # type: ignore[method-assign]
        self._study.sampler = sampler
        trial = self._study.ask()
        source: Any = trial
        if params is None and self._distributions is not None:
            source = _Draw(self._study, self._storage.get_trial(trial._trial_id), self._distributions)
        try:
            value = self._suggest(source)
        except SpaceError:
            value = None
        asked = set(self._distributions or ())
        frozen = self._storage.get_trial(trial._trial_id)
        if value is not None and asked and frozen.params.keys() != asked:
            self._distributions = None  # a space with conditional parameters: Optuna has to look
        self._asked[trial.number] = trial
        self._pending[answers(frozen.params)] += 1
        return trial.number, dict(frozen.params), dict(frozen.system_attrs), value

    def tell(self, handle: int, outcome: Outcome | None) -> None:
        """The outcome of a proposal; None when it was never trained, or its end says nothing of the architecture."""
        trial = self._asked.pop(handle)
        self._forget_pending(answers(self._storage.get_trial(handle).params))
        if outcome is None:
            self._end(trial._trial_id, TrialState.FAIL, None)
            self._storage.forget(handle)
            return
        for name, value in outcome.constraints.items():
            trial.set_constraint(name, value)
        self._end(trial._trial_id, TrialState.COMPLETE, list(outcome.costs))
        self._learned(handle, self._storage.get_trial(handle).params, outcome)  # of one study, ids are numbers

    def _forget_pending(self, key: Answers) -> None:
        self._pending[key] -= 1
        if not self._pending[key]:
            del self._pending[key]

    def _end(self, trial_id: int, state: TrialState, values: list[float] | None) -> None:
        """`Study.tell`, without its copy of the trial: that takes longer than a sampler does to make a child."""
        self._study._thread_local.cached_all_trials = None
        self._study.sampler.after_trial(self._study, self._storage.get_trial(trial_id), state, values)
        self._storage.set_trial_state_values(trial_id, state, values)

    def add(self, params: Mapping[str, Any], attrs: Mapping[str, Any], outcome: Outcome | None) -> int:
        """A finished trial that was not asked here: one of the store's, or a baseline. Its handle."""
        handle = self._storage.add(self._study._study_id, partial(self._make_trial, params, attrs, outcome))
        if outcome is None:
            self._storage.forget(handle)
        else:
            self._learned(handle, params, outcome)
        return handle

    def _make_trial(self, params: Mapping[str, Any], attrs: Mapping[str, Any], outcome: Outcome | None) -> FrozenTrial:
        recorder = _Recorder(params)
        self._suggest(recorder)
        return create_trial(
            state=TrialState.FAIL if outcome is None else TrialState.COMPLETE,
            values=None if outcome is None else list(outcome.costs),
            params=dict(params),
            distributions=recorder.distributions,
            system_attrs=dict(attrs),
            constraints=None if outcome is None else outcome.constraints,
        )

    def _learned(self, handle: int, params: Mapping[str, Any], outcome: Outcome) -> None:
        """Remembers, for the whole study, what a trial was that ended with an outcome, and what it came to."""
        self._tried.add(answers(params))
        self._storage.ended(handle, outcome.costs, trained=not outcome.unfinished)
