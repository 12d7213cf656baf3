"""A database that is locked, restarts or is still starting is waited for, and whoever waits long is told for what."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from random import random
from time import monotonic, sleep
from typing import TypeVar

from sqlalchemy import URL, Engine, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, SQLAlchemyError

from hypernas.errors import StoreError

T = TypeVar("T")

PAUSES = (0.05, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)  # between one try and the next, in seconds
RESTART_SECONDS = 32.0  # longer than a database server takes to restart
LOOK_SECONDS = 3.0  # of whoever only looks, for a server that is not there
LOCKED_SECONDS = 330.0  # of a SQLite file that another process has locked; PostgreSQL waits for as long as it takes
TRY_SECONDS = 2.0  # of these, SQLite itself waits so long at a time
SILENT_SECONDS = 1.5  # then it is said what is waited for

# What is said of a server that will not take us, however long we wait; no code comes with it.
REFUSED = (
    *("password", "authentication failed", "pg_hba.conf", "does not exist", "no such database", "no such user"),
    *("translate host name", "resolve host", "certificate", "SSL was required"),
)
# SQLite's words: for a file, and for what lies beside it or is kept from growing by a limit.
FULL, FAILING = "database or disk is full", "disk I/O error"
# Sessions of this user that wait for another's lock, and the first of those others.
BLOCKED = text(
    "SELECT (pg_blocking_pids(pid))[1] FROM pg_stat_activity WHERE datname = current_database() "
    "AND usename = current_user AND wait_event_type = 'Lock' "
    f"AND clock_timestamp() - query_start > interval '{SILENT_SECONDS} seconds' LIMIT 1"
)


class Patience:
    """Runs what reads and writes a database again after faults that pass, and says on stderr what is waited for."""

    def __init__(self, engine: Engine, url: URL, shown: str) -> None:
        self._engine, self._url, self._shown = engine, url, shown
        self._said = False  # what is waited for now
        self._since: dict[int, float] = {}  # of each thread that is at work, since when
        self._closed = threading.Event()
        if url.get_backend_name() == "postgresql":  # where a statement waits for a lock in the server, silently
            threading.Thread(target=self._watch, name="store-locks", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def run(self, work: Callable[[], T], *, opening: bool = False, waits: bool = True) -> T:
        """What `work` returns, tried again while the database is locked or, for a while, while it does not answer.

        That while is short for whoever only looks, without `waits`. `opening`: a server that was never reached may
        refuse us for good. Raises StoreError when the time is over, and what `work` raises where that will not pass.
        """
        with self._timed() as began:
            tries = 0
            while True:
                try:
                    return work()
                except IntegrityError:
                    raise
                except DBAPIError as error:
                    if is_of_disk(error):
                        raise StoreError(
                            f"--store {self._shown}: {reason(error)}; nothing that was stored is lost: make room "
                            "there, and nas search --resume continues"
                        ) from error
                    if not is_passing(error, self._url) or (opening and is_refusal(error)):
                        raise
                    self._pause(error, began, tries, waits)
                    tries += 1

    def _pause(self, error: DBAPIError, began: float, tries: int, waits: bool) -> None:
        """Waits before the next try. Raises StoreError when no time is left for one."""
        pause = PAUSES[min(tries, len(PAUSES) - 1)] * (0.5 + random())  # who were turned away together come apart
        seconds, what = RESTART_SECONDS if waits else LOOK_SECONDS, f"does not answer ({reason(error)})"
        if self._url.get_backend_name() == "sqlite":
            pause = min(pause, PAUSES[2])  # SQLite has waited already
            seconds, what = LOCKED_SECONDS, "locked by another process"
        waited = monotonic() - began
        if waited >= seconds:
            raise StoreError(
                f"--store {self._shown}: not reachable for {waited:.0f} seconds: {reason(error)}; "
                "nothing that was stored is lost, nas search --resume continues"
            ) from error
        if waited + pause > SILENT_SECONDS:
            self._say(f"{what}: waiting for up to {seconds:.0f} seconds")
        sleep(min(pause, seconds - waited))

    @contextmanager
    def _timed(self) -> Iterator[float]:
        began = self._since[threading.get_ident()] = monotonic()
        try:
            yield began
        finally:
            self._since.pop(threading.get_ident(), None)
            if not self._since:
                self._said = False

    def _say(self, what: str) -> None:
        if not self._said:
            self._said = True
            with suppress(OSError):  # nobody listens
                print(f"--store {self._shown}: {what}", file=sys.stderr, flush=True)

    def _watch(self) -> None:
        """Says when a statement waits for a lock that another session of the server holds."""
        while not self._closed.wait(SILENT_SECONDS / 2):
            oldest = min(list(self._since.values()), default=None)
            if self._said or oldest is None or monotonic() - oldest < SILENT_SECONDS:
                continue
            with suppress(SQLAlchemyError), self._engine.connect() as connection:
                if (blocker := connection.execute(BLOCKED).scalar()) is not None:
                    self._say(f"locked by another session (process {blocker} of its server): waiting until it lets go")


def is_passing(error: DBAPIError, url: URL) -> bool:
    """Whether the fault may be gone in a while: a locked file, a server that restarts, a transaction in the way."""
    if url.get_backend_name() == "sqlite":
        return "locked" in str(error.orig) or "busy" in str(error.orig)
    return error.connection_invalidated or isinstance(error, OperationalError)


def is_of_disk(error: DBAPIError) -> bool:
    """Whether the database's disk is full, or fails."""
    full = getattr(error.orig, "sqlstate", None) == "53100"  # PostgreSQL's
    return full or any(part in str(error.orig) for part in (FULL, FAILING))


def is_refusal(error: DBAPIError) -> bool:
    """Whether PostgreSQL will never take this connection: a wrong password, an unknown database, host or user."""
    return any(part in str(error.orig) for part in REFUSED)


def reason(error: Exception) -> str:
    """What the database said, in one line, and what to do where that is known."""
    said = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
    if "malformed" in said:
        return f"{said}: use a copy, or what `sqlite3 FILE .recover` saves"
    return f"{said} (the disk is full, at a quota or limit, or broken)" if said == FAILING else said
