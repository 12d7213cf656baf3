"""A file is written whole or not at all, and a disk that refuses it is named."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST = 50  # letters of a name that stand in the one of its unfinished file: at most 255 bytes are a name


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What a disk refuses meanwhile is an OSError that names the path: systems do not say which file they were writing.

    Writers that are no Python (safetensors, torch) say it their own way, which counts as a full disk where it is one.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        if type(error).__name__ != "SafetensorError" and not isinstance(error, RuntimeError):
            raise
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if os.strerror(code) in str(error) or f"os error {code}" in str(error):
                raise OSError(code, os.strerror(code), str(path)) from error
        raise


def user_cache() -> Path:
    """Where this user keeps what can be made again: `$XDG_CACHE_HOME/hypernas`, by default `~/.cache/hypernas`.

    Raises OSError for a user that has no home: a folder that others may write to, such as /tmp, is no place for code.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (base if base.is_absolute() else Path.home() / ".cache") / "hypernas"
    except RuntimeError as error:
        user = f"user {os.getuid()} has no home folder on this machine"
        wanted = "set HOME, or XDG_CACHE_HOME, to a folder that this user can write to"
        raise OSError(errno.ENOENT, f"{user}: {wanted}") from error


def write_whole(path: Path, data: bytes) -> None:
    """Replaces a file by these bytes, or leaves it as it was. Raises OSError, naming it, when it cannot be written.

    A link stays one; what is no file, as /dev/stdout, is written to and not replaced.
    """
    with naming(path):
        path = path.resolve()
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name[:LONGEST]}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
