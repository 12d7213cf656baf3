import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hypernas.kernels import processor


@pytest.mark.skipif(torch.cpu._init_amx(), reason="this machine has matrix units")
def test_matrix_units_that_linux_does_not_give_are_not_used(monkeypatch):
    monkeypatch.setattr(processor, "cpu_flags", lambda: "flags: amx_tile amx_bf16")
    assert not processor.has_amx.__wrapped__()


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="no huge pages on request")
def test_a_process_that_keeps_freed_memory_gets_huge_pages_and_keeps_them():
    program = """
import torch
from hypernas.kernels.processor import keep_freed_memory
keep_freed_memory()
def huge():
    return next(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHuge"))
x = torch.ones(16 << 20)
first = huge()
del x
print(first, huge())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    held, kept = map(int, done.stdout.split())
    assert kept >= held >= 32 << 10  # KiB, of a tensor of 64 MiB
