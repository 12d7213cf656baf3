"""Records of the store as tidy pandas DataFrames: what every figure, page and CSV is made of. No drawing here.

A row of `trial_frame` is a trial. While a trial is not COMPLETE its loss is that of its last report, a measurement
at a rung and not a result: `on_front` is true for COMPLETE trials alone, of those for the feasible.

A trial is infeasible when a constraint of its search is violated: the sampler's attribute `constraints:NAME`, as Optuna
writes it, is above 0. A trial without such attributes is feasible.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd

from hypernas import pareto
from hypernas.records import Report, State, StudyRow, Trial, violation
from hypernas.show.words import chosen_name, describe_arch
from hypernas.training.repeats import BY_SEED

LOSSES = ("bits_per_byte", "loss")
COSTS = ("flops_per_token", "flops_per_image")
TRAINING = 3  # training FLOPs over forward FLOPs: the backward pass counts twice the forward

COLUMNS = {
    "trial": "int64",
    "state": "str",
    "origin": "str",
    "architecture": "str",
    "arch_hash": "str",
    "learning_rate": "float64",
    "recipe": "str",
    "seed": "float64",
    "violation": "float64",
    "parameters": "float64",
    "rung": "float64",
    "tokens": "float64",
    "training_flops": "float64",
    "train_seconds": "float64",
    "evaluate_seconds": "float64",
    "started": "datetime64[us, UTC]",
    "finished": "datetime64[us, UTC]",
    "worker": "str",
    "failure": "str",
    "message": "str",
    "by_seed": "object",  # what each seed of a trial of several gave (nas/training/repeats.py)
}


def loss_name(study: StudyRow) -> str:
    """What reports measure at each rung: one of the objectives, else `loss`; what Optuna was told is not known here."""
    if study.settings.imported:
        return "reported value"
    return next((name for name in study.objectives if name in LOSSES), "loss")


def trial_row(trial: Trial, last: Report | None, objectives: Sequence[str]) -> dict[str, Any]:
    """One trial as a flat dictionary: its measured values by name, and COLUMNS."""
    measured: dict[str, Any] = dict(trial.values)
    if last is not None and trial.state != State.COMPLETE:
        measured |= dict.fromkeys((name for name in LOSSES if name in objectives), last.loss)
        forward = last.training_flops / (TRAINING * last.tokens) if last.tokens else None
        measured |= dict.fromkeys((name for name in COSTS if name in objectives), forward)
    return measured | {
        "trial": trial.number,
        "state": str(trial.state),
        "origin": trial.origin,
        "architecture": describe_arch(dict(trial.arch)),
        "arch_hash": trial.arch_hash,
        "learning_rate": trial.recipe.learning_rate or None,  # Optuna's are not known
        "recipe": repr(replace(trial.recipe, seed=0)),
        "seed": trial.recipe.seed,
        "violation": violation(trial),
        "parameters": trial.parameters,
        "rung": last.rung if last else None,
        "tokens": last.tokens if last else None,
        "training_flops": trial.values.get("training_flops", (last.training_flops or None) if last else None),
        "train_seconds": trial.train_seconds,
        "evaluate_seconds": trial.evaluate_seconds,
        "started": trial.started,
        "finished": trial.finished,
        "worker": trial.worker or "",
        "failure": str(trial.failure.kind) if trial.failure else "",
        "message": trial.failure.message if trial.failure else "",
        "by_seed": trial.diagnostics.get(BY_SEED),
    }


def frame_of_rows(rows: Sequence[Mapping[str, Any]], objectives: Sequence[str]) -> pd.DataFrame:
    """Rows of `trial_row` as a DataFrame with every column of COLUMNS, every objective, and `on_front`."""
    names = dict.fromkeys([*COLUMNS, *objectives, *(name for row in rows for name in row)])
    frame = pd.DataFrame({name: _column([row.get(name) for row in rows], COLUMNS.get(name)) for name in names})
    frame["on_front"] = False
    frame.loc[pareto_rows(frame, objectives), "on_front"] = True
    return frame


def merge(frame: pd.DataFrame, rows: Sequence[Mapping[str, Any]], objectives: Sequence[str]) -> pd.DataFrame:
    """`frame` with the trials of `rows` added or replaced, in order of number.

    A COMPLETE trial never changes, so the new front is among the old one and the new rows.
    """
    fresh = frame_of_rows(rows, objectives)
    known = frame["trial"].isin(fresh["trial"])
    kept = frame[~known] if known.any() else frame
    out = pd.concat([kept, fresh], ignore_index=True) if len(kept) else fresh
    if not out["trial"].is_monotonic_increasing:
        out = out.sort_values("trial", ignore_index=True)
    rivals = out[out["on_front"]]
    out["on_front"] = False
    out.loc[pareto_rows(rivals, objectives), "on_front"] = True
    return out


def _column(values: list[Any], kind: str | None) -> pd.Series:
    if kind is not None and kind.startswith("datetime"):
        return pd.to_datetime(pd.Series(values, dtype="object"), utc=True).astype(kind)
    return pd.Series(values, dtype=kind or "float64")


def trial_frame(trials: Sequence[Trial], reports: Iterable[Report], objectives: Sequence[str]) -> pd.DataFrame:
    """Every trial, a row each, in order of number: COLUMNS, a column for each measured value, and `on_front`."""
    last: dict[int, Report] = {}
    for report in reports:
        if report.trial not in last or report.rung >= last[report.trial].rung:
            last[report.trial] = report
    rows = [trial_row(trial, last.get(trial.number), objectives) for trial in trials]
    return frame_of_rows(rows, objectives)


def pareto_rows(frame: pd.DataFrame, objectives: Sequence[str]) -> pd.Index:
    """The rows of the feasible COMPLETE trials that no other such trial dominates in `objectives`, best first."""
    finite = np.isfinite(frame[list(objectives)]).all(axis=1)
    complete = frame[(frame["state"] == State.COMPLETE) & ~(frame["violation"] > 0) & finite]
    points = pareto.cost_table(objectives, complete[list(objectives)].to_numpy(float))
    return complete.index[pareto.front(points)]


def front_frame(frame: pd.DataFrame, objectives: Sequence[str], until: datetime | None = None) -> pd.DataFrame:
    """The front as rows of `frame`, best first objective first; as it stood at the moment `until`, if given."""
    past = frame if until is None else frame[frame["finished"] <= pd.Timestamp(until)]
    return past.loc[pareto_rows(past, objectives)].reset_index(drop=True)


def seed_frame(front: pd.DataFrame, frame: pd.DataFrame, y: str) -> pd.DataFrame:
    """How far seeds spread the quality `y` of the front's configurations: a row for each that was trained repeatedly.

    Columns: trial (the front's), seeds, low and high (of `y`: over the trial's own seeds or, where it has one, over
    every COMPLETE trial of the same architecture and recipe but for the seed).
    """
    repeated = front[front["by_seed"].notna()]
    if len(repeated):
        pairs = zip(repeated["trial"], repeated["by_seed"], strict=True)
        rows = [(trial, len(found["seed"]), min(found[y]), max(found[y])) for trial, found in pairs if y in found]
        return pd.DataFrame(rows, columns=["trial", "seeds", "low", "high"])
    key = ["arch_hash", "recipe"]
    rivals = frame.loc[frame["arch_hash"].isin(front["arch_hash"]), ["state", *key, "seed", y]]
    rivals = rivals[rivals["state"] == State.COMPLETE]
    if rivals["arch_hash"].is_unique:  # the usual case, and grouping takes 10 ms
        return pd.DataFrame({"trial": [], "seeds": [], "low": [], "high": []})
    groups = rivals.groupby(key)[["seed", y]].agg(seeds=("seed", "nunique"), low=(y, "min"), high=(y, "max"))
    found = front[["trial", *key]].merge(groups.reset_index(), on=key)
    return found.loc[found["seeds"] > 1, ["trial", "seeds", "low", "high"]].reset_index(drop=True)


def curve_frame(reports: Sequence[Report]) -> pd.DataFrame:
    """Every report, a row each: trial, rung, step, tokens, training_flops, loss, seconds."""
    names = ("trial", "rung", "step", "tokens", "training_flops", "loss", "seconds")
    floats = ("training_flops", "loss", "seconds")
    return pd.DataFrame(
        {
            name: pd.Series([getattr(r, name) for r in reports], dtype="float64" if name in floats else "int64")
            for name in names
        }
    )


def hypervolume_frame(history: Sequence[tuple[int, datetime, float]], frame: pd.DataFrame) -> pd.DataFrame:
    """The hypervolume after each COMPLETE trial, in order of finishing.

    Columns: trial, completed (how many trials had, this one included), seconds since the study's first trial started,
    training_flops (of every trial finished by then, failed ones included) and hypervolume.
    """
    out = pd.DataFrame(
        {
            "trial": pd.Series([number for number, _, _ in history], dtype="int64"),
            "finished": _column([moment for _, moment, _ in history], COLUMNS["finished"]),
            "hypervolume": pd.Series([volume for _, _, volume in history], dtype="float64"),
        }
    )
    out.insert(1, "completed", np.arange(1, len(out) + 1))
    return _over_time_and_compute(out, frame)


def selected_hypervolume_frame(
    chosen: pd.DataFrame, frame: pd.DataFrame, objectives: Sequence[str], reference: Mapping[str, float]
) -> pd.DataFrame:
    """`hypervolume_frame` of some trials alone: the volume that the `chosen` of `frame`'s rows reach by themselves.

    `reference` is the study's reference point, as costs.
    """
    able = chosen[chosen["finished"].notna() & np.isfinite(chosen[list(objectives)]).all(axis=1)]
    able = able[(able["state"] == State.COMPLETE) & ~(able["violation"] > 0)].sort_values(["finished", "trial"])
    corner = tuple(reference[name] for name in objectives)
    front: list[tuple[float, ...]] = []
    volume, volumes = 0.0, []
    for point in map(tuple, pareto.cost_table(objectives, able[list(objectives)].to_numpy(float)).tolist()):
        if not any(other == point or pareto.dominates(other, point) for other in front):
            front = [*(other for other in front if not pareto.dominates(point, other)), point]
            volume = pareto.hypervolume(front, corner)
        volumes.append(volume)
    out = able[["trial", "finished"]].reset_index(drop=True)
    out["hypervolume"] = pd.Series(volumes, dtype="float64")
    out.insert(1, "completed", np.arange(1, len(out) + 1))
    return _over_time_and_compute(out, frame)


def _over_time_and_compute(out: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    """Moments of finishing as seconds and training FLOPs since the study's first trial started."""
    out["seconds"] = (out["finished"] - frame["started"].min()).dt.total_seconds()
    ended = frame[frame["finished"].notna()].sort_values("finished")
    spent = np.concatenate([[0.0], ended["training_flops"].fillna(0.0).cumsum().to_numpy()])
    # As integers: numpy takes zoned moments one by one, 60 ms for 10,000.
    ends, moments = ended["finished"].astype("int64"), out["finished"].astype("int64")
    out["training_flops"] = spent[np.searchsorted(ends.to_numpy(), moments.to_numpy(), "right")]
    return out.drop(columns="finished")


def variant_frame(variants: Mapping[str, Sequence[Mapping[str, float]]]) -> pd.DataFrame:
    """A study's `variants`, a row each: trial, kept (the share of the confirmed edges), and a column for each value."""
    rows = [{"trial": int(trial), **point} for trial, points in variants.items() for point in points]
    return pd.DataFrame(rows, columns=list(dict.fromkeys(["trial", "kept", *(name for row in rows for name in row)])))


def choice_frame(params: Mapping[int, Mapping[str, Any]]) -> pd.DataFrame:
    """What the sampler chose, by trial number: a row a trial, `trial` and one column for each searched parameter.

    A parameter that a trial has not is missing there; None as a choice is the text "None".
    """
    names = dict.fromkeys(name for chosen in params.values() for name in chosen)
    columns: dict[str, Any] = {"trial": pd.Series(list(params), dtype="int64")}
    for name in names:
        found = ["None" if chosen.get(name, "") is None else chosen.get(name) for chosen in params.values()]
        columns[chosen_name(name, columns)] = found
    return pd.DataFrame(columns)


def space_frame(frame: pd.DataFrame, choices: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The COMPLETE trials that the sampler may learn from, `choice_frame` joined to `frame`, and the choices' names.

    A choice that every trial made alike is left out, and so is a trial without choices (a baseline outside the search).
    A choice that a trial did not make (Optuna's may depend on each other) is missing there.
    """
    names = {name: chosen_name(name, frame) for name in choices if name != "trial" and choices[name].nunique() > 1}
    taken = choices[["trial", *names]].rename(columns=names).dropna(how="all", subset=list(names.values()))
    return frame[frame["state"] == State.COMPLETE].merge(taken, on="trial"), list(names.values())


def importance_frame(frame: pd.DataFrame, parameters: Sequence[str], objective: str) -> pd.DataFrame:
    """How much of the objective's variance each choice explains by itself, the most important first.

    Columns: choice and share, the omega squared of a one-way analysis of variance over the choice's values: corrected
    for the groups that chance alone would set apart, at least 0. Costs such as FLOPs count by their logarithm.
    """
    values = pareto.cost_table([objective], frame[[objective]].to_numpy(float))[:, 0]
    shares = {}
    every = values
    for name in parameters:
        made = frame[name].notna().to_numpy()
        values = every[made]
        groups = pd.Series(values).groupby(frame.loc[made, name].astype(object).to_numpy())
        count, kinds = len(values), groups.ngroups
        with np.errstate(over="ignore"):  # Optuna's objectives have any scale
            total = float(((values - values.mean()) ** 2).sum()) if count else 0.0
        if not 0 < total < np.inf or kinds < 2 or count <= kinds:
            continue
        between = float((groups.size() * (groups.mean() - values.mean()) ** 2).sum())
        within = (total - between) / (count - kinds)
        shares[name] = max(0.0, (between - (kinds - 1) * within) / (total + within))
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return pd.DataFrame(
        {"choice": [name for name, _ in ordered], "share": pd.Series([share for _, share in ordered], dtype="float64")}
    )


def pair_frame(frame: pd.DataFrame, across: str, down: str, objective: str) -> pd.DataFrame:
    """Each pair of values of two choices that was tried. `frame` is space_frame's.

    Columns: across and down (the values), trials, on_front (how many of them), best (of the objective) and trial (the
    best one's number).
    """
    costs = pareto.cost_table([objective], frame[[objective]].to_numpy(float))[:, 0]
    ranked = frame.iloc[np.argsort(costs, kind="stable")]
    rows = [
        (pair[0], pair[1], len(group), int(group["on_front"].sum()), group[objective].iloc[0], group["trial"].iloc[0])
        for pair, group in ranked.groupby([across, down], sort=False)
    ]
    return pd.DataFrame(rows, columns=["across", "down", "trials", "on_front", "best", "trial"])


def gain_frame(mean_mixing: Sequence[Sequence[Sequence[float]]]) -> pd.DataFrame:
    """The gain of the product of the first so many mixing matrices, (n, n) each: a row a connection.

    Columns: connection (from 1), forward (the largest absolute row sum) and backward (the largest absolute column sum).
    Source: mHC, 2512.24880, section 3.
    """
    rows, product = [], None
    for index, matrix in enumerate(mean_mixing):
        product = np.array(matrix) if product is None else np.array(matrix) @ product
        rows.append((index + 1, abs(product.sum(1)).max(), abs(product.sum(0)).max()))
    return pd.DataFrame(rows, columns=["connection", "forward", "backward"])


def rank_frame(curves: pd.DataFrame, complete: Iterable[int]) -> pd.DataFrame:
    """How well a rung foretells the end: Spearman's correlation of the loss there with the loss at the last rung.

    Columns: rung, trials, correlation. Over the `complete` trials; a rung that fewer than three share is left out.
    """
    done = curves[curves["trial"].isin(list(complete))]
    table = done.pivot(index="trial", columns="rung", values="loss")
    rows = []
    for rung in table.columns[:-1]:
        pair = table[[rung, table.columns[-1]]].dropna().rank()
        if len(pair) >= 3 and pair.nunique().min() > 1:
            rows.append((int(rung), len(pair), float(pair.corr().iloc[0, 1])))
    return pd.DataFrame(rows, columns=["rung", "trials", "correlation"])


def scale_run_frame(scale: Mapping[str, Any]) -> pd.DataFrame:
    """A row for each training of a ladder: family, parameters, tokens, flops, loss, seed."""
    return pd.DataFrame([run for family in scale["families"] for run in family["runs"]])


def scale_law_frame(scale: Mapping[str, Any]) -> pd.DataFrame:
    """The fitted laws by family: flops, loss with low and high, and whether the family was `measured` there."""
    laws = []
    for family in scale["families"]:
        low, high = family["measured_flops"]
        law = pd.DataFrame(family["curve"])
        laws.append(law.assign(family=family["name"], measured=law["flops"].between(low * 0.999, high * 1.001)))
    return pd.concat(laws, ignore_index=True)


def scale_gain_frame(scale: Mapping[str, Any]) -> pd.DataFrame:
    """Compute-equivalent gains: candidate, flops, loss, ceg with low and high, measured."""
    points = [
        {"candidate": entry["candidate"], **point} for entry in scale["gains"] for point in entry.get("points", ())
    ]
    return pd.DataFrame(points, columns=["candidate", "flops", "loss", "ceg", "low", "high", "measured"])


def pace(frame: pd.DataFrame, asked: int) -> tuple[float | None, float | None]:
    """(finished trials an hour, seconds until `asked` trials are finished at that rate), None while unknown."""
    done = frame[frame["finished"].notna()]
    if done.empty:
        return None, None
    span = (done["finished"].max() - frame["started"].min()).total_seconds()
    if not span:
        return None, None
    rate = 3600 * len(done) / span
    return rate, 3600 * max(0, asked - len(done)) / rate


def state_counts(frame: pd.DataFrame) -> dict[str, int]:
    """How many trials are in each state."""
    counts = frame["state"].value_counts()
    return {str(state): int(counts.get(str(state), 0)) for state in State}


def failure_counts(frame: pd.DataFrame) -> dict[str, int]:
    """How many trials failed of each cause, the most frequent first."""
    counts = frame.loc[frame["failure"] != "", "failure"].value_counts()
    return {str(kind): int(count) for kind, count in counts.items()}
