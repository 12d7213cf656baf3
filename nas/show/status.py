"""How a study stands: its spread, its rank correlations, its workers' use, in one verdict."""

import shlex
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

from hypernas import pareto
from hypernas.records import FINISHED, RUNGS, Report, State, StudyRow, Trial, is_lost, name_trials
from hypernas.store import Reader
from hypernas.strategy.halving import is_exempt, rank_correlation
from hypernas.training.repeats import spread


def status_of(store: Reader, study: StudyRow) -> dict[str, Any]:
    """`nas status --json`. Utilisation is (training + evaluation) / (workers x time) from first to last dispatch."""
    trials = store.trials(study)
    finished = [trial for trial in trials if trial.state in FINISHED]
    live = store.live_drivers(study)
    span = _span_seconds(trials)
    rate = 3600 * len(finished) / span if span and finished else None
    left = study.settings.trials - len(finished)
    history = store.hypervolumes(study)
    between_seeds = spread_of_front(study, store.front(study))
    missing = [trial.number for trial in trials if trial.origin == "baseline" and is_missing(trial)]
    return {
        "study": study.name,
        "states": store.states(study),
        "failures": dict(Counter(str(trial.failure.kind) for trial in finished if trial.failure)),
        "workers": sum(live.values()),
        "utilisation": utilisation(trials),
        "trials_per_hour": rate,
        "eta_seconds": 3600 * left / rate if rate and left > 0 and live else None,
        "hypervolume": history[-1][2] if history else 0.0,
        # Optuna's steps are no rungs: none of them is the end.
        "rank_correlation": {} if study.settings.imported else rank_correlations(trials, store.reports(study)),
        **({"spread": between_seeds} if between_seeds else {}),
        **({"baselines_missing": missing} if missing else {}),
    }


def is_missing(trial: Trial) -> bool:
    """Whether the trial has yet to say anything of its architecture."""
    return trial.state not in FINISHED or is_lost(trial)


def missing_said(store: Reader, study: StudyRow) -> str:
    """Which baselines are missing, and how to get them; nothing where none is."""
    missing = [trial for trial in store.trials(study, origin="baseline") if is_missing(trial)]
    if not missing:
        return ""
    live = store.live_drivers(study)
    again = shlex.join(["nas", "search", "--study", study.name, "--store", store.to_type, "--resume"])
    names = name_trials([trial.number for trial in missing])
    why = "lost its workers" if any(map(is_lost, missing)) else "not trained yet"
    how = "a search is at work on it" if live and not any(map(is_lost, missing)) else f"{again} trains what is missing"
    return f"no comparison while a baseline is missing ({names}: {why}); {how}"


def spread_of_front(study: StudyRow, front: Sequence[Trial]) -> dict[str, float]:
    """By objective, the median over the front of the standard deviation between seeds; empty without --repeats."""
    spreads = [spread(trial, study.objectives) for trial in front]
    found = {name: [each[name] for each in spreads if name in each] for name in study.objectives}
    return {name: median(values) for name, values in found.items() if values}


def rank_correlations(trials: Sequence[Trial], reports: Sequence[Report]) -> dict[str, float]:
    """Spearman's, by rung: how well losses there foretell losses at the end, from trials that halving leaves alone.

    Of the others only the better ones reach the end, which would make any rung look worse than it is.
    """
    done = {trial.number for trial in trials if trial.state == State.COMPLETE and is_exempt(trial.number)}
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
        starts = sorted(start for _, start, _ in session)
        ends = sorted(max(start, end) for _, start, end in session)
        last = starts[-1]
        workers = max(bisect_right(starts, moment) - bisect_right(ends, moment) for moment in starts)
        available += workers * (last - min(starts))
        for trial, start, end in session:
            worked = min((trial.train_seconds or 0.0) + (trial.evaluate_seconds or 0.0), end - start)
            busy += worked * (min(end, last) - start) / (end - start) if end > start else 0.0
    return busy / available if available else None


def verdict(store: Reader, study: StudyRow) -> str:
    """Whether a found architecture beats the best baseline at equal or fewer FLOPs, and by how much.

    While a baseline is missing nothing is compared: which, and how to get it, is said instead.
    """
    if study.settings.imported:
        return "imported from Optuna: there is no baseline to compare with"
    if missing := missing_said(store, study):
        return missing
    tried = store.trials(study, origin="baseline")
    loss = pareto.quality(study.objectives)
    if any(name.startswith("flops") for name in study.objectives):  # then whatever beats a baseline stands on the front
        baselines = [trial for trial in tried if trial.state == State.COMPLETE]
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
    failed = [trial.number for trial in tried if trial.state == State.FAILED]
    without = f"; {name_trials(failed)} failed" if failed else ""
    name = f"the best baseline (trial {best.number}: {loss} {best.values[loss]:.4f}{without})"
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
    for number, variants in study.settings.variants.items():
        points = [pareto.costs(study.objectives, v) for v in variants if all(name in v for name in study.objectives)]
        beyond = sum(not any(pareto.dominates(other, point) for other in reached) for point in points)
        lines.append(f"trial {number} in blocks: {beyond} of {len(points)} variants are beyond the front")
    return lines
