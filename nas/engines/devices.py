"""On which devices this process and the workers train, and what is said of them."""

import os
import platform
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hypernas.config.study_config import check_gpus
from hypernas.engines.protocol import Executor
from hypernas.errors import UserError
from hypernas.records import Job, Seen
from hypernas.training import worker

if TYPE_CHECKING:
    import torch

CGROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def own_device(gpus: float | None) -> tuple[float, Seen]:
    """How many GPUs this process trains on, none or one, and what it sees. Raises UserError as `Inline` does."""
    found = worker.inspect_device(gpu=gpus != 0)
    check_usable(found, platform.node())
    if gpus and found.device == "cpu":
        raise UserError(f"--gpus-per-trial {gpus:g}: torch sees no GPU here; --gpus-per-trial 0 asks for CPUs")
    if gpus is not None and gpus > 1:
        raise UserError(f"--gpus-per-trial {gpus:g}: one process trains on one GPU; wanted 1, or 0 for CPUs")
    return (0.0 if found.device == "cpu" else 1.0), found


def asked_device(gpus: float | None) -> "torch.device":
    """Where a command of one process works, by its --gpus-per-trial. Raises UserError for a GPU that is not there."""
    import torch  # an engine whose jobs do not train does without

    check_gpus(gpus)
    return torch.device("cuda" if own_device(gpus)[0] else "cpu")


def place_job(job: Job, gpus: float) -> Job:
    """The job for a worker of so many GPUs: without any, it trains on the CPU whatever its process sees."""
    return job if gpus else replace(job, device="cpu")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_memory() -> float:
    """Bytes of memory that this process may still use: what is available, but no more than a control group (of a
    container, of systemd) leaves it."""
    import psutil

    return min([float(psutil.virtual_memory().available), *_group_limits(CGROUPS, OWN_GROUPS)])


def _group_limits(root: Path, own: Path) -> Iterator[float]:
    """The limits in bytes of a process' control groups, from the outermost on; none where there are no such groups."""
    if not own.exists():
        return
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):  # version 2 has one tree for all
            continue
        folder, name = root / controllers, "memory.limit_in_bytes" if controllers else "memory.max"
        for part in ("", *Path(path).parts[1:]):  # a container may not see its own name
            folder /= part
            with suppress(OSError, ValueError):  # "max" is no number
                yield float((folder / name).read_text())


def hide_gpus() -> None:
    """For a worker's process that asked for no GPU, before it first looks for one: Ray hides none from it."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def share_of_gpu(found: Seen, gpus: float) -> float | None:
    """Bytes of a GPU that a worker has for its trial; None without one."""
    return None if found.memory is None else found.memory * min(1.0, gpus)


def check_usable(found: Seen, where: str) -> None:
    """Raises UserError when a worker was given a GPU that it cannot use."""
    if found.problem:
        raise UserError(
            f"the GPU of {where} cannot be used ({found.problem}): see nas doctor there, or use its CPUs with "
            "--gpus-per-trial 0"
        )


SHARES = {1 / 2: "half of ", 1 / 3: "a third of ", 1 / 4: "a quarter of ", 1 / 8: "an eighth of "}


def on_what(executor: Executor) -> str:
    """What runs the trials: "8 workers, each on one NVIDIA H100", "2 workers on CPU cores"."""

    def counted(count: int) -> str:
        return f"{count} worker{'s' if count > 1 else ''}"

    def device(name: str) -> str:
        if executor.gpus > 1:
            return f"{executor.gpus:g} {name}"
        return f"{'' if executor.gpus == 1 else SHARES.get(executor.gpus, f'{executor.gpus:g} of ')}one {name}"

    names: Counter[str] = Counter()
    for found, count in executor.seen.items():
        names[found.device] += count
    parts = []
    for name, count in names.items():
        if executor.gpus == 0:
            parts.append(f"{counted(count)} on {'CPU cores' if count > 1 else 'a CPU core'}")
        elif name == "cpu":
            parts.append(f"{counted(count)}, each with {device('GPU')} that torch does not see, so on CPU cores")
        else:
            parts.append(f"{counted(count)}, each on {device(name)}")
    missing = executor.workers - names.total()
    if missing > 0:
        parts.append(f"{counted(missing)} yet to come, {'each with ' + device('GPU') if executor.gpus else 'on CPUs'}")
    return "; ".join(parts).replace("1 worker, each", "1 worker")
