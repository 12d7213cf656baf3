"""What the runs of a ladder say: laws, gains, interactions, in numbers and words."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from hypernas.errors import UserError
from hypernas.records import StudyRow
from hypernas.scaling.contenders import TOGETHER, Contender
from hypernas.scaling.fit import Fit, fit_laws, fit_surface, gains, growth, interaction, measured_range
from hypernas.scaling.ladder import Climbed
from hypernas.store import Store

BEYOND = (10.0, 100.0, 1000.0)  # times the largest compute, where the laws are asked what they expect


def analyse(climbed: Climbed, climbers: Sequence[Contender], *, seed: int) -> dict[str, Any]:
    """`nas scale --json`: laws, gains over the first contender with whether they were measured, and what failed.

    Raises UserError where there is too little to fit a law to.
    """
    baseline = climbers[0].name
    fit = fit_laws(climbed.runs, seed=seed)
    data: dict[str, Any] = {
        "baseline": baseline,
        "irreducible": asdict(fit.irreducible()),
        "noise": fit.noise,
        "families": [_family_json(fit, climbed, climber) for climber in climbers],
        "gains": [_gains_json(fit, climber, baseline) for climber in climbers[1:]],
        "failed": list(climbed.failed),
        "notes": list(climbed.notes),
    }
    if climbers[-1].name == TOGETHER:
        parts = [climber.name for climber in climbers[1:-1]]
        try:
            at = min(measured_range(fit, name, baseline)[1] for name in (*parts, TOGETHER))
            data["interaction"] = asdict(interaction(fit, baseline, parts, TOGETHER, at))
        except UserError as error:
            data["interaction"] = {"missing": str(error)}
    return data


def _family_json(fit: Fit, climbed: Climbed, climber: Contender) -> dict[str, Any]:
    own = [run for run in climbed.runs if run.family == climber.name]
    law, points = fit.laws[climber.name], fit.frontiers[climber.name]
    first, last = float(points.flops[0]), float(points.flops[-1])
    at = np.append(np.geomspace(first, last, 20), np.geomspace(last, last * BEYOND[-1], 20)[1:])
    low, high = fit.band(climber.name, at)
    try:
        surface: dict[str, Any] = asdict(fit_surface(own))
    except UserError as error:
        surface = {"missing": str(error)}
    return {
        "name": climber.name,
        "trial": climber.trial,
        "law": {"scale": law.scale, "exponent": asdict(fit.exponent(climber.name))},
        "measured_flops": [first, last],
        "curve": {"flops": at.tolist(), "loss": law.loss(at).tolist(), "low": low.tolist(), "high": high.tolist()},
        "surface": surface,
        "learning_rates": {str(size): rate for size, rate in climbed.rates[climber.name].items()},
        "runs": [asdict(run) for run in own],
    }


def _gains_json(fit: Fit, climber: Contender, baseline: str) -> dict[str, Any]:
    head = {"candidate": climber.name, "trial": climber.trial}
    try:
        low, high = measured_range(fit, climber.name, baseline)
    except UserError as error:
        return {**head, "missing": str(error)}
    largest = max(frontier.flops[-1] for frontier in fit.frontiers.values())
    at = [*np.geomspace(low, high, 5).tolist(), *(factor * largest for factor in BEYOND)]
    points = [
        {"flops": g.flops, "loss": g.loss, "ceg": g.gain.value, "low": g.gain.low, "high": g.gain.high,
         "measured": g.measured}
        for g in gains(fit, climber.name, baseline, at)
    ]  # fmt: skip
    return {**head, "growth": asdict(growth(fit, climber.name, baseline)), "points": points}


def keep(store: Store, searched: StudyRow, ladder_study: str, data: Mapping[str, Any]) -> None:
    """Puts the analysis into the ladder's study, and into each trial its gain at the largest compute measured."""
    row = store.study(ladder_study)
    store.update_settings(row, replace(row.settings, scale=dict(data)))
    for entry in data["gains"]:
        if entry["trial"] is not None and "points" in entry and entry["candidate"] != TOGETHER:
            top = [point for point in entry["points"] if point["measured"]][-1]
            name = "ceg_at_scale" if "ceg" in searched.objectives else "ceg"  # an objective stays what it was
            values = {name: top["ceg"], "ceg_low": top["low"], "ceg_high": top["high"], "ceg_flops": top["flops"]}
            store.add_values(searched, entry["trial"], {**values, "ceg_growth": entry["growth"]["value"]})


def describe(data: Mapping[str, Any]) -> list[str]:
    """The analysis in lines of text."""
    E = data["irreducible"]
    lines = [f"loss(C) = E + A C^-alpha, E {_shown(E)}; a run's loss varies by {100 * data['noise']:.2f} %"]
    for family in data["families"]:
        low, high = family["measured_flops"]
        lines.append(
            f"{family['name']}: A {family['law']['scale']:.4g}, alpha {_shown(family['law']['exponent'])}, "
            f"{len(family['runs'])} runs from {low:.2e} to {high:.2e} FLOPs"
        )
        surface = family["surface"]
        if "missing" not in surface:
            lines.append("  loss(N, D) = {irreducible:.3g} + {A:.4g} N^-{a:.3f} + {B:.4g} D^-{b:.3f}".format(**surface))
    for entry in data["gains"]:
        lines += ["", f"compute-equivalent gain of {entry['candidate']} over {data['baseline']}"]
        if "missing" in entry:
            lines.append(f"  not known: {entry['missing']}")
            continue
        for point in entry["points"]:
            lines.append(
                f"  {point['flops']:.2e} FLOPs  {point['ceg']:8.3g}  [{point['low']:.3g}, {point['high']:.3g}]  "
                f"{'measured' if point['measured'] else 'extrapolated'}"
            )
        lines.append(f"  grows as C^{_shown(entry['growth'])}: {growth_verdict(entry['growth'])}")
    if "interaction" in data:
        lines += ["", *_interaction_lines(data["interaction"])]
    lines += [f"failed: {text}" for text in data["failed"]] + [f"note: {text}" for text in data["notes"]]
    return lines


def _interaction_lines(found: Mapping[str, Any]) -> list[str]:
    if "missing" in found:
        return [f"interaction not known: {found['missing']}"]
    kind = "measured" if found["measured"] else "extrapolated"
    lines = [f"one component at a time, at {found['flops']:.2e} FLOPs ({kind})"]
    lines += [f"  {name}: {_shown(value)}" for name, value in found["single"].items()]
    shown = {"their product": "product", "all together": "joint", "together over product": "interaction"}
    return lines + [f"  {label}: {_shown(found[name])}" for label, name in shown.items()]


def growth_verdict(value: Mapping[str, float]) -> str:
    """What the interval of a gain's exponent says."""
    if value["low"] > 0:
        return "the gain grows with scale"
    return "the gain shrinks with scale" if value["high"] < 0 else "whether it grows, these runs do not tell"


def _shown(value: Mapping[str, float]) -> str:
    return f"{value['value']:.3g} [{value['low']:.3g}, {value['high']:.3g}]"
