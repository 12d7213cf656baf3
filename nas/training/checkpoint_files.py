"""Where half-trained trials lie, and what names their training. Needs no torch.

A trial's checkpoint is one file, replaced at each rung. A trial of several seeds has a second one, of what those that
ended gave (nas/training/worker.py).
"""

import os
import re
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from hypernas.errors import UserError
from hypernas.records import Job
from hypernas.search_spaces.base import digest

_NAME = re.compile(r"trial-(\d+)\.checkpoint(\.seeds)?(\..+\.partial)?")


def checkpoint_path(folder: str, trial: int) -> str:
    """Where a trial's checkpoint lies in the folder of its study."""
    return str(Path(folder) / f"trial-{trial}.checkpoint")


def seeds_path(checkpoint: str) -> Path:
    """Where a trial of several seeds notes those that ended, beside its checkpoint."""
    return Path(f"{checkpoint}.seeds")


def open_folder(folder: str) -> None:
    """Makes the folder. Raises UserError when nothing can be written there."""
    probe = Path(folder) / f"probe.{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # in two containers two processes may have one number
    except OSError as error:
        raise UserError(
            f"checkpoints cannot be written to {folder}: {error.strerror}; "
            "make room there, or name a folder that every worker can write to with --checkpoints"
        ) from error


def list_checkpoints(folder: str) -> set[int]:
    """The trials that have a checkpoint in the folder, or what a broken write left of one."""
    found = (_NAME.fullmatch(path.name) for path in Path(folder).glob("trial-*"))
    return {int(name[1]) for name in found if name is not None}


def discard(folder: str, trial: int) -> None:
    """Deletes the trial's checkpoint, if it has one, the note of its seeds, and what a broken write left behind."""
    name = Path(checkpoint_path(folder, trial)).name
    with suppress(OSError):  # no folder, no checkpoints; a disk that fails costs them, and not the search
        with os.scandir(folder) as entries:  # thousands on a large cluster: neither a pattern nor a Path for each
            found = [entry.name for entry in entries if entry.name == name or entry.name.startswith(f"{name}.")]
        for one in found:
            Path(folder, one).unlink(missing_ok=True)


def identity(job: Job) -> str:
    """Names what is trained, how and on what: a checkpoint fits any lease of the same training, and no other."""
    trained = {
        "space": [job.space.name, dict(job.space.settings)],
        "arch": dict(job.arch),
        "recipe": asdict(job.recipe),
        "data": [job.data_hash, job.data_seed],
        "how": [job.kernels, job.compile, job.micro_batches],
    }
    if job.inherits is not None:
        trained["parent"] = [job.study, job.inherits.trial]
    return digest(trained)
