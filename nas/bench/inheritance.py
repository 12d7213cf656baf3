"""`nas bench search --part inheritance`: what a child gains by starting from its parent's weights, and what it bends.

Pairs of parent and child are drawn in the space of the recorded table (table.py) as evolution draws them, from one
seed. Of each pair the parent is trained, the child from drawn weights and the child from its parent's, all on the same
tokens by the search's own training; and the child from drawn weights on twice as many, which is what an heir and its
parent saw together. A seed gives the same pairs anywhere, and the same losses on one machine type.
"""

import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from statistics import quantiles
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress as Bar

from hypernas.bench.table import load_table
from hypernas.config.plan import Plan, make_plan
from hypernas.config.study_config import StudyConfig
from hypernas.data.tasks import TASKS
from hypernas.records import Inheritance, Job, Recipe, Result
from hypernas.search_spaces.base import FixedTrial, SpaceError, Uniform, arch_to_json
from hypernas.strategy.halving import rank_correlation
from hypernas.strategy.optuna_study import distributions
from hypernas.strategy.proposals import config_hash
from hypernas.strategy.samplers import neighbour
from hypernas.training.evaluate import evaluate
from hypernas.training.inherit import change, obstacle
from hypernas.version import version

PAIRS = 7  # of each kind of change
DRAWN = 2000  # mutations, for the shares that can inherit


@dataclass(frozen=True, slots=True)
class Mutation:
    """One step of evolution: `kind` is the parameter that differs."""

    kind: str
    parent: tuple[Any, Recipe]
    child: tuple[Any, Recipe]


def mutations(plan: Plan, seed: int) -> Iterator[Mutation]:
    """Evolution's own steps, from parents drawn evenly from the space, for ever."""
    rng = np.random.default_rng(seed)
    domains = distributions(plan.suggest)
    open_names = [name for name, domain in domains.items() if not domain.single()]
    while True:
        even = Uniform(rng)
        try:
            parent = plan.suggest(even)
            kind = open_names[int(rng.integers(len(open_names)))]
            changed = {**even.answers, kind: neighbour(domains[kind], even.answers[kind], rng)}
            yield Mutation(kind, parent, plan.suggest(FixedTrial(changed)))
        except SpaceError:  # a space may have conditions of its own: evolution draws again too
            continue


def inheritable(plan: Plan, mutation: Mutation) -> bool:
    return obstacle(plan.space, mutation.parent[0], mutation.child[0]) is None


def shares(plan: Plan, steps: Sequence[Mutation]) -> dict[str, float]:
    """By kind of change, and over all: the share of evolution's steps whose child can inherit."""
    drawn = Counter(step.kind for step in steps)
    can = Counter(step.kind for step in steps if inheritable(plan, step))
    return {"all": can.total() / len(steps), **{kind: can[kind] / drawn[kind] for kind in sorted(drawn)}}


def chosen_pairs(plan: Plan, steps: Sequence[Mutation], count: int) -> list[Mutation]:
    """The first `count` different steps of every kind whose child can inherit: one of each, then the second ones."""
    found: dict[str, dict[tuple[str, str], Mutation]] = {}
    for step in steps:
        of_kind = found.setdefault(step.kind, {})
        if len(of_kind) < count and inheritable(plan, step):
            of_kind.setdefault((name_of(plan, *step.parent), name_of(plan, *step.child)), step)
    of_kinds = [tuple(found[kind].values()) for kind in sorted(found)]
    return [step for row in zip_longest(*of_kinds) for step in row if step is not None]


def name_of(plan: Plan, arch: Any, recipe: Recipe) -> str:
    return config_hash(plan.space.arch_hash(arch), recipe)


@dataclass(frozen=True, slots=True)
class Trained:
    """The losses of one pair, in the task's unit."""

    kind: str
    scratch: float
    longer: float  # from drawn weights, on twice the tokens
    inherited: float


class Trainings:
    """Trains what it is asked for, each configuration with drawn weights once."""

    def __init__(self, plan: Plan, seed: int, tick: Callable[[], None]) -> None:
        self._plan, self._seed, self._tick = plan, seed, tick
        self._task = TASKS[plan.space.task]
        self._data = self._task.load(plan.data_path)
        self._done: dict[str, Result] = {}

    def scratch(self, arch: Any, recipe: Recipe) -> Result:
        name = name_of(self._plan, arch, recipe)
        if name not in self._done:
            self._done[name] = self._run(arch, recipe)
        self._tick()
        return self._done[name]

    def inherited(self, mutation: Mutation) -> Result:
        before, after = (arch_to_json(arch) for arch, _ in (mutation.parent, mutation.child))
        weights = self._done[name_of(self._plan, *mutation.parent)].weights
        found = self._run(*mutation.child, Inheritance(0, before, change(before, after), weights, None))
        self._tick()
        return found

    def _run(self, arch: Any, recipe: Recipe, inherits: Inheritance | None = None) -> Result:
        plan = self._plan
        job = Job(
            study="inheritance",
            trial=1,
            token=1,
            space=plan.space_spec,
            arch=arch_to_json(arch),
            recipe=recipe,
            data_path=plan.data_path,
            data_hash=self._data.hash,
            data_seed=self._seed,
            inherits=inherits,
        )
        return next(event for event in evaluate(job) if isinstance(event, Result))

    def pair(self, mutation: Mutation) -> Trained:
        arch, recipe = mutation.child
        self.scratch(*mutation.parent)
        results = (
            self.scratch(arch, recipe),
            self.scratch(arch, replace(recipe, tokens=2 * recipe.tokens)),
            self.inherited(mutation),
        )
        return Trained(mutation.kind, *(result.values[self._task.loss] for result in results))


def measure(seed: int = 0, pairs: int = PAIRS, plan: Plan | None = None) -> dict[str, Any]:
    """`nas bench --json`: shares of mutations, gains and rank correlations, by kind of change and over all.

    `pairs` of each kind, at least 2. `plan`: the recorded table's by default.
    """
    plan = plan or load_table().plan
    steps = list(islice(mutations(plan, seed), DRAWN))
    chosen = chosen_pairs(plan, steps, pairs)
    with Bar(console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=4 * len(chosen))
        trainings = Trainings(plan, seed, lambda: bar.advance(task))
        trained = []
        for mutation in chosen:
            trained.append(trainings.pair(mutation))
            bar.console.print(describe(trained[-1]), soft_wrap=True)
    small = make_plan(StudyConfig(preset="small"))
    rows = share_rows("the table's space", shares(plan, steps))
    rows += share_rows("--preset small", shares(small, list(islice(mutations(small, seed), DRAWN))))
    unit = TASKS[plan.space.task].loss
    for kind in ("all", *dict.fromkeys(pair.kind for pair in trained)):
        rows += pair_rows(kind, unit, [pair for pair in trained if kind in ("all", pair.kind)])
    tokens = f"{plan.recipe.tokens:,} {TASKS[plan.space.task].unit}s"
    return {
        "device": f"{platform.machine()}, {len(chosen)} pairs of {tokens}, seed {seed}",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, hypernas {version()}",
        "rows": rows,
    }


def describe(pair: Trained) -> str:
    return (
        f"{pair.kind}: {pair.scratch:.6f} from drawn weights, {pair.longer:.6f} on twice the tokens, "
        f"{pair.inherited:.6f} inherited"
    )


def share_rows(space: str, found: Mapping[str, float]) -> list[dict[str, Any]]:
    return [_row(f"can inherit in {space}", kind, can, "share") for kind, can in found.items()]


def pair_rows(kind: str, unit: str, pairs: Sequence[Trained]) -> list[dict[str, Any]]:
    """How much lower the loss of an heir is, as medians with quartiles: than its own from drawn weights, on the same
    tokens and on twice as many. And Spearman's correlation with the losses from drawn weights: that of the heirs'
    losses, and that of the losses on twice the tokens, which no parent bends."""
    rows = []
    for name, gains in (
        ("gain", [pair.scratch - pair.inherited for pair in pairs]),
        ("gain over twice the tokens", [pair.longer - pair.inherited for pair in pairs]),
    ):
        low, middle, high = quantiles(gains, n=4, method="inclusive")
        rows.append(_row(name, kind, middle, unit) | {"quartiles": [low, high]})
    scratch = {number: pair.scratch for number, pair in enumerate(pairs)}
    for name, losses in (
        ("rank correlation", [pair.inherited for pair in pairs]),
        ("rank correlation of twice the tokens", [pair.longer for pair in pairs]),
    ):
        rho = rank_correlation(dict(enumerate(losses)), scratch)
        if rho is not None:  # of two pairs there is none
            rows.append(_row(name, kind, rho, "Spearman"))
    return rows


def _row(name: str, kind: str, value: float, unit: str) -> dict[str, Any]:
    return {"name": name, "backend": kind, "value": value, "unit": unit, "baseline": None, "ratio": None}
