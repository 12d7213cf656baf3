"""Records of the store as tidy pandas DataFrames: what every figure, page and CSV is made of. No drawing here.

A row of `trial_frame` is a trial. While a trial is not COMPLETE its loss is that of its last report, a measurement
at a rung and not a result: `on_front` is true for COMPLETE trials alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd

from nas import pareto
from nas.progress import describe_arch
from nas.records import Report, State, Trial

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
}


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
        "learning_rate": trial.recipe.learning_rate,
        "parameters": trial.parameters,
        "rung": last.rung if last else None,
        "tokens": last.tokens if last else None,
        "training_flops": trial.values.get("training_flops", last.training_flops if last else None),
        "train_seconds": trial.train_seconds,
        "evaluate_seconds": trial.evaluate_seconds,
        "started": trial.started,
        "finished": trial.finished,
        "worker": trial.worker or "",
        "failure": str(trial.failure.kind) if trial.failure else "",
        "message": trial.failure.message if trial.failure else "",
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
    kept = frame[~frame["trial"].isin(fresh["trial"])]
    out = pd.concat([kept, fresh]).sort_values("trial", ignore_index=True) if len(kept) else fresh
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
    """The rows of the COMPLETE trials that no other COMPLETE trial dominates in `objectives`, best first one first."""
    complete = frame[(frame["state"] == State.COMPLETE) & np.isfinite(frame[list(objectives)]).all(axis=1)]
    points = [
        tuple(pareto.cost(name, value) for name, value in zip(objectives, row, strict=True))
        for row in complete[list(objectives)].itertuples(index=False)
    ]
    return complete.index[pareto.front(points)]


def front_frame(frame: pd.DataFrame, objectives: Sequence[str], until: datetime | None = None) -> pd.DataFrame:
    """The front as rows of `frame`, best first objective first; as it stood at the moment `until`, if given."""
    past = frame if until is None else frame[frame["finished"] <= pd.Timestamp(until)]
    return past.loc[pareto_rows(past, objectives)].reset_index(drop=True)


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
    out["seconds"] = (out["finished"] - frame["started"].min()).dt.total_seconds()
    ended = frame[frame["finished"].notna()].sort_values("finished")
    spent = np.concatenate([[0.0], ended["training_flops"].fillna(0.0).cumsum().to_numpy()])
    out["training_flops"] = spent[np.searchsorted(ended["finished"].to_numpy(), out["finished"].to_numpy(), "right")]
    return out.drop(columns="finished")


def choice_frame(params: Mapping[int, Mapping[str, Any]]) -> pd.DataFrame:
    """What the sampler chose, by trial number: a row a trial, `trial` and one column for each searched parameter."""
    names = dict.fromkeys(name for chosen in params.values() for name in chosen)
    columns: dict[str, Any] = {"trial": pd.Series(list(params), dtype="int64")}
    return pd.DataFrame(columns | {name: [chosen.get(name) for chosen in params.values()] for name in names})


def space_frame(frame: pd.DataFrame, choices: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The COMPLETE trials that the sampler may learn from, `choice_frame` joined to `frame`, and the choices' names.

    A choice that every trial made alike is left out, and so is a trial without choices (a baseline outside the search).
    """
    varied = [name for name in choices if name != "trial" and choices[name].nunique() > 1]
    taken = choices[["trial", *varied]].dropna()
    columns = ["trial", *(name for name in frame if name != "trial" and name not in varied)]
    return frame.loc[frame["state"] == State.COMPLETE, columns].merge(taken, on="trial"), varied


def importance_frame(frame: pd.DataFrame, parameters: Sequence[str], objective: str) -> pd.DataFrame:
    """How much of the objective's variance each choice explains by itself, the most important first.

    Columns: choice and share, the omega squared of a one-way analysis of variance over the choice's values: corrected
    for the groups that chance alone would set apart, at least 0. Costs such as FLOPs count by their logarithm.
    """
    values = np.array([pareto.cost(objective, value) for value in frame[objective]])
    shares = {}
    for name in parameters:
        groups = pd.Series(values).groupby(frame[name].to_numpy())
        count, kinds = len(values), groups.ngroups
        total = float(((values - values.mean()) ** 2).sum()) if count else 0.0
        if not total or kinds < 2 or count <= kinds:
            continue
        between = float((groups.size() * (groups.mean() - values.mean()) ** 2).sum())
        within = (total - between) / (count - kinds)
        shares[name] = max(0.0, (between - (kinds - 1) * within) / (total + within))
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return pd.DataFrame(
        {"choice": [name for name, _ in ordered], "share": pd.Series([share for _, share in ordered], dtype="float64")}
    )


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
