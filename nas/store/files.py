"""The file of a SQLite store, found without SQLAlchemy: whether there is one to open."""

from pathlib import Path

from hypernas.errors import StoreError


def file_of(url: str) -> str | None:
    """The file that a store's URL names; None for a server's, and for one that names none."""
    scheme, _, rest = (url if "://" in url else f"sqlite:///{url}").partition(":///")
    path = rest.partition("?")[0]
    return path if scheme in ("sqlite", "sqlite+pysqlite") and path not in ("", ":memory:") else None


def check_file(path: str, shown: str, *, create: bool = False) -> None:
    """Raises StoreError where the folder of a store's file is missing or, unless it may be created, the file."""
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise StoreError(f"--store {shown}: the folder {folder} does not exist")
    if not create and not Path(path).exists():
        message = f"--store {shown}: there is no such file; a search creates it (nas search --help)"
        raise StoreError(message, missing=True)


def check_store(url: str, *, create: bool = False) -> None:
    """`check_file` for the file that a store's URL names, if it names one."""
    if (path := file_of(url)) is not None:
        check_file(path, f"sqlite:///{path}", create=create)
