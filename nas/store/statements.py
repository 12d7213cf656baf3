"""SQL statements that run for every trial, built once."""

from datetime import UTC, datetime
from functools import cache
from importlib import import_module
from typing import Any

from sqlalchemy import (
    bindparam,
    delete,
    insert,
    select,
    update,
)

from hypernas.records import (
    State,
    StudyRow,
)
from hypernas.store.models import (
    FrontHistoryTable,
    ReportTable,
    StudyTable,
    TrialTable,
    ValueTable,
)

# The statements of every trial, built once: SQLAlchemy takes longer to build one than a database to run it. What an
# update sets follows from the names it is given; where it applies has names of its own, beginning with `at_`.
STUDIES: Any = StudyTable.__table__
TRIALS: Any = TrialTable.__table__
NEXT_SEQ = (
    update(STUDIES).where(STUDIES.c.id == bindparam("at_study")).values(seq=STUDIES.c.seq + 1).returning(STUDIES.c.seq)
)
NEXT_NUMBER = (
    update(STUDIES)
    .where(STUDIES.c.id == bindparam("at_study"), STUDIES.c.next_number < bindparam("at_limit"))
    .values(next_number=STUDIES.c.next_number + 1, seq=STUDIES.c.seq + 1)
    .returning(STUDIES.c.next_number - 1, STUDIES.c.seq)
)
HELD = (
    update(TRIALS)
    .where(
        TRIALS.c.study_id == bindparam("at_study"),
        TRIALS.c.number == bindparam("at_number"),
        TRIALS.c.token == bindparam("at_token"),
        TRIALS.c.state == State.RUNNING,
    )
    .returning(TRIALS.c.id)
)
CHANGED = (TRIALS.c.study_id == bindparam("at_study"), TRIALS.c.seq > bindparam("at_seq"))
CHANGED_TRIALS = select(TRIALS).where(*CHANGED).order_by(TRIALS.c.number)
CHANGED_VALUES = (
    select(ValueTable.trial_id, ValueTable.name, ValueTable.value)
    .join(TRIALS, TRIALS.c.id == ValueTable.trial_id)
    .where(*CHANGED)
)
FRONT_POINTS = (
    select(FrontHistoryTable.trial_id, TRIALS.c.number, ValueTable.name, ValueTable.value)
    .join(TRIALS, TRIALS.c.id == FrontHistoryTable.trial_id)
    .join(ValueTable, ValueTable.trial_id == FrontHistoryTable.trial_id)
    .where(
        FrontHistoryTable.study_id == bindparam("at_study"),
        FrontHistoryTable.dominated_by.is_(None),
        TRIALS.c.seq > bindparam("at_seq"),
    )
)
INSERT_TRIAL, INSERT_VALUES = insert(TRIALS), insert(ValueTable)
INSERT_REPORT = insert(ReportTable)
DELETE_REPORT = delete(ReportTable).where(
    ReportTable.trial_id == bindparam("at_trial"), ReportTable.rung == bindparam("at_rung")
)


@cache
def place_on_front(dialect: str) -> Any:
    """Inserts trials' places on the front; of those they push off, which have rows, only `dominated_by` changes."""
    # The dialect in use alone: to import PostgreSQL's takes a tenth of the time of `nas status`.
    insert_into = import_module(f"sqlalchemy.dialects.{dialect}").insert
    placed = insert_into(FrontHistoryTable)
    pushed = {"dominated_by": placed.excluded.dominated_by}
    return placed.on_conflict_do_update(index_elements=["trial_id"], set_=pushed)


def utcnow() -> datetime:
    return datetime.now(UTC)


def trial_id_of(study: StudyRow, number: int) -> Any:
    return select(TrialTable.id).where(TrialTable.study_id == study.id, TrialTable.number == number)
