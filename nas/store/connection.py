"""Opens a database of studies, SQLite or PostgreSQL, checks its schema, and runs again what failed in passing."""

import os
import re
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    create_engine,
    event,
    func,
    inspect,
    literal,
    make_url,
    text,
)
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from hypernas.errors import StoreError
from hypernas.records import shorten
from hypernas.store.files import Held, check_file, check_tables, is_url
from hypernas.store.models import READABLE, SCHEMA, Base, UtcDateTime
from hypernas.store.patience import TRY_SECONDS, Patience, T, reason

# For psycopg. A pooler (pgbouncer) gives each transaction whichever session is free: what was prepared in one is
# unknown in another. Nothing else of ours outlives its transaction either: no SET, no temporary table, no lock.
POOLED = {"prepare_threshold": None}
MIGRATION_LOCK = 7_061_735  # any number: the key of PostgreSQL's advisory lock that migrations take turns with


class Database:
    """One database of studies, its schema checked; what `Reader` and `Store` have in common.

    Without `writes` the database itself refuses every write, and any schema from READABLE on is taken as it is. With
    `writes` an older schema is brought up to date, and with `create` a missing SQLite file or an empty database is
    given its tables. A server that is still starting is waited for where `waits`. Raises StoreError when it cannot be
    opened or has a schema that this version does not know.
    """

    def __init__(self, url: str, *, writes: bool = False, create: bool = False, waits: bool = True) -> None:
        self.url = parse_url(url)
        bare = self.url.difference_update_query(["password"])  # libpq takes one there too
        self.shown = bare.render_as_string(hide_password=True)
        # What a user can type again: libpq takes the password from PGPASSWORD or ~/.pgpass.
        self.to_type = bare.set(password=None).render_as_string()
        path = self.url.database if self.url.get_backend_name() == "sqlite" else None
        if path and path != ":memory:":
            check_file(path, self.shown, create=create)
        self._engine = make_engine(self.url, writes=writes)
        self._held: Held | None = None
        self._lost: StoreError | None = None
        self._writing = self._engine.execution_options(writes=True)
        # A statement of PostgreSQL's sees what was committed before it, in a transaction or not: a store reads without
        # one, which saves two round trips. What may only read needs one, as it is the transaction that is read-only.
        alone = writes and self.url.get_backend_name() == "postgresql"
        self._reading = self._engine.execution_options(**{"isolation_level": "AUTOCOMMIT"} if alone else {})
        self._patience = Patience(self._engine, self.url, self.shown)
        try:
            self._schema = self._patience.run(
                lambda: self._check_schema(writes=writes, create=create), opening=True, waits=waits
            )
        except SQLAlchemyError as error:
            self.close()
            raise StoreError(f"--store {self.shown}: cannot be opened: {reason(error)}") from error
        except BaseException:
            self.close()
            raise
        if writes and path:
            self._held = Held.of(path)
            event.listen(self._engine, "connect", lambda *_: self.check_held(), insert=True)

    def close(self) -> None:
        self._patience.close()
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _clock(self) -> Any:
        """The moment it is by the database's clock, to be stored or selected; SQLite's is this machine's."""
        if self.url.get_backend_name() == "postgresql":
            return func.clock_timestamp(type_=UtcDateTime())
        return literal(datetime.now(UTC), UtcDateTime())

    def check_held(self) -> None:
        """Raises StoreError when the file that this store opened to write to is no longer the one of that name.

        What is written on is then in no file that anybody finds. A file that came in its place is left as it is.
        """
        if self._lost is None and self._held is not None and (found := self._held.found()) is not None:
            self._lost = StoreError(
                f"--store {self.shown}: the file was {found} while it was in use, and nothing was written since: put "
                "it back, if you have it, and go on with --resume, or start another study"
            )
            with suppress(SQLAlchemyError, StoreError), self._engine.connect() as connection:
                # What the log beside it holds belongs into the file, and would be read as the new one's.
                connection.exec_driver_sql("COMMIT")
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
            self._held.remove_log()
        if self._lost is not None:
            raise self._lost

    def _check_schema(self, *, writes: bool, create: bool) -> str:
        """Checks the schema, and brings an older one up to date; the schema there is now."""
        with self._engine.connect() as connection:
            if connection.dialect.name == "sqlite":
                names = ("alembic_version", *Base.metadata.tables)
                check_tables(connection.exec_driver_sql, f"--store {self.shown}", names)
            tables = set(inspect(connection).get_table_names())
            found = (
                connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
                if "alembic_version" in tables
                else None
            )
        if found == SCHEMA:
            return SCHEMA
        if found is not None and found > SCHEMA:
            raise StoreError(
                f"--store {self.shown} has schema {found}, newer than this version's {SCHEMA}: upgrade hypernas"
            )
        if found is not None and not re.fullmatch(r"\d{4}", str(found)):
            raise StoreError(f"--store {self.shown} has schema {found!r}, which no hypernas wrote: name another store")
        if found is None and tables:
            raise StoreError(f"--store {self.shown} holds tables of another program: name another store")
        if writes and (create or found is not None):
            self._migrate()
            return SCHEMA
        if found is None or found < READABLE:
            what = f"has the older schema {found}" if found else "is empty"
            raise StoreError(f"--store {self.shown} {what}: nas search brings it up to date", missing=found is None)
        return str(found)

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
            else:  # two processes that open an old store at once: the second finds it up to date
                connection.execute(text(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            connection.commit()

    def _read(self, work: Callable[[Connection], T]) -> T:
        """Runs `work`, which fetches rows and writes nothing, again after a passing fault.

        Raises StoreError where the rows are not as hypernas writes them: anybody may have edited the database.
        """
        try:
            return self._patiently(work, writes=False)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            said = "nested too deeply" if isinstance(error, RecursionError) else shorten(str(error), 200)
            raise StoreError(f"--store {self.shown} holds what hypernas did not write: {said}; use a copy") from error

    def _all(self, query: Any) -> Sequence[Any]:
        return self._read(lambda connection: connection.execute(query).all())

    def _patiently(self, work: Callable[[Connection], T], *, writes: bool) -> T:
        engine = self._writing if writes else self._reading
        self.check_held()

        def once() -> T:
            with engine.connect() as connection, connection.begin():
                return work(connection)

        return self._patience.run(once)


def parse_url(store: str) -> URL:
    """Of `sqlite:///nas.db`, `postgresql://...`, or the name of a SQLite file. Raises StoreError."""
    try:
        parsed = make_url(store) if is_url(store) else URL.create("sqlite", database=store)
    except (ArgumentError, ValueError) as error:
        raise StoreError("--store: wanted a file name, sqlite:///FILE or postgresql://USER@HOST/NAME") from error
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    sqlite = parsed.get_backend_name() == "sqlite"
    if sqlite and (parsed.host or any(map(_is_refused, parsed.query.items()))):
        wanted = "wanted a file name, or sqlite:///FILE with at most ?timeout=SECONDS"
        raise StoreError(f"--store {parsed.render_as_string()}: {wanted}")
    if sqlite and parsed.database in (None, "", ":memory:"):
        raise StoreError("--store names no file: a study in memory would be gone with the search; wanted FILE.db")
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite", "postgresql+psycopg"):
        raise StoreError(f"--store: {parsed.drivername!r} is not supported; wanted sqlite:/// or postgresql://")
    return parsed


def _is_refused(option: tuple[str, object]) -> bool:
    """Whether SQLite's driver would refuse an option of a URL, leave it out, or open another file for it."""
    name, value = option
    return name != "timeout" or not str(value).isdecimal()


def _open_read_only(path: Path) -> sqlite3.Connection:
    """Opens a file in a folder that we may not write to. Without a writer there is no log beside it, and SQLite, which
    would make one, has to be told that nothing changes; the connection is good for one look."""
    mode = "mode=ro" if Path(f"{path}-wal").exists() else "immutable=1"
    return sqlite3.connect(f"{path.as_uri()}?{mode}", uri=True, check_same_thread=False)


def make_engine(url: URL, *, writes: bool) -> Engine:
    """Connections to the database; without `writes` it refuses whatever would change it."""
    if url.get_backend_name() == "sqlite":
        path = Path(url.database or "").resolve()
        if os.access(path.parent, os.W_OK):
            engine = create_engine(url)
        else:
            engine = create_engine(url, creator=lambda: _open_read_only(path), poolclass=NullPool)

        @event.listens_for(engine, "connect")
        def configure(connection: Any, _: Any) -> None:
            connection.isolation_level = None  # transactions begin below, not in the driver
            connection.execute(f"PRAGMA busy_timeout = {1000 * TRY_SECONDS:.0f}")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = NORMAL")
            if not writes:
                # Not `mode=ro`: who reads a file in WAL mode has to write the index beside it, and the last to close
                # it has to fold the log into it.
                connection.execute("PRAGMA query_only = ON")

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            immediate = connection.get_execution_options().get("writes", False)
            connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

        return engine
    return create_engine(url, connect_args=POOLED, execution_options={} if writes else {"postgresql_readonly": True})
