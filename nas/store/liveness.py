"""Whether a driver lives: by its process where that can be seen from here, by its heartbeats otherwise.

A process is known by its machine (host name, boot and namespace of process ids), its id and when it began. A host
name alone says little, as containers share theirs; nor does a time of day, as clocks are set.
"""

import os
import socket
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import getnode

LINUX = sys.platform == "linux"
PROC = Path("/proc")


def machine() -> dict[str, str | None]:
    """The columns of a driver that name the machine of this process.

    Process ids of two containers on one machine mean nothing to each other. `boot` is None where nothing tells
    machines apart: then only heartbeats count.
    """
    host = socket.gethostname()
    if LINUX:
        try:
            boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
            namespace = str((PROC / "self/ns/pid").stat().st_ino)
            seen = (PROC / "self").readlink().name
        except OSError:
            return {"host": host, "boot": None, "pid_namespace": None}
        # A /proc that was mounted outside shows the ids of outside.
        return {"host": host, "boot": boot, "pid_namespace": namespace if seen == str(os.getpid()) else None}
    node = getnode()
    known = not node >> 40 & 1  # else it was drawn at random, for this process alone
    return {"host": host, "boot": f"{node:012x}" if known else None, "pid_namespace": "all" if known else None}


def this_process() -> dict[str, Any]:
    """The columns of a driver that tell this process from every other."""
    return {**machine(), "pid": os.getpid(), "process_started": _began(os.getpid()), "uptime": uptime()}


def uptime() -> float | None:
    """Seconds since the machine's boot, by a clock that all its processes share and nobody sets; None without one."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if LINUX else None


def is_alive(driver: Mapping[str, Any], now: datetime, lapse: timedelta) -> bool:
    """Whether the driver of this row lives; `now` by the database's clock, which stamps heartbeats.

    A process that can be seen decides. Of any other, one heartbeat within `lapse`, by any clock that can be compared,
    is a sign of life: a clock that was set makes nobody dead.
    """
    here = machine()
    if here["boot"] is not None and here["boot"] == driver.get("boot"):  # a row of an older store names none
        known = here["pid_namespace"] is not None and all(here[name] == driver[name] for name in here)
        if known and (runs := _runs(driver["pid"], driver["process_started"])) is not None:
            return runs
        ticking = uptime()
        if None not in (ticking, driver["uptime"]) and ticking - driver["uptime"] < lapse.total_seconds():
            return True
    return bool(now - driver["heartbeat"] < lapse)


def _runs(pid: int, began: float) -> bool | None:
    """Whether the process that began then still runs; None where this user may not see it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    except OverflowError:
        return False  # no process has such a number
    try:
        return _began(pid) == began
    except ProcessLookupError:
        return False  # it ended at this moment, or waits for its parent to notice
    except OSError:
        return None


def _began(pid: int) -> float:
    """When the process began: in clock ticks since boot, which stay when a clock is set; elsewhere as its system says.

    Raises ProcessLookupError for one that has ended, another OSError for one that may not be looked at.
    """
    if LINUX:
        # The name, in parentheses, may hold anything; state is the first field after it, the start the twentieth.
        fields = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        if fields[0] in "ZX":
            raise ProcessLookupError(pid)
        return float(fields[19])
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            raise ProcessLookupError(pid)
        return process.create_time()
    except psutil.NoSuchProcess as error:
        raise ProcessLookupError(pid) from error
    except psutil.AccessDenied as error:
        raise PermissionError(pid) from error
