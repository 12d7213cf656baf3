"""The plan of a search: its space, data, objectives and limits, checked before anything runs."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import inf, isclose
from pathlib import Path
from typing import Any

import numpy as np

from hypernas.config.keys import (
    COUNTED,
    DEFAULT_OBJECTIVES,
    FIXED_ONLY,
    LATENCY,
    LIMITS,
    OBJECTIVES,
    SEARCHED,
    TRAINING_KEYS,
    recipe_keys,
    split_settings,
)
from hypernas.config.study_config import PRESETS, StudyConfig
from hypernas.errors import SpaceError, StudyError, UserError
from hypernas.pareto import LOGARITHMIC
from hypernas.records import EVALUATIONS, OWN, Recipe, SpaceSpec
from hypernas.search_spaces import load_space
from hypernas.search_spaces.base import (
    Choices,
    Cost,
    Domain,
    Key,
    Space,
    Suggest,
    Uniform,
    nearest_default,
)

SAMPLED = 2000  # architectures that limits are tried on before a search starts


KEPT_BYTES = 16  # of a parameter in float32: itself, its gradient, and AdamW's two moments


@dataclass(frozen=True, slots=True)
class Plan:
    """A StudyConfig made definite: the space, what is searched of the training, and the numbers of the preset."""

    space: Space
    space_spec: SpaceSpec
    objectives: tuple[str, ...]
    trials: int
    domains: Mapping[str, Domain]  # of SEARCHED
    recipe: Recipe  # every default
    data_path: str | None
    limits: Mapping[str, float] = field(default_factory=dict)  # of LIMITS, those that were set, but for LATENCY
    latency: float | None = None  # LATENCY in milliseconds; what is over it, a worker finds out
    memory: float | None = None  # bytes that a worker has for a trial, where that is known

    def allows(self, arch: Any) -> bool:
        """Whether an architecture stays within every limit, and may fit into a worker's memory at all.

        A batch that does not fit is trained in parts, so what counts is one sample, beside the weights, their gradients
        and the optimiser's two moments.
        """
        if not self.fits(arch):
            return False
        return not self.limits or self._is_within(self.spent(self.space.cost(arch)))

    def _is_within(self, spent: Mapping[str, float]) -> bool:
        return all(spent[name] <= limit for name, limit in self.limits.items())

    def fits(self, arch: Any) -> bool:
        """Whether an architecture may fit into a worker's memory."""
        return self.memory is None or training_bytes(self.space, arch) <= self.memory

    def spent(self, cost: Cost) -> dict[str, float]:
        """What an architecture of this cost needs of everything that is limited."""
        needs = {
            "max.flops": cost.flops_total,
            "max.parameters": cost.parameters_total,
            "max.memory": cost.activation_bytes * self.recipe.batch_tokens,
        }
        return {name: float(needs[name]) for name in self.limits}

    def recipe_with(self, picked: Mapping[str, Any]) -> Recipe:
        """The recipe with these values of SEARCHED."""
        return replace(self.recipe, **{SEARCHED[name]: value for name, value in picked.items()})

    def suggest(self, trial: Suggest) -> tuple[Any, Recipe]:
        """One architecture and how to train it; always the same parameters in the same order."""
        arch = self.space.suggest(trial)
        return arch, self.recipe_with({name: self.domains[name].suggest(trial, name) for name in SEARCHED})

    def params(self, arch: Any, recipe: Recipe) -> dict[str, Any]:
        """The parameters with which `suggest` returns these. Raises SpaceError when they are outside the search."""
        params = dict(self.space.params(arch))
        for name, value in recipe_keys(recipe).items():
            domain = self.domains[name]
            if isinstance(domain, Choices):
                if value not in domain.values:
                    raise SpaceError(f"{name}={value:g} is outside the search")
                if len(domain.values) == 1:
                    continue
            elif not domain.low <= value <= domain.high:
                raise SpaceError(f"{name}={value:g} is outside the search")
            params[name] = value
        return params

    def baselines(self) -> list[tuple[Any, Recipe]]:
        """The space's baseline at its default learning rate, at three times and at a third of it."""
        arch = self.space.baseline()
        domain = self.domains["optim.lr"]
        rate = self.recipe.learning_rate
        if isinstance(domain, Choices) and len(domain.values) == 1:
            return [(arch, self.recipe)]
        searched = domain.values if isinstance(domain, Choices) else ()
        rates = [
            # 0.009 as somebody wrote it, and not 0.003 * 3 beside it, which differs in its last digit.
            next((value for value in searched if isclose(value, rate * factor)), rate * factor)
            for factor in (1.0, 3.0, 1 / 3)
        ]
        return [(arch, self.recipe_with({"optim.lr": value})) for value in rates]

    def first(self) -> list[tuple[Any, Recipe, str]]:
        """What is trained before the sampler is asked, and why: the baselines, as far as limits allow them."""
        return [(arch, recipe, "baseline") for arch, recipe in self.baselines() if self.allows(arch)]


def make_plan(config: StudyConfig) -> Plan:
    """Raises SpaceError and UserError for whatever does not fit together. Imports the code of a space of one's own."""
    bare = load_space(config.space)
    if bare.task not in OBJECTIVES:
        raise UserError(f"space {config.space} has task {bare.task!r}: wanted {' or '.join(OBJECTIVES)}")
    preset = PRESETS[config.preset]
    space_settings, training = split_settings(config.settings, bare)
    limits = {name: LIMITS[name].check(training.pop(name)) for name in LIMITS if name in training}
    latency = limits.pop(LATENCY, None)
    if "base" not in space_settings:  # a named architecture brings its own
        space_settings = {**bare.presets.get(config.preset, {}), **space_settings}
    space = bare.restrict(space_settings) if space_settings else bare
    training = {**preset.training[space.task], **training}
    domains = {name: TRAINING_KEYS[name].search for name in SEARCHED}
    fixed = {name: TRAINING_KEYS[name].default for name in FIXED_ONLY}
    for name, text in training.items():
        key = TRAINING_KEYS[name]
        if name in SEARCHED:
            domains[name] = key.parse(text)
        else:
            fixed[name] = key.check(text)
    defaults = {SEARCHED[name]: nearest_default(TRAINING_KEYS[name], domain) for name, domain in domains.items()}
    total, batch = COUNTED[space.task]
    recipe = Recipe(**defaults, tokens=fixed[total], batch_tokens=fixed[batch], seed=fixed["train.seed"])
    plan = Plan(
        space=space,
        space_spec=SpaceSpec(config.space, space_settings, own=True),
        objectives=_objectives(config, space),
        trials=config.trials or preset.trials,
        domains=domains,
        recipe=recipe,
        data_path=resolve_data_path(fixed["data.path"]),
        limits=limits,
        latency=latency,
    )
    _check_limits(plan)
    return plan


def resolve_data_path(text: str) -> str | None:
    """Where `data.path` points to, from whatever folder it is read later; None for the default data."""
    return str(Path(text).expanduser().resolve()) if text else None


def _check_limits(plan: Plan) -> None:
    """Raises UserError when no architecture of a large sample stays within the limits."""
    if not plan.limits or plan.allows(plan.space.baseline()):
        return
    least = dict.fromkeys(plan.limits, inf)
    for arch in _sample(plan):
        spent = plan.spent(plan.space.cost(arch))
        if plan._is_within(spent):
            return
        least = {name: min(least[name], spent[name]) for name in least}
    asked = ", ".join(f"{name}={limit:g}" for name, limit in plan.limits.items())
    found = ", ".join(f"{name}={value:g}" for name, value in least.items())
    raise UserError(f"no architecture of {SAMPLED} drawn stays within {asked}; each for itself, the least was {found}")


def _sample(plan: Plan) -> Iterator[Any]:
    """Architectures drawn uniformly, SAMPLED of them but for those that the space refuses."""
    rng = np.random.default_rng(0)
    for _ in range(SAMPLED):
        with suppress(SpaceError):
            yield plan.suggest(Uniform(rng))[0]


def training_bytes(space: Space, arch: Any) -> float:
    """The least that training an architecture takes: what is kept of its parameters, and one sample's activations."""
    from hypernas.data.tasks import TASKS  # brings torch

    cost = space.cost(arch)
    return float(KEPT_BYTES * cost.parameters_total + cost.activation_bytes * TASKS[space.task].units(arch))


def check_memory(needs: float, memory: float | None, what: str) -> None:
    """Raises UserError where training `what` needs more bytes than a worker has; None: nobody knows how many it has."""
    if memory is not None and needs > memory:
        raise UserError(
            f"{what} needs {needs / 1e9:.3g} GB to be trained, and a worker has {memory / 1e9:.3g} GB here: wanted a "
            "smaller one, fewer --workers, or a machine with more memory"
        )


def check_fits(plan: Plan) -> None:
    """Raises UserError when no architecture of a large sample fits into a worker's memory."""
    if plan.fits(plan.space.baseline()):
        return
    least = inf
    for arch in _sample(plan):
        least = min(least, training_bytes(plan.space, arch))
        if plan.memory is not None and least <= plan.memory:
            return
    asked = ", ".join(f"{name}={text}" for name, text in plan.space_spec.settings.items()) or "the space as it is"
    check_memory(least, plan.memory, f"{asked}: the smallest of {SAMPLED} architectures drawn")


def _default(key: Key, domain: Domain) -> Any:
    """The key's default where the domain allows it, otherwise the domain's middle."""
    if isinstance(domain, Choices):
        return key.default if key.default in domain.values else domain.values[len(domain.values) // 2]
    inside = domain.low <= key.default <= domain.high
    return (
        key.default if inside else (domain.low * domain.high) ** 0.5 if domain.log else (domain.low + domain.high) / 2
    )


def with_data(plan: Plan, found: Mapping[str, str]) -> Plan:
    """The plan for the data found: the keys that data decides (`image.classes`), as far as the space has them.

    Raises UserError when `--set` says otherwise.
    """
    decided = {name: text for name, text in found.items() if name in plan.space.keys}
    settings = plan.space_spec.settings
    for name, text in decided.items():
        if settings.get(name, text) != text:
            raise UserError(f"{name}={settings[name]}, but the data has {text}: leave it out, or give other data")
    if not decided:
        return plan
    spec = replace(plan.space_spec, settings={**settings, **decided})
    return replace(plan, space=plan.space.restrict(decided), space_spec=spec)


def _objectives(config: StudyConfig, space: Space) -> tuple[str, ...]:
    known = OBJECTIVES[space.task]
    flops = next(name for name in known if name.startswith("flops"))
    asked = tuple(flops if name == "flops" else name for name in config.objectives) or DEFAULT_OBJECTIVES[space.task]
    if len(asked) == 1 and asked[0] not in LOGARITHMIC:
        asked = (*asked, flops)  # how good against how dear
    for name in asked:
        if name not in known:
            raise UserError(f"--objectives: nobody measures {name!r}; wanted some of {', '.join(known)}")
    if config.inherit and "ceg" in asked:
        raise UserError(
            "--inherit with the objective ceg: a child's own compute leaves out its parent's, so that gains would not "
            "compare; wanted other objectives, or no --inherit"
        )
    if len(set(asked)) < 2 or len(set(asked)) != len(asked):
        raise UserError(f"--objectives {','.join(asked)}: wanted at least two different ones of {', '.join(known)}")
    return asked


def check_evaluation(study: str, kept: str, given: str) -> None:
    """Raises StudyError where a study that is evaluated by code of one's own would go on without being told which."""
    if kept == OWN and given in (*EVALUATIONS, OWN):
        raise StudyError(
            f"study {study!r} is evaluated by code of its own: give evaluate='module:function' again, as no study "
            "names code for others to run"
        )
