"""The store's tables. Only a driver's `Store` writes; everybody may read, with SQL too.

`front_history` holds one row for each completed trial: the hypervolume after it, and which later (or earlier)
trial dominates it. A trial stands on the front while `dominated_by` is null, so the front of any past moment is
a query, and the view `pareto_front` is today's.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

SCHEMA = "0003"  # the newest migration
READABLE = "0001"  # the oldest schema that is read as it is
SINCE = "since"  # of a column that came later: the schema that added it


class UtcDateTime(TypeDecorator[datetime]):
    """Aware in Python, UTC in the database (SQLite keeps no zone)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.astimezone(UTC) if value is not None else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSON, list[str]: JSON, datetime: UtcDateTime, str: Text}  # noqa: RUF012


class StudyTable(Base):
    __tablename__ = "studies"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(200), unique=True)
    created: Mapped[datetime]
    space: Mapped[str]
    space_settings: Mapped[dict[str, Any]]
    objectives: Mapped[list[str]]
    settings: Mapped[dict[str, Any]]
    reference: Mapped[dict[str, Any]]
    data_name: Mapped[str]
    data_hash: Mapped[str]
    artifacts: Mapped[str]  # read by older versions alone: folders.py derives it
    next_number: Mapped[int] = mapped_column(default=0)
    seq: Mapped[int] = mapped_column(default=0)


class DriverTable(Base):
    __tablename__ = "drivers"

    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id", ondelete="CASCADE"), index=True)
    host: Mapped[str]
    pid: Mapped[int]
    process_started: Mapped[float]  # ticks since boot: a pid alone may be somebody else's by now
    workers: Mapped[int]
    started: Mapped[datetime]
    heartbeat: Mapped[datetime]  # by the database's clock
    stopped: Mapped[datetime | None]
    boot: Mapped[str | None] = mapped_column(info={SINCE: "0003"})  # of the machine, as are the next two
    pid_namespace: Mapped[str | None] = mapped_column(info={SINCE: "0003"})
    uptime: Mapped[float | None] = mapped_column(info={SINCE: "0003"})  # seconds since boot at the last heartbeat


class TrialTable(Base):
    __tablename__ = "trials"

    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id", ondelete="CASCADE"))
    number: Mapped[int]
    state: Mapped[str] = mapped_column(String(16))
    origin: Mapped[str] = mapped_column(String(16))
    params: Mapped[dict[str, Any]]
    sampler_attrs: Mapped[dict[str, Any]]
    arch: Mapped[dict[str, Any]]
    arch_hash: Mapped[str] = mapped_column(String(32))
    config_hash: Mapped[str] = mapped_column(String(32))  # architecture, recipe and seed: never trained twice
    recipe: Mapped[dict[str, Any]]
    token: Mapped[int] = mapped_column(default=1)
    attempts: Mapped[int] = mapped_column(default=1)
    driver_id: Mapped[int | None] = mapped_column(ForeignKey("drivers.id", ondelete="SET NULL"))
    worker: Mapped[str | None]
    created: Mapped[datetime]
    started: Mapped[datetime | None]
    finished: Mapped[datetime | None]
    train_seconds: Mapped[float | None]
    evaluate_seconds: Mapped[float | None]
    parameters: Mapped[int | None]
    provenance: Mapped[dict[str, Any]]
    diagnostics: Mapped[dict[str, Any]]
    failure_kind: Mapped[str | None] = mapped_column(String(32))
    failure_message: Mapped[str | None]
    failure_traceback: Mapped[str | None]
    seq: Mapped[int]

    __table_args__ = (
        UniqueConstraint("study_id", "number", name="uq_trials_study_number"),
        UniqueConstraint("study_id", "config_hash", name="uq_trials_study_config"),
        Index("ix_trials_study_seq", "study_id", "seq"),
        Index("ix_trials_study_state", "study_id", "state"),
        Index("ix_trials_study_arch", "study_id", "arch_hash"),
    )


class ValueTable(Base):
    __tablename__ = "trial_values"

    trial_id: Mapped[int] = mapped_column(ForeignKey("trials.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[float]


class ReportTable(Base):
    __tablename__ = "reports"

    trial_id: Mapped[int] = mapped_column(ForeignKey("trials.id", ondelete="CASCADE"), primary_key=True)
    rung: Mapped[int] = mapped_column(primary_key=True)
    step: Mapped[int]
    tokens: Mapped[int]
    training_flops: Mapped[float]
    loss: Mapped[float]
    seconds: Mapped[float]


class ArtifactTable(Base):
    __tablename__ = "artifacts"

    trial_id: Mapped[int] = mapped_column(ForeignKey("trials.id", ondelete="CASCADE"), primary_key=True)
    kind: Mapped[str] = mapped_column(String(32), primary_key=True)
    uri: Mapped[str]
    sha256: Mapped[str] = mapped_column(String(64))
    bytes: Mapped[int]


class FrontHistoryTable(Base):
    __tablename__ = "front_history"

    trial_id: Mapped[int] = mapped_column(ForeignKey("trials.id", ondelete="CASCADE"), primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id", ondelete="CASCADE"))
    hypervolume: Mapped[float]
    dominated_by: Mapped[int | None]  # the dominating trial's number; null while on the front

    __table_args__ = (Index("ix_front_history_study", "study_id", "dominated_by"),)
