"""Where Ray writes of a cluster of our own: a folder that goes with the cluster, or with the next one after a kill."""

import os
import shutil
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

from hypernas.files import NAMED, scratch_folder

# What Ray appends at most, and how long the path of a socket may be: 107 bytes on Linux, 103 elsewhere.
APPENDED = len("/session_2026-01-31_23-59-59_123456_4194304/sockets/plasma_store")
LONGEST = (107 if sys.platform == "linux" else 103) - APPENDED
_held = ExitStack()
_folders: list[Path] = []  # at most one: a process has one cluster at a time


def open_session_folder() -> str | None:
    """An empty folder for Ray's logs and sockets, which lasts until `close_session_folder`.

    Those of searches that were killed are removed. None where its path would be too long for sockets: then Ray makes
    its own, and leaves it there. Raises OSError where it cannot be made.
    """
    from ray._common.utils import get_default_ray_temp_dir, try_to_create_directory

    root = get_default_ray_temp_dir()
    if len(os.fsencode(root)) + len("/nas-") + NAMED > LONGEST:
        return None
    try_to_create_directory(root)  # as Ray makes it: for all users of the machine
    _folders.append(_held.enter_context(scratch_folder(Path(root), "nas-")))
    return str(_folders[-1])


def close_session_folder(*, crashed: bool = False) -> None:
    """Removes the folder, if there is one. Of a cluster that `crashed` it stays, in place of the one that did before:
    its logs say why."""
    for folder in _folders if crashed else ():
        kept = folder.with_name(f"nas-crashed-{os.getuid()}")
        shutil.rmtree(kept, ignore_errors=True)
        with suppress(OSError):
            folder.rename(kept)
    _folders.clear()
    _held.close()
