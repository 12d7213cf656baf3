"""The file of a SQLite store, found without SQLAlchemy: whether there is one to open."""

import re
from pathlib import Path
from urllib.parse import quote, unquote

from hypernas.errors import StoreError

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
    """Raises StoreError where the folder of a store's file is missing or, unless it may be created, the file."""
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise StoreError(f"--store {shown}: the folder {folder} does not exist")
    if not create and not Path(path).exists():
        message = f"--store {shown}: there is no such file; a search creates it (nas search --help)"
        raise StoreError(message, missing=True)


def check_store(store: str, *, create: bool = False) -> None:
    """`check_file` for the file that a store names, if it names one."""
    if (path := file_of(store)) is not None:
        check_file(path, url_of(path), create=create)
