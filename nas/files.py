"""A file is written whole or not at all, and read if it is one."""

import errno
import json
import os
from pathlib import Path
from typing import Any

SPECIAL = "no regular file (a pipe, socket or device)"
LONGEST = 16 << 20  # bytes of a text that is read at once: configurations and cards have a few thousand


def write_whole(path: Path, data: bytes) -> None:
    """Replaces a file by these bytes, or leaves it as it was. Raises OSError when it cannot be written.

    A link stays one; what is no file, as /dev/stdout, is written to and not replaced.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_text(path: Path) -> str:
    """The text of a file that may be anybody's. Raises OSError when it cannot be read or is no regular file (reading a
    pipe would wait for ever), ValueError when it is no UTF-8 or longer than LONGEST."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, SPECIAL if not path.is_dir() else os.strerror(errno.EISDIR), str(path))
    with path.open("rb") as file:
        data = file.read(LONGEST + 1)
    if len(data) > LONGEST:
        raise ValueError(f"it is longer than {LONGEST >> 20} MiB")
    return data.decode()


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises as `read_text`, and ValueError for what is no JSON or nested without end."""
    try:
        return json.loads(read_text(path))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
