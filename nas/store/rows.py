"""Turns records into rows, and rows into records."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from sqlalchemy import (
    RowMapping,
)

from hypernas.records import (
    Failure,
    FailureKind,
    Recipe,
    Report,
    State,
    StudyRow,
    Trial,
)
from hypernas.store.statements import TRIALS


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


def trial_of_row(row: RowMapping, values: Mapping[str, float]) -> Trial:
    failure = None
    if row["failure_kind"] is not None:
        failure = Failure(
            FailureKind(row["failure_kind"]), row["failure_message"] or "", row["failure_traceback"] or ""
        )
    return Trial(
        number=row["number"],
        state=State(row["state"]),
        params=row["params"],
        arch=row["arch"],
        arch_hash=row["arch_hash"],
        recipe=Recipe(**row["recipe"]),
        origin=row["origin"],
        sampler_attrs=row["sampler_attrs"],
        token=row["token"],
        attempts=row["attempts"],
        values=values,
        parameters=row["parameters"],
        driver=row["driver_id"],
        worker=row["worker"],
        created=row["created"],
        started=row["started"],
        finished=row["finished"],
        train_seconds=row["train_seconds"],
        evaluate_seconds=row["evaluate_seconds"],
        provenance=row["provenance"],
        diagnostics=row["diagnostics"],
        failure=failure,
        seq=row["seq"],
    )
