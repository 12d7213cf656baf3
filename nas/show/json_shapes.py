"""What the commands print about studies and architectures: the JSON shapes scripts depend on, and their tables."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from hypernas.config.keys import COUNTED, recipe_keys
from hypernas.records import Report, StudyRow, Trial
from hypernas.search_spaces.base import Space, arch_to_json
from hypernas.show.words import chosen_name
from hypernas.training.repeats import seeds, spread


def training_json(study: StudyRow, trial: Trial) -> dict[str, Any]:
    """The trial's recipe under the names of `--set`; nothing of a trial of Optuna's, whose recipe is not known."""
    if study.settings.imported:
        return {}
    recipe = trial.recipe
    total, batch = COUNTED[study.settings.task]
    return {**recipe_keys(recipe), total: recipe.tokens, batch: recipe.batch_tokens, "train.seed": recipe.seed}


def front_rows(study: StudyRow, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """`nas front --json`."""
    return [
        {
            "trial": trial.number,
            "arch_hash": trial.arch_hash,
            "values": {name: trial.values[name] for name in study.objectives},
            "arch": dict(trial.arch),
            "parameters": trial.parameters,
            "seeds": seeds(trial),
            "spread": spread(trial, study.objectives),
            "training": training_json(study, trial),
            "baseline": trial.origin == "baseline",
        }
        for trial in trials
    ]


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Front rows as CSV: one column a value and a key."""
    flat = [
        {"trial": row["trial"], "arch_hash": row["arch_hash"], **row["values"], "parameters": row["parameters"]}
        | {f"spread.{name}": value for name, value in row["spread"].items()}
        | _choices(row)
        | dict(row["training"])
        for row in rows
    ]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns or ["trial"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _choices(row: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture's keys; one that is also a column's name has an ending: Optuna's may have any."""
    taken = {"trial", "arch_hash", "parameters", *row["values"]}
    return {chosen_name(name, taken): value for name, value in row["arch"].items()}


def show_json(study: StudyRow, trial: Trial, reports: Sequence[Report]) -> dict[str, Any]:
    """`nas show --json`, but for the cost."""
    from hypernas.data.tasks import TASKS  # it imports torch, which the other commands do without

    return {
        "study": study.name,
        "trial": trial.number,
        "state": str(trial.state),
        "origin": trial.origin,
        "arch": dict(trial.arch),
        "arch_hash": trial.arch_hash,
        "training": training_json(study, trial),
        "values": dict(trial.values),
        "parameters": trial.parameters,
        "unit": TASKS[study.settings.task].unit,
        "curve": [{name: value for name, value in asdict(report).items() if name != "trial"} for report in reports],
        "attempts": trial.attempts,
        "created": trial.created.isoformat(),
        "started": trial.started.isoformat() if trial.started else None,
        "finished": trial.finished.isoformat() if trial.finished else None,
        "train_seconds": trial.train_seconds,
        "evaluate_seconds": trial.evaluate_seconds,
        "provenance": dict(trial.provenance),
        "diagnostics": dict(trial.diagnostics),
        "failure": asdict(trial.failure) if trial.failure else None,
    }


def cost_json(space: Space, arch: Any) -> dict[str, Any]:
    """`nas describe --json`."""
    cost = space.cost(arch)
    unit = "token" if space.task == "text" else "image"
    return {
        "arch": arch_to_json(arch),
        "parameters": {**cost.parameters, "total": cost.parameters_total},
        f"flops_per_{unit}": {
            **cost.flops,
            "matmul": cost.matmul,
            "elementwise": cost.elementwise,
            "total": cost.flops_total,
        },
        f"activation_bytes_per_{unit}": cost.activation_bytes,
    }
