"""Everything that reads or writes the store. One short transaction an event; reads return frozen records.

A write runs under the database's own lock (`BEGIN IMMEDIATE` on SQLite, the study's row on PostgreSQL) and is
tried again after a passing fault: a locked file, a serialisation failure, a connection cut.
"""

import os
import socket
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from random import random
from time import sleep
from typing import Any

import numpy as np
import psutil
from sqlalchemy import (
    Connection,
    RowMapping,
    delete,
    func,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.orm import aliased

from hypernas import pareto
from hypernas.errors import StoreError, StudyError
from hypernas.records import (
    FINISHED,
    FailureKind,
    Proposal,
    Report,
    Result,
    SpaceSpec,
    State,
    StudyRow,
    Trial,
)
from hypernas.store.connection import RETRY_SECONDS, T, is_passing, make_engine, parse_url, reason
from hypernas.store.front import Front, extend_front, front_before
from hypernas.store.models import (
    READABLE,
    SCHEMA,
    ArtifactTable,
    DriverTable,
    FrontHistoryTable,
    ReportTable,
    StudyTable,
    TrialTable,
    ValueTable,
)
from hypernas.store.rows import report_row, trial_of_row, trial_row
from hypernas.store.statements import (
    CHANGED_TRIALS,
    CHANGED_VALUES,
    HELD,
    INSERT_REPORT,
    INSERT_TRIAL,
    INSERT_VALUES,
    NEXT_NUMBER,
    NEXT_SEQ,
    STUDIES,
    TRIALS,
    trial_id_of,
    utcnow,
)

HEARTBEAT_LAPSE = timedelta(seconds=60)  # a driver on another host that is silent for longer is dead
MAX_LOST = 3  # leases a trial may lose before it is set aside as FAILED(worker_lost)


class Store:
    """One database of studies. Raises StoreError when it cannot be opened or has another version's schema.

    With `create`, a missing SQLite file or an empty database is given its tables; without, it is an error.
    """

    def __init__(self, url: str, *, create: bool = False) -> None:
        self.url = parse_url(url)
        bare = self.url.difference_update_query(["password"])  # libpq takes one there too
        self.shown = bare.render_as_string(hide_password=True)
        # What a user can type again: libpq takes the password from PGPASSWORD or ~/.pgpass.
        self.to_type = bare.set(password=None).render_as_string()
        path = self.url.database if self.url.get_backend_name() == "sqlite" else None
        if path and path != ":memory:":
            folder = Path(path).resolve().parent
            if not folder.is_dir():
                raise StoreError(f"--store {self.shown}: the folder {folder} does not exist")
            if not create and not Path(path).exists():
                message = f"--store {self.shown}: there is no such file; a search creates it (nas search --help)"
                raise StoreError(message, missing=True)
        self._engine = make_engine(self.url)
        self._writer = self._engine.execution_options(writes=True)
        # A statement of PostgreSQL's sees what was committed before it, in a transaction or not: reads go without.
        alone = {"isolation_level": "AUTOCOMMIT"} if self.url.get_backend_name() == "postgresql" else {}
        self._reader = self._engine.execution_options(**alone)
        self._fronts: dict[int, Front] = {}  # by study; with what changed since, today's
        try:
            self._check_schema(create)
        except SQLAlchemyError as error:
            raise StoreError(f"--store {self.shown}: cannot be opened: {reason(error)}") from error

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_schema(self, create: bool) -> None:
        with self._engine.connect() as connection:
            tables = set(inspect(connection).get_table_names())
            found = (
                connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
                if "alembic_version" in tables
                else None
            )
        if found == SCHEMA:
            return
        if found is not None and found > SCHEMA:
            raise StoreError(
                f"--store {self.shown} has schema {found}, newer than this version's {SCHEMA}: upgrade hypernas"
            )
        if found is None and tables:
            raise StoreError(f"--store {self.shown} holds tables of another program: name another store")
        if not create and found is not None and found >= READABLE:
            return
        if not create:
            what = f"has the older schema {found}" if found else "is empty"
            raise StoreError(f"--store {self.shown} {what}: nas search brings it up to date", missing=found is None)
        self._migrate()

    def _migrate(self) -> None:
        # Alembic takes 0.25 s to import, and is needed once in a store's life.
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with self._engine.connect() as connection:
            if connection.dialect.name == "sqlite":
                connection.exec_driver_sql("COMMIT")  # the journal mode changes outside a transaction only
                connection.exec_driver_sql("PRAGMA journal_mode = WAL")
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            connection.commit()

    def _write(self, work: Callable[[Connection], T]) -> T:
        """Runs `work` in one write transaction, again after a passing fault.

        When the connection is cut while a transaction is committed, nobody knows whether it was: what runs again must
        recognise its own work.
        """
        return self._patiently(work, writes=True)

    def _read(self, work: Callable[[Connection], T]) -> T:
        """Runs `work`, which writes nothing, again after a passing fault."""
        return self._patiently(work, writes=False)

    def _all(self, query: Any) -> Sequence[Any]:
        return self._read(lambda connection: connection.execute(query).all())

    def _patiently(self, work: Callable[[Connection], T], *, writes: bool) -> T:
        engine = self._writer if writes else self._reader
        for pause in (*RETRY_SECONDS, None):
            try:
                with engine.connect() as connection, connection.begin():
                    return work(connection)
            except IntegrityError:
                raise
            except DBAPIError as error:
                if not is_passing(error, self.url):
                    raise
                if pause is None:
                    raise StoreError(
                        f"--store {self.shown}: not reachable for {sum(RETRY_SECONDS):.0f} seconds: {reason(error)}; "
                        "nothing that was stored is lost, nas search --resume continues"
                    ) from error
                sleep(pause * (0.5 + random()))  # drivers that were turned away together do not come back together
        raise AssertionError("unreachable")

    # ---- studies ---------------------------------------------------------------------------------------------

    def create_study(
        self,
        name: str,
        *,
        space: SpaceSpec,
        objectives: Sequence[str],
        settings: Mapping[str, Any],
        reference: Mapping[str, float],
        data_name: str,
        data_hash: str,
        artifacts: str,
    ) -> StudyRow:
        """A new, empty study. Raises StudyError when the name is taken."""
        row = {
            "name": name,
            "created": utcnow(),
            "space": space.name,
            "space_settings": dict(space.settings),
            "objectives": list(objectives),
            "settings": dict(settings),
            "reference": dict(reference),
            "data_name": data_name,
            "data_hash": data_hash,
            "artifacts": artifacts,
            "next_number": 0,
            "seq": 0,
        }
        try:
            self._write(lambda connection: connection.execute(insert(StudyTable), row))
        except IntegrityError as error:
            raise StudyError(f"study {name!r} exists in {self.shown}: --resume continues it") from error
        return self.study(name)

    def study(self, name: str) -> StudyRow:
        """Raises StudyError naming the studies there are."""
        query = select(STUDIES).where(STUDIES.c.name == name)
        row = self._read(lambda connection: connection.execute(query).mappings().first())
        if row is None:
            names = [name for (name,) in self._all(select(StudyTable.name).order_by(StudyTable.name))]
            known = "it has: " + ", ".join(names) if names else "it has none yet"
            raise StudyError(f"no study {name!r} in {self.shown}; {known}")
        return StudyRow(
            id=row["id"],
            name=row["name"],
            created=row["created"],
            space=SpaceSpec(row["space"], row["space_settings"]),
            objectives=tuple(row["objectives"]),
            settings=row["settings"],
            reference=row["reference"],
            data_name=row["data_name"],
            data_hash=row["data_hash"],
            artifacts=row["artifacts"],
        )

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

    def fill(self, study: StudyRow, trials: Iterable[tuple[Trial, str, Sequence[Report]]]) -> None:
        """Trials with their configuration hashes and curves, as they are, into a study that has none: all or nothing.

        The front and its history follow from the order in which they finished.
        """
        given = sorted(trials, key=lambda entry: (entry[0].finished is None, entry[0].finished, entry[0].number))

        def work(connection: Connection) -> None:
            front = Front(0, [], np.empty((0, len(study.objectives))))
            for seq, (trial, config, curve) in enumerate(given, start=1):
                inserted: Any = connection.execute(INSERT_TRIAL, trial_row(study, trial, config, seq))
                trial_id = int(inserted.inserted_primary_key[0])
                if trial.values:
                    values = [{"trial_id": trial_id, "name": n, "value": v} for n, v in trial.values.items()]
                    connection.execute(INSERT_VALUES, values)
                if curve:
                    connection.execute(INSERT_REPORT, [report_row(report, trial_id) for report in curve])
                if trial.state == State.COMPLETE:
                    result = Result(trial.number, trial.token, trial.values)
                    front = extend_front(connection, study, trial_id, result, seq, front)
            numbers = [trial.number for trial, _, _ in given]
            counters = {"next_number": max(numbers, default=-1) + 1, "seq": len(given)}
            connection.execute(update(STUDIES).where(STUDIES.c.id == study.id).values(counters))

        assert all(trial.finished is not None for trial, _, _ in given if trial.state in FINISHED)
        self._write(work)

    def delete_study(self, name: str) -> None:
        """Raises StudyError while a search runs on it."""
        study = self.study(name)
        if self.live_drivers(study):
            raise StudyError(f"study {name!r} is being searched right now: stop the search first")
        self._write(lambda connection: connection.execute(delete(StudyTable).where(StudyTable.id == study.id)))
        self._fronts.pop(study.id, None)  # the next study may get its id

    def update_settings(self, study: StudyRow, settings: Mapping[str, Any]) -> None:
        """What may change after creation: how many trials are asked for, and what a ladder's laws came to."""
        query = update(StudyTable).where(StudyTable.id == study.id).values(settings=dict(settings))
        self._write(lambda connection: connection.execute(query))

    # ---- drivers ---------------------------------------------------------------------------------------------

    def start_driver(self, study: StudyRow, workers: int) -> int:
        """Registers this process as a driver of the study; returns its id."""
        row = {
            "study_id": study.id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": psutil.Process().create_time(),
            "workers": workers,
            "started": utcnow(),
            "heartbeat": utcnow(),
        }
        query = insert(DriverTable).values(row).returning(DriverTable.id)
        return self._write(lambda connection: connection.execute(query).scalar_one())

    def heartbeat(self, driver: int) -> None:
        query = update(DriverTable).where(DriverTable.id == driver).values(heartbeat=utcnow())
        self._write(lambda connection: connection.execute(query))

    def stop_driver(self, driver: int) -> None:
        query = update(DriverTable).where(DriverTable.id == driver).values(heartbeat=utcnow(), stopped=utcnow())
        self._write(lambda connection: connection.execute(query))

    def live_drivers(self, study: StudyRow) -> dict[int, int]:
        """Workers of every driver that is still alive, by driver id."""
        query = select(DriverTable.__table__).where(DriverTable.study_id == study.id, DriverTable.stopped.is_(None))
        rows = self._read(lambda connection: connection.execute(query).mappings().all())
        return {row["id"]: row["workers"] for row in rows if _is_alive(row)}

    def reclaim(self, study: StudyRow) -> list[int]:
        """Hands the RUNNING trials of dead drivers back to WAITING; returns their numbers."""
        # In this order: a driver that registers in between is live, and its leases are not in the list.
        running = self.trials(study, states=(State.RUNNING,))
        live = set(self.live_drivers(study))
        dead = [trial for trial in running if trial.driver not in live]
        return [t.number for t in dead if self.release(study, t.number, t.token, fault=False)]

    # ---- trials: the life of one ------------------------------------------------------------------------------

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
        return None if trial_id is None else self._trials(TrialTable.id == trial_id)[0]

    def lease_new(self, study: StudyRow, driver: int, proposal: Proposal, limit: int) -> Trial | None:
        """A new RUNNING trial under the next free number, or None: the study has `limit` trials already, or one
        with the same architecture, recipe and seed."""
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
            leased = self._write(work)
        except IntegrityError:
            # Another driver got the same configuration first; or we did, and the connection was cut at that moment.
            query = select(TRIALS.c.number, TRIALS.c.seq).where(
                TRIALS.c.study_id == study.id,
                TRIALS.c.config_hash == proposal.config_hash,
                TRIALS.c.driver_id == driver,
                TRIALS.c.created == now,
            )
            leased = next((tuple(row) for row in self._all(query)), None)
        if leased is None:
            return None
        self._noted(study, leased[1])
        return proposal.running(leased[0], leased[1], driver, now)

    def report(self, study: StudyRow, report: Report, token: int) -> int | None:
        """One point of the curve; the change's sequence, or None when the lease is no longer ours.

        Repeated after a resume, it is kept once.
        """

        def work(connection: Connection) -> int | None:
            trial_id, seq = _touch(connection, study, report.trial, token, {})
            if trial_id is None:
                return None
            connection.execute(
                delete(ReportTable).where(ReportTable.trial_id == trial_id, ReportTable.rung == report.rung)
            )
            connection.execute(INSERT_REPORT, report_row(report, trial_id))
            return seq

        seq = self._write(work)
        if seq is not None:
            self._noted(study, seq)
        return seq

    def stop(self, study: StudyRow, report: Report, token: int) -> int | None:
        """Ends a trial at a rung, where `report` was its last; the change's sequence, or None when it is not ours."""
        values = {"state": State.STOPPED, "finished": utcnow(), "train_seconds": report.seconds}

        def work(connection: Connection) -> int | None:
            trial_id, seq = _touch(connection, study, report.trial, token, values)
            return None if trial_id is None else seq

        seq = self._write(work)
        if seq is not None:
            self._noted(study, seq)
        return seq

    def add_values(self, study: StudyRow, number: int, values: Mapping[str, float]) -> None:
        """Adds to what is known of a trial what was found out after it ended, or puts it right."""

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

        The change's sequence; None when the lease is no longer ours (the trial was taken over): nothing is written.
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
            if tries > 1 and (before := _finished_under(connection, study, result)) is not None:
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
            self._noted(study, seq)
        else:
            self._fronts[study.id] = front
        return seq

    def _noted(self, study: StudyRow, seq: int) -> None:
        """A change of ours that left the front alone: what we know of it is as good as before."""
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
        """Hands a RUNNING trial back to WAITING; a trial that lost its worker too often becomes FAILED.

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
                    "failure_message": f"its worker died {lost} times while training it",
                }
                connection.execute(update(TrialTable).where(TrialTable.id == trial_id).values(failed))
            return True

        return self._write(work)

    # ---- reading ---------------------------------------------------------------------------------------------

    def trials(
        self,
        study: StudyRow,
        *,
        after: int = 0,
        states: Iterable[State] = (),
        number: int | None = None,
        origin: str | None = None,
    ) -> list[Trial]:
        """Trials by number: those changed since sequence `after`, in `states`, of one `origin`, or the one `number`."""
        if not states and number is None and origin is None:
            return self._read_trials(CHANGED_TRIALS, CHANGED_VALUES, {"at_study": study.id, "at_seq": after})
        where = [TrialTable.study_id == study.id, TrialTable.seq > after]
        if states:
            where.append(TrialTable.state.in_([str(state) for state in states]))
        if number is not None:
            where.append(TrialTable.number == number)
        if origin is not None:
            where.append(TrialTable.origin == origin)
        return self._trials(*where)

    def trial(self, study: StudyRow, number: int) -> Trial:
        """Raises StudyError when there is no such trial."""
        found = self.trials(study, number=number)
        if not found:
            ((count,),) = self._all(select(StudyTable.next_number).where(StudyTable.id == study.id))
            has = f"it has 0 to {count - 1}" if count else "it has none yet"
            raise StudyError(f"study {study.name!r} has no trial {number}; {has}")
        return found[0]

    def _trials(self, *where: Any) -> list[Trial]:
        query = select(TRIALS).where(*where).order_by(TRIALS.c.number)
        values_query = (
            select(ValueTable.trial_id, ValueTable.name, ValueTable.value)
            .join(TrialTable, TrialTable.id == ValueTable.trial_id)
            .where(*where)
        )
        return self._read_trials(query, values_query, {})

    def _read_trials(self, query: Any, values_query: Any, at: Mapping[str, Any]) -> list[Trial]:
        def work(connection: Connection) -> tuple[Sequence[RowMapping], Sequence[Any]]:
            rows = connection.execute(query, at).mappings().all()
            return rows, connection.execute(values_query, at).all() if rows else ()

        rows, found = self._read(work)
        values: dict[int, dict[str, float]] = {}
        for trial_id, name, value in found:
            values.setdefault(trial_id, {})[name] = value
        return [trial_of_row(row, values.get(row["id"], {})) for row in rows]

    def states(self, study: StudyRow) -> dict[str, int]:
        """How many trials are in each state; states without trials count 0."""
        query = select(TrialTable.state, func.count()).where(TrialTable.study_id == study.id).group_by(TrialTable.state)
        counts: dict[str, int] = dict(self._all(query))
        return {str(state): counts.get(str(state), 0) for state in State}

    def finished(self, study: StudyRow) -> int:
        """COMPLETE + STOPPED + FAILED."""
        counts = self.states(study)
        return sum(counts[str(state)] for state in FINISHED)

    def device_seconds(self, study: StudyRow) -> float:
        """What training and evaluating the study's finished trials took on their workers."""
        seconds = func.coalesce(TrialTable.train_seconds, 0.0) + func.coalesce(TrialTable.evaluate_seconds, 0.0)
        ((total,),) = self._all(select(func.coalesce(func.sum(seconds), 0.0)).where(TrialTable.study_id == study.id))
        return float(total)

    def reports(
        self, study: StudyRow, numbers: Collection[int] | None = None, *, after: int = 0, last: bool = False
    ) -> list[Report]:
        """The learning curves, by trial and rung: of all trials, of `numbers`, or of those changed since `after`.

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
        return [Report(*row) for row in self._all(query)]

    def front(self, study: StudyRow) -> list[Trial]:
        """The non-dominated COMPLETE trials, best quality first."""
        on_front = select(FrontHistoryTable.trial_id).where(
            FrontHistoryTable.study_id == study.id, FrontHistoryTable.dominated_by.is_(None)
        )
        trials = self._trials(TrialTable.id.in_(on_front))
        quality = pareto.quality(study.objectives)
        return sorted(
            trials,
            key=lambda t: (pareto.cost(quality, t.values[quality]), pareto.costs(study.objectives, t.values)),
        )

    def hypervolumes(self, study: StudyRow, *, after: int = 0) -> list[tuple[int, datetime, float]]:
        """(trial number, when it finished, the hypervolume after it), in order of finishing; since sequence `after`."""
        query = (
            select(TrialTable.number, TrialTable.finished, FrontHistoryTable.hypervolume)
            .join(TrialTable, TrialTable.id == FrontHistoryTable.trial_id)
            .where(FrontHistoryTable.study_id == study.id, TrialTable.seq > after)
            .order_by(TrialTable.finished, TrialTable.number)
        )
        return [(number, finished, volume) for number, finished, volume in self._all(query) if finished is not None]

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

    def artifacts(self, study: StudyRow, kind: str) -> dict[int, tuple[str, str]]:
        """(uri, sha256) of one kind of artifact, by trial number."""
        query = (
            select(TrialTable.number, ArtifactTable.uri, ArtifactTable.sha256)
            .join(TrialTable, TrialTable.id == ArtifactTable.trial_id)
            .where(TrialTable.study_id == study.id, ArtifactTable.kind == kind)
        )
        return {number: (uri, sha256) for number, uri, sha256 in self._all(query)}


def _is_alive(row: RowMapping) -> bool:
    """A driver on this host lives while its process does; one elsewhere while its heart beats."""
    if row["host"] != socket.gethostname():
        return bool(utcnow() - row["heartbeat"] < HEARTBEAT_LAPSE)
    try:
        process = psutil.Process(row["pid"])
        same = abs(process.create_time() - row["process_started"]) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _next_seq(connection: Connection, study: StudyRow) -> int:
    seq = connection.execute(NEXT_SEQ, {"at_study": study.id}).scalar()
    if seq is None:
        raise StudyError(f"study {study.name!r} was deleted while it was being searched")
    return int(seq)


def _touch(
    connection: Connection, study: StudyRow, number: int, token: int, values: Mapping[str, Any]
) -> tuple[int | None, int]:
    """Changes a RUNNING trial that we still hold under `token`; its row's id (or None) and the change's sequence."""
    seq = _next_seq(connection, study)
    at = {"at_study": study.id, "at_number": number, "at_token": token}
    return connection.execute(HELD, {**values, **at, "seq": seq}).scalar(), seq


def _finished_under(connection: Connection, study: StudyRow, result: Result) -> int | None:
    """The sequence of the change that ended the trial under the result's token, if there is one."""
    query = select(TRIALS.c.seq).where(
        TRIALS.c.study_id == study.id,
        TRIALS.c.number == result.trial,
        TRIALS.c.token == result.token,
        TRIALS.c.state.in_([str(state) for state in FINISHED]),
    )
    seq = connection.execute(query).scalar()
    return None if seq is None else int(seq)
