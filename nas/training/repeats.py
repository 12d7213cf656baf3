"""A trial of several seeds (`--repeats`): its values are their means, and what each seed gave stands beside them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev

from hypernas.records import Result, Trial

BY_SEED = "by_seed"  # among a trial's diagnostics: {"seed": [0, 1], "bits_per_byte": [2.31, 2.33], ...}
SUMMED = "training_flops"  # what the trial took, not what it scored


def average_results(results: Sequence[Result], seeds: Sequence[int]) -> Result:
    """The result of a trial: means over its seeds, times summed; model and provenance are the first seed's."""
    first = results[0]
    by_seed = {name: [result.values[name] for result in results] for name in first.values}
    means = {name: sum(values) if name == SUMMED else fmean(values) for name, values in by_seed.items()}
    return replace(
        first,
        values=means,
        train_seconds=sum(result.train_seconds for result in results),
        evaluate_seconds=sum(result.evaluate_seconds for result in results),
        diagnostics={**first.diagnostics, BY_SEED: {"seed": list(seeds), **by_seed}},
    )


def seeds(trial: Trial) -> list[int]:
    """The seeds that a trial was trained with."""
    return list(trial.diagnostics.get(BY_SEED, {}).get("seed", [trial.recipe.seed]))


def spread(trial: Trial, names: Iterable[str]) -> dict[str, float]:
    """`deviations` of a trial."""
    return deviations(trial.diagnostics.get(BY_SEED, {}), names)


def deviations(by_seed: Mapping[str, Sequence[float]], names: Iterable[str]) -> dict[str, float]:
    """The standard deviation over the seeds of those values that differ between them."""
    return {name: stdev(by_seed[name]) for name in names if len(set(by_seed.get(name, ()))) > 1}


def of_first_seed(trial: Trial) -> Trial:
    """The trial with the values of its first seed, whose weights are kept."""
    by_seed = dict(trial.diagnostics.get(BY_SEED, {}))
    return replace(trial, values={name: by_seed.get(name, [value])[0] for name, value in trial.values.items()})
