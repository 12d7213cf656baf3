"""Turns records into rows, and rows into records."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from math import isfinite
from typing import Any

from hypernas.records import (
    Failure,
    FailureKind,
    Recipe,
    Report,
    SpaceSpec,
    State,
    StudyRow,
    StudySettings,
    Trial,
    check_type,
    make_record,
    shorten,
)
from hypernas.store.statements import TRIALS

# What readers take from a trial's notes; of the rest any JSON is shown.
NOTES = {"by_seed": Mapping[str, Sequence[float]], "gate_rates": Sequence[float], "latency_ms": float | None}
TASKS = ("text", "images")


def trial_row(study: StudyRow, trial: Trial, config: str, seq: int) -> dict[str, Any]:
    """A trial's columns; the counterpart of `trial_of_row`."""
    row: dict[str, Any] = {f.name: getattr(trial, f.name) for f in fields(trial) if f.name in TRIALS.c}
    failure = trial.failure
    return row | {
        "study_id": study.id,
        "config_hash": config,
        "seq": seq,
        "driver_id": None,
        "recipe": asdict(trial.recipe),
        "failure_kind": str(failure.kind) if failure else None,
        "failure_message": failure.message if failure else None,
        "failure_traceback": failure.traceback if failure else None,
    }


def report_row(report: Report, trial_id: int) -> dict[str, Any]:
    """A report's columns: it knows its trial by number, the table by row."""
    row = asdict(report) | {"trial_id": trial_id}
    del row["trial"]
    return row


def study_of_row(row: Mapping[str, Any]) -> StudyRow:
    """The study of a row. Raises ValueError naming what hypernas did not write there."""
    if not isinstance(row["objectives"], list) or not row["objectives"]:
        raise ValueError(f"objectives is {row['objectives']!r}")
    settings = StudySettings.of(row["settings"])
    if settings.task not in TASKS:
        raise ValueError(f"task is {settings.task!r}")
    return make_record(
        StudyRow,
        {
            "id": row["id"],
            "name": row["name"],
            "created": row["created"],
            "space": make_record(SpaceSpec, {"name": row["space"], "settings": row["space_settings"]}),
            "objectives": tuple(row["objectives"]),
            "settings": settings,
            "reference": row["reference"],
            "data_name": row["data_name"],
            "data_hash": row["data_hash"],
        },
    )


def trial_of_row(row: Mapping[str, Any], values: Mapping[str, float], objectives: Sequence[str]) -> Trial:
    """The trial of a row, with its values by name. Raises ValueError naming what hypernas did not write there."""
    failure = None
    if row["failure_kind"] is not None:
        failure = Failure(
            FailureKind(row["failure_kind"]), row["failure_message"] or "", row["failure_traceback"] or ""
        )
    columns = {f.name: row[f.name] for f in fields(Trial) if f.name in row}
    check_type("recipe", row["recipe"], Mapping[str, Any])
    if not all(isinstance(value, int | float) and isfinite(value) for value in values.values()):
        raise ValueError(f"values is {shorten(repr(dict(values)))}")
    trial = make_record(
        Trial,
        columns
        | {"state": State(row["state"]), "recipe": make_record(Recipe, row["recipe"]), "driver": row["driver_id"]}
        | {"values": values, "failure": failure},
    )
    for name, kind in NOTES.items():
        if name in trial.diagnostics:
            check_type(name, trial.diagnostics[name], kind)
    if trial.state == State.COMPLETE and (missing := [name for name in objectives if name not in values]):
        raise ValueError(f"trial {trial.number} is COMPLETE without {missing[0]}")
    return trial
