"""Everything that writes to a store: one short transaction an event.

A write runs under the database's own lock (`BEGIN IMMEDIATE` on SQLite, the study's row on PostgreSQL) and is
tried again after a passing fault: a locked file, a serialisation failure, a connection cut.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from sqlalchemy import Connection, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from hypernas.errors import StudyError, StudyExistsError
from hypernas.records import (
    FINISHED,
    POLICIES,
    FailureKind,
    Policy,
    Proposal,
    Report,
    Result,
    SpaceSpec,
    State,
    StudyRow,
    StudySettings,
    Trial,
    violation,
)
from hypernas.store.connection import Database, T
from hypernas.store.front import Front, extend_front, front_before
from hypernas.store.liveness import this_process, uptime
from hypernas.store.models import ArtifactTable, DriverTable, StudyTable, TrialTable, ValueTable
from hypernas.store.reader import Reader
from hypernas.store.rows import report_row, trial_row
from hypernas.store.statements import (
    DELETE_REPORT,
    HELD,
    INSERT_REPORT,
    INSERT_TRIAL,
    INSERT_VALUES,
    NEXT_NUMBER,
    NEXT_SEQ,
    TRIALS,
    trial_id_of,
    utcnow,
)

Filled = tuple[Trial, str, Sequence[Report]]  # a trial, the hash of its configuration, and its curve
MAX_LOST = 3  # leases a trial may lose before it is set aside as FAILED(worker_lost), until `retry_lost`
LOST = [str(kind) for kind, policy in POLICIES.items() if policy == Policy.RETRY]


class Store(Reader):
    """One database of studies, read and written. A store of an older version is brought up to date as it is opened.

    With `create`, a missing SQLite file or an empty database is given its tables; without, it is an error. Raises
    StoreError when it cannot be opened or a newer version wrote it.
    """

    def __init__(self, url: str, *, create: bool = False) -> None:
        Database.__init__(self, url, writes=True, create=create)  # not Reader's, which takes a store as it is
        self._fronts: dict[int, Front] = {}  # by study; with what changed since, today's

    def _write(self, work: Callable[[Connection], T]) -> T:
        """Runs `work` in one write transaction, again after a passing fault.

        When the connection is cut while a transaction is committed, nobody knows whether it was: what runs again must
        recognise its own work.
        """
        return self._patiently(work, writes=True)

    # ---- studies ---------------------------------------------------------------------------------------------

    def create_study(
        self,
        name: str,
        *,
        space: SpaceSpec,
        objectives: Sequence[str],
        settings: StudySettings,
        reference: Mapping[str, float],
        data_name: str,
        data_hash: str,
        trials: Iterable[Filled] = (),
    ) -> StudyRow:
        """Creates a study and returns its row, empty or with `trials`, all in one transaction.

        The front and its history follow from the order in which the trials finished. Raises StudyExistsError when the
        name is taken.
        """
        given = sorted(trials, key=lambda entry: (entry[0].finished is None, entry[0].finished, entry[0].number))
        assert all(trial.finished is not None for trial, _, _ in given if trial.state in FINISHED)
        made = StudyRow(0, name, utcnow(), space, tuple(objectives), settings, reference, data_name, data_hash)
        row = {
            "name": name,
            "created": made.created,
            "space": space.name,
            "space_settings": dict(space.settings),
            "objectives": list(objectives),
            "settings": settings.as_json(),
            "reference": dict(reference),
            "data_name": data_name,
            "data_hash": data_hash,
            "artifacts": "",  # older versions read a folder here
            "next_number": max((trial.number for trial, _, _ in given), default=-1) + 1,
            "seq": len(given),
        }

        def work(connection: Connection) -> None:
            inserted: Any = connection.execute(insert(StudyTable), row)
            _insert_trials(connection, replace(made, id=int(inserted.inserted_primary_key[0])), given)

        try:
            self._write(work)
        except IntegrityError as error:
            if all(study["name"] != name for study in self.studies()):
                raise  # for what its trials hold
            # It was there; or the connection was cut as ours was written.
            if (found := self.study(name)).created != made.created:
                raise StudyExistsError(f"study {name!r} exists in {self.shown}: --resume continues it") from error
            return found
        return self.study(name)

    def delete_study(self, name: str) -> None:
        """Raises StudyError while a search runs on it."""
        study = self.study(name)
        if self.live_drivers(study):
            raise StudyError(f"study {name!r} is being searched right now: stop the search first")
        self._write(lambda connection: connection.execute(delete(StudyTable).where(StudyTable.id == study.id)))
        self._fronts.pop(study.id, None)  # the next study may get its id

    def update_settings(self, study: StudyRow, settings: StudySettings) -> None:
        """Replaces the settings: the number of trials asked for may change, and findings are added (`nas scale`)."""
        query = update(StudyTable).where(StudyTable.id == study.id).values(settings=settings.as_json())
        self._write(lambda connection: connection.execute(query))

    # ---- drivers ---------------------------------------------------------------------------------------------

    def start_driver(self, study: StudyRow, workers: int) -> int:
        """Registers this process as a driver of the study; returns its id."""
        now = self._clock()
        row = {"study_id": study.id, "workers": workers, "started": now, "heartbeat": now, **this_process()}
        query = insert(DriverTable).values(row).returning(DriverTable.id)
        return self._write(lambda connection: connection.execute(query).scalar_one())

    def heartbeat(self, driver: int) -> None:
        mine = update(DriverTable).where(DriverTable.id == driver)
        now = {"heartbeat": self._clock(), "uptime": uptime(), "stopped": None}  # though it was taken for dead
        self._write(lambda connection: connection.execute(mine.values(now)))

    def stop_driver(self, driver: int) -> None:
        now = self._clock()
        query = update(DriverTable).where(DriverTable.id == driver).values(heartbeat=now, uptime=uptime(), stopped=now)
        self._write(lambda connection: connection.execute(query))

    def reclaim(self, study: StudyRow) -> list[int]:
        """Hands the RUNNING trials of dead drivers back to WAITING; returns their numbers.

        Notes that the drivers have ended, so that nobody looks for them again.
        """
        # In this order: a driver that registers in between is live, and its leases are not in the list.
        columns = select(TRIALS.c.number, TRIALS.c.token, TRIALS.c.driver_id).order_by(TRIALS.c.number)
        running = self._all(columns.where(TRIALS.c.study_id == study.id, TRIALS.c.state == State.RUNNING))
        drivers = self._drivers(study)
        if gone := [number for number, (_, lives) in drivers.items() if not lives]:
            ended = update(DriverTable).where(DriverTable.id.in_(gone)).values(stopped=DriverTable.heartbeat)
            self._write(lambda connection: connection.execute(ended))
        live = {number for number, (_, lives) in drivers.items() if lives}
        dead = [(number, token) for number, token, driver in running if driver not in live]
        return [number for number, token in dead if self.release(study, number, token, fault=False)]

    # ---- trials: the life of one -----------------------------------------------------------------------------

    def lease_waiting(self, study: StudyRow, driver: int) -> Trial | None:
        """Takes the oldest WAITING trial for this driver, or None when nothing waits."""
        oldest = (
            select(TrialTable.id)
            .where(TrialTable.study_id == study.id, TrialTable.state == State.WAITING)
            .order_by(TrialTable.number)
            .limit(1)
        )

        now = utcnow()
        tries = 0

        def work(connection: Connection) -> int | None:
            nonlocal tries
            tries += 1
            if tries > 1:
                mine = select(TrialTable.id).where(TrialTable.driver_id == driver, TrialTable.started == now)
                if (done := connection.execute(mine).scalar()) is not None:
                    return int(done)
            seq = _next_seq(connection, study)
            trial_id = connection.execute(oldest).scalar()
            if trial_id is None:
                return None
            values = {
                "state": State.RUNNING,
                "driver_id": driver,
                "started": now,
                "token": TrialTable.token + 1,
                "attempts": TrialTable.attempts + 1,
                "seq": seq,
            }
            connection.execute(update(TrialTable).where(TrialTable.id == trial_id).values(values))
            return int(trial_id)

        trial_id = self._write(work)
        return None if trial_id is None else self._trials(study, TrialTable.id == trial_id)[0]

    def lease_new(self, study: StudyRow, driver: int, proposal: Proposal, limit: int) -> Trial | None:
        """Makes the proposal a RUNNING trial under the next free number.

        None when the study has `limit` trials already, or one with the same architecture, recipe and seed.
        """
        now = utcnow()
        trial = {
            "study_id": study.id,
            "state": State.RUNNING,
            "origin": proposal.origin,
            "params": dict(proposal.params),
            "sampler_attrs": dict(proposal.sampler_attrs),
            "arch": dict(proposal.arch),
            "arch_hash": proposal.arch_hash,
            "config_hash": proposal.config_hash,
            "recipe": asdict(proposal.recipe),
            "driver_id": driver,
            "created": now,
            "started": now,
            "token": 1,
            "attempts": 1,
            "provenance": {},
            "diagnostics": {},
        }
        at = {"at_study": study.id, "at_limit": limit}

        def work(connection: Connection) -> tuple[int, int] | None:
            row = connection.execute(NEXT_NUMBER, at).first()
            if row is None:
                return None
            connection.execute(INSERT_TRIAL, trial | {"number": row[0], "seq": row[1]})
            return row[0], row[1]

        try:
            row = self._write(work)
        except IntegrityError:
            # Another driver got the same configuration first; or we did, and the connection was cut at that moment.
            query = select(TRIALS.c.number, TRIALS.c.seq).where(
                TRIALS.c.study_id == study.id,
                TRIALS.c.config_hash == proposal.config_hash,
                TRIALS.c.driver_id == driver,
                TRIALS.c.created == now,
            )
            row = next((tuple(found) for found in self._all(query)), None)
        if row is None:
            return None
        number, seq = row
        self._advance_front_seq(study, seq)
        return proposal.running(number, seq, driver, now)

    def report(self, study: StudyRow, report: Report, token: int) -> int | None:
        """Writes one point of the curve; returns the change's sequence, or None when the lease is no longer ours.

        A point that is reported again after a resume replaces the first.
        """

        def work(connection: Connection) -> int | None:
            trial_id, seq = _touch(connection, study, report.trial, token, {})
            if trial_id is None:
                return None
            connection.execute(DELETE_REPORT, {"at_trial": trial_id, "at_rung": report.rung})
            connection.execute(INSERT_REPORT, report_row(report, trial_id))
            return seq

        seq = self._write(work)
        if seq is not None:
            self._advance_front_seq(study, seq)
        return seq

    def stop(self, study: StudyRow, report: Report, token: int) -> int | None:
        """Ends a trial early, after `report`; returns the change's sequence, or None when the lease was lost."""
        values = {"state": State.STOPPED, "finished": utcnow(), "train_seconds": report.seconds}

        def work(connection: Connection) -> int | None:
            trial_id, seq = _touch(connection, study, report.trial, token, values)
            return None if trial_id is None else seq

        seq = self._write(work)
        if seq is not None:
            self._advance_front_seq(study, seq)
        return seq

    def add_values(self, study: StudyRow, number: int, values: Mapping[str, float]) -> None:
        """Adds or corrects values of a finished trial."""

        def work(connection: Connection) -> None:
            trial_id = connection.execute(trial_id_of(study, number)).scalar_one()
            connection.execute(
                delete(ValueTable).where(ValueTable.trial_id == trial_id, ValueTable.name.in_(list(values)))
            )
            rows = [{"trial_id": trial_id, "name": name, "value": value} for name, value in values.items()]
            connection.execute(INSERT_VALUES, rows)
            changed = update(TrialTable).where(TrialTable.id == trial_id)
            connection.execute(changed.values(seq=_next_seq(connection, study)))

        self._write(work)

    def finish(self, study: StudyRow, result: Result) -> int | None:
        """Ends a trial: its values, its place on the front and the hypervolume in one transaction.

        Returns the change's sequence, or None when the lease is no longer ours (the trial was taken over) and nothing
        was written.
        """
        failure = result.failure
        values = {
            "state": State.FAILED if failure else State.COMPLETE,
            "finished": utcnow(),
            "train_seconds": result.train_seconds,
            "evaluate_seconds": result.evaluate_seconds,
            "parameters": result.parameters or None,
            "provenance": dict(result.provenance),
            "diagnostics": dict(result.diagnostics),
            "worker": result.provenance.get("worker"),
        }
        if failure:
            values |= {
                "failure_kind": str(failure.kind),
                "failure_message": failure.message,
                "failure_traceback": failure.traceback,
            }

        tries = 0

        def work(connection: Connection) -> tuple[int, Front | None] | None:
            nonlocal tries
            tries += 1
            if tries > 1 and (before := _end_seq(connection, study, result)) is not None:
                return before, None
            trial_id, seq = _touch(connection, study, result.trial, result.token, values)
            if trial_id is None:
                return None
            if failure is not None:
                return seq, None
            rows = [{"trial_id": trial_id, "name": name, "value": value} for name, value in result.values.items()]
            connection.execute(INSERT_VALUES, rows)
            front = front_before(connection, study, seq, self._fronts.get(study.id))
            return seq, extend_front(connection, study, trial_id, result, seq, front)

        done = self._write(work)
        if done is None:
            return None
        seq, front = done
        if front is None:
            self._advance_front_seq(study, seq)
        else:
            self._fronts[study.id] = front
        return seq

    def _advance_front_seq(self, study: StudyRow, seq: int) -> None:
        """Our own change, `seq`, did not touch the front, so the cached front is still current."""
        front = self._fronts.get(study.id)
        if front is not None and front.seq == seq - 1:
            front.seq = seq

    def release(
        self,
        study: StudyRow,
        number: int,
        token: int,
        *,
        fault: bool = True,
        provenance: Mapping[str, Any] | None = None,
    ) -> bool:
        """Hands a RUNNING trial back to WAITING; a trial that lost MAX_LOST workers becomes FAILED(worker_lost).

        `fault` is False when the search was interrupted, its driver died or the machine went away: that never counts
        against a trial. `provenance` says how it is to be trained the next time.
        """
        values: dict[str, Any] = {"state": State.WAITING, "driver_id": None}
        if provenance is not None:
            values["provenance"] = dict(provenance)

        def work(connection: Connection) -> bool:
            trial_id, _ = _touch(connection, study, number, token, values)
            if trial_id is None:
                return False
            if not fault:
                query = update(TrialTable).where(TrialTable.id == trial_id)
                connection.execute(query.values(attempts=TrialTable.attempts - 1))
                return True
            lost = connection.execute(select(TrialTable.attempts).where(TrialTable.id == trial_id)).scalar_one()
            if lost >= MAX_LOST:
                failed = {
                    "state": State.FAILED,
                    "finished": utcnow(),
                    "failure_kind": str(FailureKind.WORKER_LOST),
                    "failure_message": f"its worker died {lost} times while training it: --resume tries it again",
                }
                connection.execute(update(TrialTable).where(TrialTable.id == trial_id).values(failed))
            return True

        return self._write(work)

    def retry_lost(self, study: StudyRow) -> list[int]:
        """Has the trials that were set aside for lost workers wait again, with MAX_LOST tries; returns their numbers.

        A trial that still waits is given as many: those that it lost under an earlier driver no longer count.
        """
        of_study = (TrialTable.study_id == study.id, TrialTable.attempts > 0)
        lost = (*of_study, TrialTable.state == State.FAILED, TrialTable.failure_kind.in_(LOST))
        waiting = (*of_study, TrialTable.state == State.WAITING)
        blank = dict.fromkeys(("finished", "driver_id", "failure_kind", "failure_message", "failure_traceback"))

        def work(connection: Connection) -> list[int]:
            connection.execute(update(TrialTable).where(*waiting).values(attempts=0))
            numbers = connection.execute(select(TrialTable.number).where(*lost)).scalars().all()
            if numbers:
                again = {**blank, "state": State.WAITING, "attempts": 0, "seq": _next_seq(connection, study)}
                connection.execute(update(TrialTable).where(*lost).values(again))
            return sorted(numbers)

        return self._write(work)

    # ---- artifacts -------------------------------------------------------------------------------------------

    def add_artifact(self, study: StudyRow, number: int, kind: str, uri: str, sha256: str, size: int) -> None:
        def work(connection: Connection) -> None:
            trial_id = connection.execute(trial_id_of(study, number)).scalar_one()
            where = (ArtifactTable.trial_id == trial_id, ArtifactTable.kind == kind)
            connection.execute(delete(ArtifactTable).where(*where))
            row = {"trial_id": trial_id, "kind": kind, "uri": uri, "sha256": sha256, "bytes": size}
            connection.execute(insert(ArtifactTable).values(row))

        self._write(work)

    def drop_artifact(self, study: StudyRow, number: int, kind: str) -> None:
        trial_id = trial_id_of(study, number).scalar_subquery()
        query = delete(ArtifactTable).where(ArtifactTable.trial_id == trial_id, ArtifactTable.kind == kind)
        self._write(lambda connection: connection.execute(query))


def _insert_trials(connection: Connection, study: StudyRow, given: Sequence[Filled]) -> None:
    """Writes the trials of a new study, in the order in which they finished."""
    front = Front(0, [], np.empty((0, len(study.objectives))))
    for seq, (trial, config, curve) in enumerate(given, start=1):
        inserted: Any = connection.execute(INSERT_TRIAL, trial_row(study, trial, config, seq))
        trial_id = int(inserted.inserted_primary_key[0])
        if trial.values:
            values = [{"trial_id": trial_id, "name": n, "value": v} for n, v in trial.values.items()]
            connection.execute(INSERT_VALUES, values)
        if curve:
            connection.execute(INSERT_REPORT, [report_row(report, trial_id) for report in curve])
        if trial.state == State.COMPLETE and not violation(trial):
            result = Result(trial.number, trial.token, trial.values)
            front = extend_front(connection, study, trial_id, result, seq, front)


def _next_seq(connection: Connection, study: StudyRow) -> int:
    seq = connection.execute(NEXT_SEQ, {"at_study": study.id}).scalar()
    if seq is None:
        raise StudyError(f"study {study.name!r} was deleted while it was being searched")
    return int(seq)


def _touch(
    connection: Connection, study: StudyRow, number: int, token: int, values: Mapping[str, Any]
) -> tuple[int | None, int]:
    """Changes a RUNNING trial that we still hold under `token`; returns its row's id (or None) and the sequence."""
    seq = _next_seq(connection, study)
    at = {"at_study": study.id, "at_number": number, "at_token": token}
    return connection.execute(HELD, {**values, **at, "seq": seq}).scalar(), seq


def _end_seq(connection: Connection, study: StudyRow, result: Result) -> int | None:
    """The sequence of the change that ended the trial under the result's token, if there is one."""
    query = select(TRIALS.c.seq).where(
        TRIALS.c.study_id == study.id,
        TRIALS.c.number == result.trial,
        TRIALS.c.token == result.token,
        TRIALS.c.state.in_([str(state) for state in FINISHED]),
    )
    seq = connection.execute(query).scalar()
    return None if seq is None else int(seq)
