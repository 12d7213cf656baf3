"""What the commands print about studies and architectures: the JSON shapes scripts depend on, and their tables."""

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from rich.table import Table

from hypernas import pareto
from hypernas.config import COUNTED, LIMITS, picked, training_keys
from hypernas.halving import exempt, rank_correlation
from hypernas.records import FINISHED, RUNGS, Report, State, StudyRow, Trial
from hypernas.search_spaces.base import Choices, Range, Space, arch_to_json
from hypernas.store import Store
from hypernas.training.repeats import seeds, spread


def training_json(study: StudyRow, trial: Trial) -> dict[str, Any]:
    """The trial's recipe under the names of `--set`."""
    recipe = trial.recipe
    total, batch = COUNTED[study.settings["task"]]
    return {**picked(recipe), total: recipe.tokens, batch: recipe.batch_tokens, "train.seed": recipe.seed}


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
        | dict(row["arch"])
        | dict(row["training"])
        for row in rows
    ]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns or ["trial"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def status_of(store: Store, study: StudyRow) -> dict[str, Any]:
    """`nas status --json`. Utilisation is (training + evaluation) / (workers x time) from first to last dispatch."""
    trials = store.trials(study)
    finished = [trial for trial in trials if trial.state in FINISHED]
    live = store.live_drivers(study)
    span = _span_seconds(trials)
    rate = 3600 * len(finished) / span if span and finished else None
    left = int(study.settings["trials"]) - len(finished)
    history = store.hypervolumes(study)
    between_seeds = spread_of_front(study, store.front(study))
    return {
        "study": study.name,
        "states": store.states(study),
        "failures": dict(Counter(str(trial.failure.kind) for trial in finished if trial.failure)),
        "workers": sum(live.values()),
        "utilisation": utilisation(trials),
        "trials_per_hour": rate,
        "eta_seconds": 3600 * left / rate if rate and left > 0 and live else None,
        "hypervolume": history[-1][2] if history else 0.0,
        "rank_correlation": rank_correlations(trials, store.reports(study)),
        **({"spread": between_seeds} if between_seeds else {}),
    }


def spread_of_front(study: StudyRow, front: Sequence[Trial]) -> dict[str, float]:
    """By objective, the median over the front of the standard deviation between seeds; empty without --repeats."""
    spreads = [spread(trial, study.objectives) for trial in front]
    found = {name: [each[name] for each in spreads if name in each] for name in study.objectives}
    return {name: median(values) for name, values in found.items() if values}


def rank_correlations(trials: Sequence[Trial], reports: Sequence[Report]) -> dict[str, float]:
    """Spearman's, by rung: how well losses there foretell losses at the end, from trials that halving leaves alone.

    Of the others only the better ones reach the end, which would make any rung look worse than it is.
    """
    done = {trial.number for trial in trials if trial.state == State.COMPLETE and exempt(trial.number)}
    losses: dict[int, dict[int, float]] = {}
    for report in reports:
        if report.trial in done:
            losses.setdefault(report.rung, {})[report.trial] = report.loss
    final = losses.pop(len(RUNGS) - 1, {})
    found = {str(rung): rank_correlation(early, final) for rung, early in sorted(losses.items())}
    return {rung: value for rung, value in found.items() if value is not None}


def _sessions(trials: Sequence[Trial]) -> list[list[tuple[Trial, float, float]]]:
    """Finished trials with their start and end in seconds, by driver: between two drivers nobody works."""
    sessions: dict[int | None, list[tuple[Trial, float, float]]] = {}
    for trial in trials:
        if trial.started and trial.finished:
            entry = (trial, trial.started.timestamp(), trial.finished.timestamp())
            sessions.setdefault(trial.driver, []).append(entry)
    return list(sessions.values())


def _span_seconds(trials: Sequence[Trial]) -> float:
    """Time from the first start to the last end, summed over drivers."""
    return sum(max(end for *_, end in s) - min(start for _, start, _ in s) for s in _sessions(trials))


def utilisation(trials: Sequence[Trial]) -> float | None:
    """The share of the workers' time spent training and evaluating, between a driver's first and last dispatch.

    Work is counted inside that window alone: of a trial that ends after the last dispatch, the part before it. A
    driver had as many workers as trials ran at once.
    """
    busy = available = 0.0
    for session in _sessions(trials):
        starts = [start for _, start, _ in session]
        last = max(starts)
        workers = max(sum(s <= moment < end for _, s, end in session) for moment in starts)
        available += workers * (last - min(starts))
        for trial, start, end in session:
            worked = min((trial.train_seconds or 0.0) + (trial.evaluate_seconds or 0.0), end - start)
            busy += worked * (min(end, last) - start) / (end - start) if end > start else 0.0
    return busy / available if available else None


def verdict(store: Store, study: StudyRow) -> str:
    """Whether a found architecture beats the best baseline at equal or fewer FLOPs, and by how much."""
    loss = pareto.quality(study.objectives)
    if any(name.startswith("flops") for name in study.objectives):  # then whatever beats a baseline stands on the front
        baselines = store.trials(study, states=(State.COMPLETE,), origin="baseline")
        complete = [*baselines, *(trial for trial in store.front(study) if trial.origin != "baseline")]
    else:
        complete = store.trials(study, states=(State.COMPLETE,))
    flops = next((name for trial in complete for name in trial.values if name.startswith("flops")), None)
    baselines = [trial for trial in complete if trial.origin == "baseline"]
    if flops is None or not baselines:
        return "no completed baseline to compare with"
    best = min(baselines, key=lambda trial: pareto.cost(loss, trial.values[loss]))
    rivals = [
        trial
        for trial in complete
        if trial.origin != "baseline"
        and trial.values[flops] <= best.values[flops]
        and pareto.cost(loss, trial.values[loss]) < pareto.cost(loss, best.values[loss])
    ]
    name = f"the best baseline (trial {best.number}: {loss} {best.values[loss]:.4f})"
    if not rivals:
        return f"no found architecture beats {name} at equal or fewer FLOPs"
    won = min(rivals, key=lambda trial: pareto.cost(loss, trial.values[loss]))
    gain = abs(won.values[loss] - best.values[loss])
    share = won.values[flops] / best.values[flops]
    return (
        f"trial {won.number} beats {name} by {gain:.4f} ({100 * gain / abs(best.values[loss]):.2f} %) "
        f"at {100 * share:.1f} % of its FLOPs"
    )


def variants_said(study: StudyRow, front: Sequence[Trial]) -> list[str]:
    """A line for each trial that was taken apart: how many of its variants the front does not dominate."""
    reached = [pareto.costs(study.objectives, trial.values) for trial in front]
    lines = []
    for number, variants in study.variants.items():
        points = [pareto.costs(study.objectives, v) for v in variants if all(name in v for name in study.objectives)]
        beyond = sum(not any(pareto.dominates(other, point) for other in reached) for point in points)
        lines.append(f"trial {number} in blocks: {beyond} of {len(points)} variants are beyond the front")
    return lines


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
        "unit": TASKS[study.settings["task"]].unit,
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


def cost_table(data: Mapping[str, Any]) -> Table:
    """The cost by part, parameters beside FLOPs."""
    unit = next(name for name in data if name.startswith("flops_per_"))
    table = Table(box=None, padding=(0, 1))
    for column in ("part", "parameters", unit.replace("_", " ")):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, flops in data[unit].items():
        parameters = data["parameters"].get(part)
        table.add_row(part, "" if parameters is None else f"{parameters:,}", f"{flops:,}")
    return table


def keys_table(space: Space) -> Table:
    """Every key that `--set` takes: the space's, then the training's, then the limits."""
    table = Table(box=None, padding=(0, 1))
    for column in ("key", "baseline", "searched", "meaning"):
        table.add_column(column)
    for key in [*space.keys.values(), *training_keys(space.task).values(), *LIMITS.values()]:
        domain = key.search
        if isinstance(domain, Choices):
            searched = ", ".join(_short(value) for value in domain.values) if len(domain.values) > 1 else ""
        else:
            assert isinstance(domain, Range)
            searched = f"{domain.low:g}..{domain.high:g}" + (":log" if domain.log else "")
        legal = f" (one of {', '.join(map(str, key.options))})" if key.options else ""
        table.add_row(key.name, _short(key.default), searched, key.help + legal)
    return table


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def bench_table(data: Mapping[str, Any]) -> Table:
    """Rows of `nas bench`: one measurement each, with its ratio to the baseline."""
    table = Table(title=f"{data['device']}; {data['versions']}", title_justify="left", box=None, padding=(0, 1))
    for column in ("name", "backend", "value", "unit", "baseline", "ratio"):
        table.add_column(column, justify="right" if column in ("value", "ratio") else "left")
    for row in data["rows"]:
        table.add_row(
            row["name"],
            row["backend"],
            f"{row['value']:.2f}",
            row["unit"],
            row["baseline"] or "",
            "" if row["ratio"] is None else f"{row['ratio']:.2f}",
        )
    return table
