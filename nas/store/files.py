"""The file of a SQLite store, found without SQLAlchemy: whether there is one to open, and still the same."""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, unquote

from hypernas.errors import StoreError

LONGEST = 245  # bytes of a file's name, of the 255 that file systems take
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+]*://")


def is_url(store: str) -> bool:
    """Whether a store is given as a URL: it begins with a scheme. Anything else is a file's name, to the letter."""
    return _SCHEME.match(store) is not None


def file_of(store: str) -> str | None:
    """The file of a store that is given as a file's name or as a URL; None for a server, and where none is named."""
    path = store
    if is_url(store):
        scheme, _, rest = store.partition(":///")
        path = unquote(rest.partition("?")[0]) if scheme in ("sqlite", "sqlite+pysqlite") else ""
    return path if path not in ("", ":memory:") else None


def url_of(path: str) -> str:
    """The URL of a SQLite file: what a URL gives a meaning to (`?`, `%`) is escaped in it."""
    return f"sqlite:///{quote(path, safe=' +/')}"


def check_file(path: str, shown: str, *, create: bool = False) -> None:
    """Raises StoreError where the folder of a store's file is missing or, unless it may be created, the file; and for
    what is no file, which SQLite would read without end."""
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise StoreError(f"--store {shown}: the folder {folder} does not exist")
    if Path(path).exists():
        if not Path(path).is_file():
            raise StoreError(
                f"--store {shown}: this is no regular file (a folder, pipe, socket or device): name another"
            )
        return
    if (length := len(os.fsencode(Path(path).name))) > LONGEST:
        raise StoreError(
            f"--store {shown}: the file's name has {length} bytes, and at most {LONGEST} leave room for the endings of "
            "what lies beside it (-journal, -artifacts): name it shorter"
        )
    if not create:
        message = f"--store {shown}: there is no such file; a search creates it (nas search --help)"
        raise StoreError(message, missing=True)


# Tables hold rows. Views, triggers, virtual tables and computed columns are programs that run when one is read or
# written, and may never end. A view of another name is nobody's way to our rows.
PROGRAMS = """
SELECT type, name FROM sqlite_master
WHERE type = 'trigger' OR name IN ({names}) AND (
   type = 'view' OR coalesce(rootpage, 0) = 0
   OR (type = 'table' AND EXISTS (SELECT 1 FROM pragma_table_xinfo(sqlite_master.name) WHERE hidden > 1)))
LIMIT 1
"""


def check_tables(execute: Callable[[str], Any], shown: str, names: Iterable[str]) -> None:
    """Raises StoreError where one of these tables of a SQLite database runs something when it is used.

    `execute` runs a query there.
    """
    found = execute(PROGRAMS.format(names=", ".join(f"'{name}'" for name in names))).fetchone()
    if found is not None:
        raise StoreError(
            f"{shown} has the {found[0]} {found[1]!r}, which runs whenever its rows are used: wanted tables alone, as "
            "they were made; use a copy, or remove it"
        )


def check_store(store: str, *, create: bool = False) -> None:
    """`check_file` for the file that a store names, if it names one."""
    if (path := file_of(store)) is not None:
        check_file(path, url_of(path), create=create)


Identity = tuple[int, int]  # device and inode


@dataclass(frozen=True, slots=True)
class Held:
    """An open store's file and the log beside it, by what a name alone does not say."""

    path: Path
    log_path: Path  # beside the file that a link names
    file: Identity | None
    log: Identity | None

    @classmethod
    def of(cls, path: str) -> Self:
        name = Path(path).absolute()
        log = Path(f"{name.resolve()}-wal")
        return cls(name, log, _identity(name), _identity(log))

    def found(self) -> str | None:
        """What became of the file: "deleted" or "replaced by another"; None while it is where it was."""
        there = _identity(self.path)
        return None if there == self.file else "deleted" if there is None else "replaced by another"

    def remove_log(self) -> None:
        """Deletes the log that the file left behind, unless it is another's by now."""
        if self.log is not None and _identity(self.log_path) == self.log:
            self.log_path.unlink(missing_ok=True)
            Path(str(self.log_path).removesuffix("-wal") + "-shm").unlink(missing_ok=True)


def _identity(path: Path) -> Identity | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
