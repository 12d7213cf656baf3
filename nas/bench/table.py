"""A table of recorded trainings: every configuration of a small `lm` space, with its loss at every rung.

The table answers in microseconds what training answers in minutes, so that samplers and halving can be judged over
many seeds. Recording goes through the search's own engine and can be interrupted; the table is complete, so a replay
never interpolates.
"""

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from hypernas import pareto
from hypernas.config.plan import Plan, make_plan
from hypernas.config.study_config import StudyConfig
from hypernas.data.tasks import TASKS
from hypernas.engines.devices import on_what
from hypernas.errors import UserError
from hypernas.records import Recipe, State, StudyRow
from hypernas.search_spaces.base import FixedTrial, Suggest
from hypernas.show.views import make_view
from hypernas.store import Reader, Store
from hypernas.strategy.proposals import config_hash
from hypernas.study.driver import run
from hypernas.study.search import check_resumed, executor_of, open_search, prepare, ran_on
from hypernas.training.step import training_flops

TABLE = Path(__file__).parent / "tables" / "lm.json"
STUDY = "table"
# Depth, width, both shapes of feed-forward net, streams and gates, each at four learning rates around the best: 192
# configurations, over a factor of 5 in FLOPs.
GRID = {
    "depth": "2..3",
    "d_model": "32,48,64",
    "attention.ratio": "1",
    "ffn.ratio": f"{8 / 3},0.5",
    "ffn.sub_mlps": "4",
    "streams.n": "1,2",
    "gates.layers": "all",
    "gates.placement": "none,ffn",
    "gates.rate": "0.5",
    "optim.lr": "0.001,0.003,0.009,0.027",
    "context": "64",
    "train.tokens": "65536",
    "train.batch_tokens": "512",
}


class _Names:
    """Notes every parameter it is asked for, with its choices, and answers with the first."""

    def __init__(self) -> None:
        self.choices: dict[str, tuple[Any, ...]] = {}

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        self.choices[name] = tuple(choices)
        return choices[0]

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        return int(self.suggest_categorical(name, range(low, high + 1, step)))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        raise UserError(f"{name} is searched from {low:g} to {high:g}: a table needs values that can be listed")


def configurations(plan: Plan) -> list[dict[str, Any]]:
    """The parameters of every point of a space whose parameters can all be listed. Raises UserError otherwise."""
    names = _Names()
    plan.suggest(names)
    return [dict(zip(names.choices, values, strict=True)) for values in product(*names.choices.values())]


def record(store: str, out: Path, given: Mapping[str, Any]) -> int:
    """Trains every configuration of the grid that `store` does not hold yet, and writes the table; the exit code.

    `given` are the flags that say on what, by their names in StudyConfig. Interrupted, it returns 1; called again, it
    goes on where it stopped. Raises UserError as a search does.
    """
    with Store(store, create=True) as opened:
        resume = any(study["name"] == STUDY for study in opened.studies())
        flags = ran_on(opened, STUDY) | dict(given)
        config = StudyConfig(study=STUDY, settings=GRID, sampler="random", resume=resume, **flags)
        prepared = prepare(config)
        grid = [prepared.plan.suggest(FixedTrial(params)) for params in configurations(prepared.plan)]
        prepared = replace(prepared, plan=replace(prepared.plan, trials=len(grid)))
        with closing(executor_of(config)) as executor:
            config = replace(config, gpus_per_trial=executor.gpus)
            check_resumed(opened, config, executor)
            search = open_search(opened, replace(prepared, config=config), enqueued=grid)
            unit = TASKS[prepared.plan.space.task].unit
            with make_view(len(grid), opened.finished(search.row), unit, lambda: opened.front(search.row)) as view:
                view.message(on_what(executor))
                outcome = run(search, executor, view, other_device=config.other_device)
        if outcome.finished < len(grid):
            return 1
        write(out, _table(opened, search.row))
    return 0


def _table(store: Reader, row: StudyRow) -> dict[str, Any]:
    """What is written: how the table was made, the names of its columns, and a row a configuration."""
    curves: dict[int, list[float]] = {}
    for report in store.reports(row):
        curves.setdefault(report.trial, []).append(report.loss)
    trials = store.trials(row, states=(State.COMPLETE, State.FAILED))
    parameters = list(trials[0].params)
    measured = [*row.objectives, "accuracy", "parameters"]
    found = trials[0].provenance
    return {
        "recorded": datetime.now(UTC).date().isoformat(),
        "command": "nas bench search --record",
        "versions": f"python {found['python']}, torch {found['torch']}, hypernas {found['hypernas']}, {found['cpu']}",
        "data": f"{row.data_name} {row.data_hash}",
        "settings": dict(row.settings.settings),
        "reference": [row.reference[name] for name in row.objectives],
        "parameters": parameters,
        "measured": measured,
        "columns": "parameters; loss at each rung; measured at the end, or null where training failed; seconds",
        "rows": [
            [
                [trial.params[name] for name in parameters],
                [round(loss, 6) for loss in curves.get(trial.number, [])],
                None if trial.failure else [round(trial.values[name], 6) for name in measured],
                round((trial.train_seconds or 0.0) + (trial.evaluate_seconds or 0.0), 2),
            ]
            for trial in sorted(trials, key=lambda trial: list(map(str, trial.params.values())))
        ],
    }


def write(out: Path, table: Mapping[str, Any]) -> None:
    """JSON with one line a row, so that a diff of two recordings can be read."""
    head = json.dumps({name: value for name, value in table.items() if name != "rows"}, indent=1)
    rows = ",\n".join(json.dumps(row) for row in table["rows"])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')


# ---- replaying -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recorded:
    """One training: its loss at each rung, what was measured at its end (nothing where it failed), and its compute."""

    arch: Any
    recipe: Recipe
    losses: tuple[float, ...]
    values: Mapping[str, float]
    training_flops: float


@dataclass(frozen=True, slots=True)
class Table:
    """A complete space: every configuration that `plan` can propose, by its hash."""

    plan: Plan
    reference: tuple[float, ...]  # of the hypervolume, by objective, as costs
    recorded: Mapping[str, Recorded]

    def entry(self, trial: Suggest) -> Recorded:
        """The training of the configuration that a trial draws."""
        arch, recipe = self.plan.suggest(trial)
        return self.recorded[config_hash(self.plan.space.arch_hash(arch), recipe)]

    @property
    def mean_flops(self) -> float:
        """Training FLOPs of the mean configuration, trained to the end."""
        return sum(entry.training_flops for entry in self.recorded.values()) / len(self.recorded)

    @property
    def best(self) -> float:
        """The hypervolume of the whole table's front."""
        done = [pareto.costs(self.plan.objectives, e.values) for e in self.recorded.values() if e.values]
        return pareto.hypervolume(done, self.reference)


def load_table(path: Path = TABLE) -> Table:
    """Raises UserError when the file is no table, or was recorded with another space than this version's."""
    try:
        data = json.loads(path.read_text())
        plan = make_plan(StudyConfig(settings=data["settings"]))
        entries = {}
        for answers, losses, measured, _ in data["rows"]:
            arch, recipe = plan.suggest(FixedTrial(dict(zip(data["parameters"], answers, strict=True))))
            values = dict(zip(data["measured"], measured, strict=True)) if measured else {}
            flops = training_flops(plan.space.cost(arch).flops_total, recipe.tokens)
            entries[config_hash(plan.space.arch_hash(arch), recipe)] = Recorded(
                arch, recipe, tuple(losses), values, flops
            )
    except (OSError, json.JSONDecodeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not a table of `nas bench search --record`: {error}") from error
    missing = len(configurations(plan)) - len(entries)
    if missing:
        raise UserError(f"{path} lacks {missing} configurations of its space: record it again")
    return Table(plan, tuple(data["reference"]), entries)
