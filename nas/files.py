"""What is written is whole or is not there, what a kill left half-made goes when more is made in its folder, and only
files are read. A disk that refuses is named.

Whoever makes something has a file `NAME....partial` locked for as long. The system lets go of a lock when its process
ends, however it ends, so a file that can be locked is a dead one's. The names of host and boot in it keep hands off
what another machine is making in a shared folder, where a lock of its may not be seen.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

SPECIAL = "no regular file (a pipe, socket or device)"
LONGEST = 16 << 20  # bytes of a text that is read at once: configurations and cards have a few thousand

PARTIAL = ".partial"
NAMED = 16  # digits between the name of what is made and PARTIAL: of host, boot and chance
_OURS = re.compile(rf".*([0-9a-f]{{4}})([0-9a-f]{{4}})[0-9a-f]{{8}}{re.escape(PARTIAL)}", re.S)

STEM = 50  # letters of a name that stand in the one of its unfinished file: at most 255 bytes are a name


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
        remove_halves(path.parent)
        with _claimed(path.parent, f"{path.name[:STEM]}.") as (partial, descriptor):
            with open(descriptor, "wb", closefd=False) as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            partial.replace(path)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to be filled, which takes its place when the block ends; an older one is then removed.

    When the block raises, or the process is killed, `target` is as it was.
    """
    with naming(target), scratch_folder(target.parent, f".{target.name[:STEM]}-") as scratch:
        made = scratch / "made"
        made.mkdir()
        yield made
        older = scratch / "older"
        if target.exists():
            target.rename(older)
        try:
            made.rename(target)
        except OSError:  # somebody else made one meanwhile
            if older.exists() and not target.exists():
                older.rename(target)
            raise


@contextmanager
def scratch_folder(parent: Path | None = None, stem: str = "nas-") -> Iterator[Path]:
    """An empty folder in `parent` (None: where temporary files go) that is gone with the block.

    What killed processes left in `parent` is removed. Raises OSError where the folder cannot be made.
    """
    parent = parent or Path(tempfile.gettempdir())
    remove_halves(parent)
    with _claimed(parent, stem) as (partial, _):
        folder = _folder_of(partial)
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_halves(parent: Path) -> None:
    """Removes what killed processes were making in `parent`."""
    host, boot = _machine()
    with suppress(OSError):  # no such folder, or one that may not be listed
        names = [entry.name for entry in os.scandir(parent) if entry.name.endswith(PARTIAL)]
        for name, match in [(name, _OURS.fullmatch(name)) for name in names]:
            if match is not None and (match[1] == host or match[2] == boot):
                _remove_if_dead(parent / name)


@contextmanager
def _claimed(parent: Path, stem: str) -> Iterator[tuple[Path, int]]:
    """A new file, locked, which says that this process is making something; with its descriptor."""
    while True:
        path = parent / f"{stem}{''.join(_machine())}{secrets.token_hex(4)}{PARTIAL}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists():
                break
        except BlockingIOError:
            pass  # who looked for dead ones was faster, and takes it for one
        except OSError:
            break  # a disk that knows no locks: then nobody removes anything
        os.close(descriptor)
    try:
        yield path, descriptor
    finally:
        if not _folder_of(path).exists():  # else it could not be removed whole, and the next one tries
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _remove_if_dead(partial: Path) -> None:
    """Removes the file, and the folder that it stands for, if it is this user's and its process has ended."""
    with suppress(OSError):
        descriptor = os.open(partial, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where somebody has it
            found = os.fstat(descriptor)
            if found.st_uid == os.getuid() and os.path.samestat(found, partial.stat()):  # not another's of its name
                if _folder_of(partial).is_dir():
                    shutil.rmtree(_folder_of(partial))
                partial.unlink()
        finally:
            os.close(descriptor)


def _folder_of(partial: Path) -> Path:
    return partial.with_name(partial.name.removesuffix(PARTIAL))


@cache
def _machine() -> tuple[str, str]:
    """Four digits each for this host and for its boot, which all containers on it share."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    names = (socket.gethostname(), boot.read_text() if boot.exists() else socket.gethostname())
    return sha256(names[0].encode()).hexdigest()[:4], sha256(names[1].encode()).hexdigest()[:4]


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
