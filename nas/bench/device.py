"""The device that a benchmark runs on: its name, the versions of what runs there, and what it does at best."""

import statistics
from functools import lru_cache, partial
from typing import Any

import torch

from hypernas.bench.request import check_device
from hypernas.bench.timing import capture_graph, copying, in_turn, time_candidates
from hypernas.kernels import processor


def device_of(name: str) -> torch.device:
    """The device that `--device` names. Raises ValueError where there is none."""
    check_device(name, cuda=name == "cuda" and torch.cuda.is_available())
    return torch.device(name)


def ceilings(device: torch.device) -> list[dict[str, Any]]:
    """What the device does at best, which other numbers are shares of: a copy of 4 GB, a bfloat16 matrix product of
    8,192 x 8,192 x 8,192, and the smallest kernel, one launch at a time and 1,000 as one graph. On a CPU the same,
    small, and a loop in place of the graph."""
    gpu = device.type == "cuda"
    copied_bytes, launches = (4 * 10**9, 1000) if gpu else (4 * 10**6, 100)
    source = torch.randn(copied_bytes // 4, device=device)
    edge = _edge(device)
    one = torch.ones((), device=device)
    launched = partial(in_turn, [one.neg_], launches)
    replayed = capture_graph([one.neg_], launches)[0].replay if gpu else launched
    taken = time_candidates(
        {"copy": copying((source, torch.zeros_like(source))), "single": launched, "graph": replayed}, device
    )
    times = {name: max(statistics.median(each), 1e-6) for name, each in taken.items()}
    rows = [
        (f"copy of {copied_bytes / 1e9:g} GB", "read and written", 2 * copied_bytes / times["copy"] / 1e9, "TB/s"),
        (f"product {edge} x {edge} x {edge}", "bfloat16", product_tflops(device), "TFLOP/s"),
        ("smallest kernel", f"{launches} launches", 1e3 * times["single"] / launches, "us"),
        ("smallest kernel", f"graph of {launches}", 1e3 * times["graph"] / launches, "us"),
    ]
    return [
        {"name": name, "backend": how, "value": round(value, 3), "unit": unit, "baseline": None, "ratio": None}
        for name, how, value, unit in rows
    ]


def _edge(device: torch.device) -> int:
    return 8192 if device.type == "cuda" else 128


@lru_cache
def product_tflops(device: torch.device) -> float:
    """TFLOP/s of a square bfloat16 matrix product of random numbers: zeros are multiplied faster."""
    edge = _edge(device)
    left, right = (torch.randn(edge, edge, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(left)
    times = time_candidates({"product": lambda: torch.matmul(left, right, out=out)}, device)["product"]
    return 2 * edge**3 / max(statistics.median(times), 1e-6) / 1e9


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability()


def versions() -> dict[str, str]:
    import triton

    extensions = [
        name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in processor.cpu_flags().split()
    ]
    return {"torch": torch.__version__, "triton": triton.__version__, "cpu": " ".join(extensions)}
