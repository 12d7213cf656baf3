"""Where Ray writes of a cluster of our own: a folder that goes with the cluster, or with the next one after a kill."""

import os
import shutil
from contextlib import ExitStack, suppress
from pathlib import Path

from hypernas.files import scratch_folder

_held = ExitStack()
_folders: list[Path] = []  # at most one: a process has one cluster at a time


def open_session_folder() -> str:
    """An empty folder for Ray's logs and sockets, which lasts until `close_session_folder`.

    Those of searches that were killed are removed. Raises OSError where it cannot be made.
    """
    from ray._common.utils import get_default_ray_temp_dir, try_to_create_directory

    root = get_default_ray_temp_dir()
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
