"""Samplers by name: Optuna's, any of OptunaHub's, and regularised evolution of our own.

One is made for every proposal, from (study seed, proposal number): nothing of a sampler outlives its proposal but what
it wrote beside the trial.
"""

from collections.abc import Container, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from hypernas import pareto
from hypernas.config.study_config import HUB
from hypernas.errors import UserError

Answers = tuple[tuple[str, Any], ...]  # a trial's parameters, by name


def answers(params: Mapping[str, Any]) -> Answers:
    """The same for the same parameters in any order: a store may keep another than the sampler's."""
    return tuple(sorted(params.items()))


def make_sampler(
    name: str, seed: int, population: int, tried: Container[Answers], pending: Container[Answers] = ()
) -> BaseSampler:
    """`population` is the generation size of the evolutionary samplers; `tried` what ended of a long study, also where
    the sampler is shown its latest trials alone, and `pending` what was asked for and has not ended.

    Raises KeyError for an unknown name, and UserError for one of OptunaHub's that cannot be loaded.
    """
    if name.startswith(HUB):
        return hub_sampler(name.removeprefix(HUB), seed)
    return {
        "evolution": lambda: EvolutionSampler(population, seed, tried, pending),
        "nsgaii": lambda: _avoiding_duplicates(NSGAIISampler(population_size=population, seed=seed), seed, tried),
        "nsgaiii": lambda: _avoiding_duplicates(NSGAIIISampler(population_size=population, seed=seed), seed, tried),
        "tpe": lambda: TPESampler(multivariate=True, constant_liar=True, seed=seed),
        "gp": lambda: GPSampler(seed=seed, n_startup_trials=population, warn_independent_sampling=False),
        "random": lambda: RandomSampler(seed=seed),
        "qmc": lambda: QMCSampler(scramble=True, seed=seed, warn_independent_sampling=False),
    }[name]()


def population_size(trials: int) -> int:
    """Small enough that a short search evolves too, and that a long one does not sort thousands for each proposal."""
    return min(100, max(8, trials // 4))


def choose_sampler(asked: str | None, halving: bool) -> str:
    """The sampler's name: what was asked for or, where nothing was, what found the better fronts on recorded trainings
    (`nas bench search --part quality`).

    With halving the two are level, and TPE's proposals take longer with every trial.
    """
    return asked or ("evolution" if halving else "tpe")


def first_generation(name: str, trials: int) -> int:
    """How many of a search's first trials are drawn without having learned; none where a sampler never learns."""
    learns = name in ("evolution", "nsgaii", "nsgaiii", "tpe", "gp")
    return min(16, population_size(trials)) if learns else 0


def hub_sampler(name: str, seed: int) -> BaseSampler:
    """A sampler of https://hub.optuna.org by its package's name (`auto_sampler`), fetched when it is first used.

    Raises UserError when optunahub is not installed, or the package cannot be had.
    """
    kind: Any = _hub_class(name)
    try:
        sampler: BaseSampler = kind(seed=seed)
    except TypeError as error:
        raise UserError(f"--sampler {HUB}{name}: {kind.__name__} cannot be made from a seed alone: {error}") from error
    return sampler


@lru_cache
def _hub_class(name: str) -> type[BaseSampler]:
    try:
        import optunahub
    except ImportError as error:
        raise UserError(f"--sampler {HUB}{name} needs optunahub: pip install optunahub") from error
    package = name if "/" in name else f"samplers/{name}"
    try:
        module = optunahub.load_module(package)
    except Exception as error:  # no network, no such package, an import of its own: whatever it is, it is said
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--sampler {HUB}{name}: OptunaHub did not give {package}: {reason}") from error
    found = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, BaseSampler)]
    own = [kind for kind in found if kind.__module__.startswith(module.__name__)]
    if not own:
        raise UserError(f"--sampler {HUB}{name}: {package} holds no sampler")
    return own[0]


CHILDREN = 50  # that evolution makes until one is new
PARENT = "evolution:parent"  # among an Optuna trial's system attributes: the number of the one it is a child of


class EvolutionSampler(BaseSampler):
    """Regularised evolution (Real et al. 2019, https://arxiv.org/abs/1802.01548), for several objectives.

    The parent is the best of a random few among the youngest `population` trials, by constrained non-dominated rank,
    and the child differs from it in one choice: a number moves to a value nearby (deeper, wider), anything else to
    another value. Old trials leave the population however good they are. A child notes its parent (`PARENT`), and is
    none of `tried` and none of `pending`: the workers of a large cluster train more than the sampler is shown.
    """

    def __init__(
        self,
        population: int,
        seed: int,
        tried: Container[Answers],
        pending: Container[Answers] = (),
        tournament: int = 4,
    ) -> None:
        self._population, self._tried, self._pending, self._tournament = population, tried, pending, tournament
        self._rng = np.random.default_rng(seed)
        self._random = RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        from optuna.search_space import intersection_search_space

        return dict(intersection_search_space(study.get_trials(deepcopy=False)))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        choices = _free_parameters(search_space)
        names = list(search_space)
        known = study._get_trials(deepcopy=False, use_cache=True)
        full = [other for other in known if search_space.keys() <= other.params.keys()]
        young = [other for other in full if other.state == TrialState.COMPLETE][-self._population :]
        if len(young) < self._population or not choices:
            return {}
        of = itemgetter(*names)
        seen = {of(other.params) for other in full}
        order = _constrained_ranks(young)
        for _ in range(CHILDREN):
            chosen = self._rng.choice(len(young), size=min(self._tournament, len(young)), replace=False)
            parent = young[min(chosen, key=lambda index: order[index])]
            child = {name: parent.params[name] for name in names}
            vary(child, choices, self._rng)
            key = answers(child)
            if of(child) not in seen and key not in self._tried and key not in self._pending:
                study._storage.set_trial_system_attr(trial._trial_id, PARENT, parent.number)
                return child
        return {}  # everything near is known: anywhere then

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._random.sample_independent(study, trial, param_name, param_distribution)


def _avoiding_duplicates(sampler: BaseSampler, seed: int, tried: Container[Answers]) -> BaseSampler:
    """A genetic sampler whose children are new: one that was tried is varied, a choice at a time, until it is not.

    Late in a search nine in ten of Optuna's are known, and each costs as much as a new one.
    """
    relative, rng = sampler.sample_relative, np.random.default_rng(seed)

    def sample_relative(study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        child = relative(study, trial, search_space)
        if not child:  # a first generation, drawn evenly
            return {}
        for name, domain in search_space.items():
            if name not in child:  # a mutation: Optuna leaves it to be drawn evenly
                child[name] = sampler.sample_independent(study, trial, name, domain)
        choices = _free_parameters(search_space)
        for _ in range(CHILDREN):
            if not choices or answers(child) not in tried:
                return child
            vary(child, choices, rng)
        return {}  # everything near is known: anywhere then

    sampler.sample_relative = sample_relative  # type: ignore[method-assign] # a subclass would rename its attributes
    return sampler


def _free_parameters(search_space: Mapping[str, BaseDistribution]) -> dict[str, BaseDistribution]:
    """Parameters with more than one possible value."""
    return {name: domain for name, domain in search_space.items() if not domain.single()}


def vary(params: dict[str, Any], choices: Mapping[str, BaseDistribution], rng: np.random.Generator) -> None:
    """Moves one of the choices, whichever, to a neighbouring value."""
    name = list(choices)[int(rng.integers(len(choices)))]
    params[name] = neighbour(choices[name], params[name], rng)


def neighbour(domain: BaseDistribution, value: Any, rng: np.random.Generator) -> Any:
    """A value nearby where values have an order, any other where they have none."""
    if isinstance(domain, CategoricalDistribution):
        values = list(domain.choices)
    elif domain.step is None:  # type: ignore[attr-defined] # a continuous one: a tenth of its range either way
        low, high = domain.low, domain.high  # type: ignore[attr-defined]
        if domain.log:  # type: ignore[attr-defined]
            moved = np.exp(np.log(value) + 0.1 * np.log(high / low) * rng.standard_normal())
        else:
            moved = value + 0.1 * (high - low) * rng.standard_normal()
        return float(np.clip(moved, low, high))
    else:
        step = domain.step  # type: ignore[attr-defined]
        count = round((domain.high - domain.low) / step) + 1  # type: ignore[attr-defined]
        values = [domain.low + index * step for index in range(count)]  # type: ignore[attr-defined]
    if all(isinstance(other, (int, float)) for other in values):
        values.sort()
        place = values.index(value)
        reach = max(1, len(values) // 4)  # of a long list, single steps would cross little in a whole search
        near = [index for index in range(place - reach, place + reach + 1) if 0 <= index < len(values)]
        near.remove(place)
        return values[int(rng.choice(near))]
    others = [other for other in values if other != value]
    return others[int(rng.integers(len(others)))]


def _constrained_ranks(trials: Sequence[FrozenTrial]) -> list[tuple[float, int]]:
    """Smaller is better: how far a trial is from feasible, then its non-dominated rank."""
    violations = [sum(max(0.0, value) for value in trial.constraints.values()) for trial in trials]
    return list(zip(violations, pareto.ranks([trial.values for trial in trials]), strict=True))
