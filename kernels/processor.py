"""What this machine's processor offers, and how a process that trains on it best keeps its memory. Needs no torch."""

import ctypes
import os
import platform
from functools import cache
from pathlib import Path


def cpu_flags() -> str:
    """The instruction sets of this machine's CPU, as one line."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = info.read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


@cache
def has_amx() -> bool:
    """Whether this process may use matrix units for bfloat16, Intel's AMX: the CPU has them, and Linux allows it."""
    if "amx_bf16" not in cpu_flags().split():
        return False
    import torch  # where the flag is missing, a process that does not train learns so without it

    return torch.cpu._init_amx()


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for this process instead of giving it back page by page, and torch use huge pages.

    Every large tensor otherwise pays a page fault for each of its 4 KiB: `x * 2` on 32 MiB takes 3 times as long. And
    each 4 KiB costs a walk through the page tables, longer in a virtual machine: with pages of 2 MiB `stream_boundary`
    takes 5 to 10 % less time (`nas bench kernels`, beside the same with THP_MEM_ALLOC_ENABLE=0). A process-wide
    setting, so a worker or a benchmark calls it at its start: torch asks for huge pages only if told so before its
    first tensor. Elsewhere than on Linux with glibc it does nothing.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_max, trim_threshold, top_pad = -4, -1, -2
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 256 << 20)
