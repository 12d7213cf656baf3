"""Opens a database, SQLite or PostgreSQL, and retries what passes."""

import os
import sqlite3
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from hypernas.errors import StoreError

T = TypeVar("T")
RETRY_SECONDS = (0.05, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0)  # longer than a database server takes to restart


def parse_url(url: str) -> URL:
    """`nas.db`, `sqlite:///nas.db` or `postgresql://...`; a plain path is a SQLite file. Raises StoreError."""
    try:
        parsed = make_url(url if "://" in url else f"sqlite:///{url}")
    except (ArgumentError, ValueError) as error:
        raise StoreError("--store: wanted a file name, sqlite:///FILE or postgresql://USER@HOST/NAME") from error
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise StoreError("--store names no file: a study in memory would be gone with the search; wanted FILE.db")
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite", "postgresql+psycopg"):
        raise StoreError(f"--store: {parsed.drivername!r} is not supported; wanted sqlite:/// or postgresql://")
    return parsed


def _open_read_only(path: Path) -> sqlite3.Connection:
    """Opens a file in a folder that we may not write to. Without a writer there is no log beside it, and SQLite, which
    would make one, has to be told that nothing changes; the connection is good for one look."""
    mode = "mode=ro" if Path(f"{path}-wal").exists() else "immutable=1"
    return sqlite3.connect(f"{path.as_uri()}?{mode}", uri=True, check_same_thread=False)


def make_engine(url: URL) -> Engine:
    if url.get_backend_name() == "sqlite":
        path = Path(url.database or "").resolve()
        if os.access(path.parent, os.W_OK):
            engine = create_engine(url)
        else:
            engine = create_engine(url, creator=lambda: _open_read_only(path), poolclass=NullPool)

        @event.listens_for(engine, "connect")
        def configure(connection: Any, _: Any) -> None:
            connection.isolation_level = None  # transactions begin below, not in the driver
            connection.execute("PRAGMA busy_timeout = 30000")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = NORMAL")

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            writes = connection.get_execution_options().get("writes", False)
            connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

        return engine
    return create_engine(url)


def is_passing(error: DBAPIError, url: URL) -> bool:
    """Whether the fault may be gone in a while: a locked file, a server that restarts, a transaction in the way."""
    if url.get_backend_name() == "sqlite":
        return "locked" in str(error.orig) or "busy" in str(error.orig)
    return error.connection_invalidated or isinstance(error, OperationalError)


def reason(error: SQLAlchemyError) -> str:
    return str(getattr(error, "orig", error)).strip().splitlines()[0]
