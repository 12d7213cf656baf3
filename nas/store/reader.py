"""Everything that is read from a store, as frozen records."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, func, select
from sqlalchemy.orm import aliased

from hypernas import pareto
from hypernas.errors import StudyError
from hypernas.records import FINISHED, Report, State, StudyRow, Trial, make_record
from hypernas.store.connection import Database
from hypernas.store.liveness import is_alive
from hypernas.store.models import (
    READABLE,
    SINCE,
    ArtifactTable,
    DriverTable,
    FrontHistoryTable,
    ReportTable,
    StudyTable,
    TrialTable,
    ValueTable,
)
from hypernas.store.rows import study_of_row, trial_of_row
from hypernas.store.statements import CHANGED_TRIALS, CHANGED_VALUES, STUDIES, TRIALS

HEARTBEAT_LAPSE = timedelta(seconds=60)  # a driver whose process is not to be seen from here is dead after that


class Reader(Database):
    """A database of studies that is only looked at: its connections refuse every write.

    A store of an older version is read as it is, from READABLE on. A server that does not answer is given three
    seconds, or, where `waits`, as long as a search waits for it. Raises StoreError when it is not there, cannot be
    opened, or has a schema that this version does not know.
    """

    def __init__(self, url: str, *, waits: bool = False) -> None:
        super().__init__(url, waits=waits)

    def study(self, name: str) -> StudyRow:
        """The study's row. Raises StudyError, naming the studies there are, when it is unknown."""
        query = select(STUDIES).where(STUDIES.c.name == name)

        def work(connection: Connection) -> StudyRow | None:
            row = connection.execute(query).mappings().first()
            return None if row is None else study_of_row(dict(row))

        found = self._read(work)
        if found is None:
            names = [name for (name,) in self._all(select(StudyTable.name).order_by(StudyTable.name))]
            known = "it has: " + ", ".join(names) if names else "it has none yet"
            raise StudyError(f"no study {name!r} in {self.shown}; {known}")
        return found

    def studies(self) -> list[dict[str, Any]]:
        """Name, space, number of trials and creation time of every study."""
        counts = select(TrialTable.study_id, func.count().label("trials")).group_by(TrialTable.study_id).subquery()
        query = (
            select(StudyTable.name, StudyTable.space, func.coalesce(counts.c.trials, 0), StudyTable.created)
            .outerjoin(counts, counts.c.study_id == StudyTable.id)
            .order_by(StudyTable.created, StudyTable.id)
        )
        rows = self._all(query)
        return [
            {"name": name, "space": space, "trials": trials, "created": created.isoformat()}
            for name, space, trials, created in rows
        ]

    def live_drivers(self, study: StudyRow) -> dict[int, int]:
        """Workers of every driver that is still alive, by driver id."""
        return {number: workers for number, (workers, lives) in self._drivers(study).items() if lives}

    def _drivers(self, study: StudyRow) -> dict[int, tuple[int, bool]]:
        """Workers of every driver that is not known to have stopped, by its id, and whether it lives."""
        columns = [column for column in DriverTable.__table__.c if column.info.get(SINCE, READABLE) <= self._schema]
        query = select(*columns, self._clock().label("now")).where(
            DriverTable.study_id == study.id, DriverTable.stopped.is_(None)
        )
        rows = self._read(lambda connection: connection.execute(query).mappings().all())
        return {row["id"]: (row["workers"], is_alive(dict(row), row["now"], HEARTBEAT_LAPSE)) for row in rows}

    def trials(
        self,
        study: StudyRow,
        *,
        after: int = 0,
        states: Iterable[State] = (),
        number: int | None = None,
        origin: str | None = None,
        within: range | None = None,
    ) -> list[Trial]:
        """Trials by number: those changed since sequence `after`, in `states`, of one `origin`, with numbers `within`
        a range, or the one `number`."""
        if not states and number is None and origin is None and within is None:
            return self._read_trials(study, CHANGED_TRIALS, CHANGED_VALUES, {"at_study": study.id, "at_seq": after})
        where = [TrialTable.study_id == study.id, TrialTable.seq > after]
        if states:
            where.append(TrialTable.state.in_([str(state) for state in states]))
        if number is not None:
            where.append(TrialTable.number == number)
        if origin is not None:
            where.append(TrialTable.origin == origin)
        if within is not None:
            where.append(TrialTable.number.between(within.start, within.stop - 1))
        return self._trials(study, *where)

    def trial(self, study: StudyRow, number: int) -> Trial:
        """The trial of that number. Raises StudyError when there is none."""
        found = self.trials(study, number=number)
        if not found:
            ((count,),) = self._all(select(StudyTable.next_number).where(StudyTable.id == study.id))
            has = f"it has 0 to {count - 1}" if count else "it has none yet"
            raise StudyError(f"study {study.name!r} has no trial {number}; {has}")
        return found[0]

    def _trials(self, study: StudyRow, *where: Any) -> list[Trial]:
        query = select(TRIALS).where(*where).order_by(TRIALS.c.number)
        values_query = (
            select(ValueTable.trial_id, ValueTable.name, ValueTable.value)
            .join(TrialTable, TrialTable.id == ValueTable.trial_id)
            .where(*where)
        )
        return self._read_trials(study, query, values_query, {})

    def _read_trials(self, study: StudyRow, query: Any, values_query: Any, at: Mapping[str, Any]) -> list[Trial]:
        def work(connection: Connection) -> list[Trial]:
            rows = connection.execute(query, at).mappings().all()
            values: dict[int, dict[str, float]] = {}
            for trial_id, name, value in connection.execute(values_query, at).all() if rows else ():
                values.setdefault(trial_id, {})[name] = value
            return [trial_of_row(dict(row), values.get(row["id"], {}), study.objectives) for row in rows]

        return self._read(work)

    def states(self, study: StudyRow) -> dict[str, int]:
        """How many trials are in each state; states without trials count 0."""
        query = select(TrialTable.state, func.count()).where(TrialTable.study_id == study.id).group_by(TrialTable.state)
        counts: dict[str, int] = dict(self._all(query))
        return {str(state): counts.get(str(state), 0) for state in State}

    def numbers(self, study: StudyRow, states: Iterable[State]) -> set[int]:
        """The numbers of the trials in `states`."""
        wanted = TRIALS.c.state.in_([str(state) for state in states])
        return {number for (number,) in self._all(select(TRIALS.c.number).where(TRIALS.c.study_id == study.id, wanted))}

    def finished(self, study: StudyRow) -> int:
        """The number of trials that are COMPLETE, STOPPED or FAILED."""
        counts = self.states(study)
        return sum(counts[str(state)] for state in FINISHED)

    def counters(self, study: StudyRow) -> tuple[int, int]:
        """How many trials the study has, and the sequence of its last change."""
        ((count, seq),) = self._all(select(STUDIES.c.next_number, STUDIES.c.seq).where(STUDIES.c.id == study.id))
        return count, seq

    def trained_on(self, study: StudyRow) -> set[tuple[str, str | None]]:
        """(device, precision) that the study's trials were trained on, as their rows have them."""
        device, precision = (TRIALS.c.provenance[name].as_string() for name in ("device", "precision"))
        query = select(device, precision).where(TRIALS.c.study_id == study.id).distinct()
        return {(found, how) for found, how in self._all(query) if found is not None}

    def device_seconds(self, study: StudyRow) -> float:
        """Seconds that the workers spent training and evaluating the study's finished trials."""
        seconds = func.coalesce(TrialTable.train_seconds, 0.0) + func.coalesce(TrialTable.evaluate_seconds, 0.0)
        ((total,),) = self._all(select(func.coalesce(func.sum(seconds), 0.0)).where(TrialTable.study_id == study.id))
        return float(total)

    def reports(
        self,
        study: StudyRow,
        numbers: Collection[int] | None = None,
        *,
        after: int = 0,
        within: range | None = None,
        last: bool = False,
    ) -> list[Report]:
        """The learning curves, by trial and rung: of all trials, of `numbers` or `within` a range of them, or of those
        changed since `after`.

        `last` leaves out all but each trial's last report.
        """
        query = (
            select(
                TrialTable.number,
                ReportTable.rung,
                ReportTable.step,
                ReportTable.tokens,
                ReportTable.training_flops,
                ReportTable.loss,
                ReportTable.seconds,
            )
            .join(TrialTable, TrialTable.id == ReportTable.trial_id)
            .where(TrialTable.study_id == study.id, TrialTable.seq > after)
            .order_by(TrialTable.number, ReportTable.rung)
        )
        if last:
            of_trial = aliased(ReportTable)
            highest = select(func.max(of_trial.rung)).where(of_trial.trial_id == TrialTable.id).scalar_subquery()
            query = query.where(ReportTable.rung == highest)
        if numbers is not None:
            query = query.where(TrialTable.number.in_(numbers))
        if within is not None:
            query = query.where(TrialTable.number.between(within.start, within.stop - 1))
        names = [f.name for f in fields(Report)]
        return self._read(
            lambda connection: [
                make_record(Report, dict(zip(names, row, strict=True))) for row in connection.execute(query)
            ]
        )

    def front(self, study: StudyRow) -> list[Trial]:
        """The non-dominated COMPLETE trials, best quality first."""
        trials = self._trials(study, TrialTable.id.in_(_on_front(study)))
        quality = pareto.quality(study.objectives)
        return sorted(
            trials,
            key=lambda t: (pareto.cost(quality, t.values[quality]), pareto.costs(study.objectives, t.values)),
        )

    def is_on_front(self, study: StudyRow, number: int) -> bool:
        """Whether the trial of that number is COMPLETE and not dominated."""
        query = _on_front(study).join(TrialTable, TrialTable.id == FrontHistoryTable.trial_id)
        return bool(self._all(query.where(TrialTable.number == number)))

    def hypervolumes(self, study: StudyRow, *, after: int = 0) -> list[tuple[int, datetime, float]]:
        """(trial number, when it finished, the hypervolume after it), in order of finishing; since sequence `after`."""
        query = (
            select(TrialTable.number, TrialTable.finished, FrontHistoryTable.hypervolume)
            .join(TrialTable, TrialTable.id == FrontHistoryTable.trial_id)
            .where(FrontHistoryTable.study_id == study.id, TrialTable.seq > after)
            .order_by(TrialTable.finished, TrialTable.number)
        )
        return [(number, finished, volume) for number, finished, volume in self._all(query) if finished is not None]

    def artifacts(
        self, study: StudyRow, kind: str, *, number: int | None = None, off_front: bool = False
    ) -> dict[int, tuple[str, str]]:
        """(file name, sha256) of one kind of artifact, by trial number; where the file lies, folders.py says.

        Of all trials, of the one `number`, or of those that are not on the front.
        """
        query = (
            select(TrialTable.number, ArtifactTable.uri, ArtifactTable.sha256)
            .join(TrialTable, TrialTable.id == ArtifactTable.trial_id)
            .where(TrialTable.study_id == study.id, ArtifactTable.kind == kind)
        )
        if number is not None:
            query = query.where(TrialTable.number == number)
        if off_front:
            query = query.where(TrialTable.id.not_in(_on_front(study)))
        return {number: (uri, sha256) for number, uri, sha256 in self._all(query)}


def _on_front(study: StudyRow) -> Any:
    """Row ids of the trials on the front."""
    return select(FrontHistoryTable.trial_id).where(
        FrontHistoryTable.study_id == study.id, FrontHistoryTable.dominated_by.is_(None)
    )
