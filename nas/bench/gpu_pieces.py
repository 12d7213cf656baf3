"""The pieces of `make gpu-check` that measure, each one process: `python -m hypernas.bench.gpu_pieces ceilings`.

A figure is a line of JSON, `{"name", "value", "unit"}`, printed as soon as it is known: a piece that is ended at its
limit has said what it found. Without a CUDA device everything runs at tiny sizes on the CPU.
"""

import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def say(name: str, value: float, unit: str) -> None:
    print(json.dumps({"name": name, "value": value, "unit": unit}), flush=True)


def say_row(row: dict[str, Any]) -> None:
    """A row of a benchmark, its back end in its name."""
    print(json.dumps(row | {"name": f"{row['name']}, {row['backend']}"}), flush=True)


def versions() -> None:
    """The device, the software, and what `nas doctor` says of both."""
    from hypernas.doctor import checks, device_checks, run_check

    print(f"Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}")
    if GPU:
        properties = torch.cuda.get_device_properties(0)
        print(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} SMs")
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit,mig.mode.current"
        print(subprocess.run(["nvidia-smi", query, "--format=csv"], capture_output=True, text=True, check=False).stdout)
    with tempfile.TemporaryDirectory() as folder:
        for check in checks(str(Path(folder) / "nas.db"), None) if GPU else device_checks():
            line = run_check(*check)
            print(f"{'ok  ' if line.ok else 'FAIL'} {line.check}: {line.found} {line.do}".rstrip(), flush=True)


def ceilings() -> None:
    """What the device does at best."""
    from hypernas.bench.device import ceilings

    for row in ceilings(DEVICE):
        say_row(row)


def ops() -> None:
    """Each op in both precisions, what there are figures to compare with first."""
    from hypernas.bench.kernels import run_all
    from hypernas.kernels import OPS

    fast, C = ("triton", 256) if GPU else ("naive", 16)
    first = [("stream_boundary", "65536"), ("stream_boundary", "4096,262144")] if GPU else []
    for op, tokens in [*first, *((op, "65536" if GPU else "32") for op in OPS[1:])]:
        for row in run_all(op, 4, C, tokens, "float32,bfloat16", fast, DEVICE.type)["rows"]:
            say_row(row)


def steps() -> None:
    """Training steps: tokens a second, the share of the device's products, memory, and launches."""
    from hypernas.bench.device_steps import NETS, SIZES, TINY, against_plain, launches_on, steps_on

    measured = []
    sizes, nets, count = (SIZES, list(NETS), 20) if GPU else ((TINY,), ["plain", "kromhc n=4"], 2)
    for mode in ("graphs", "eager") if GPU else ("eager",):
        for size in sizes:
            for net in nets:
                measured.append(steps_on(DEVICE, size, net, mode, count))
                row = against_plain(measured)[-1]
                say_row(row)
                say(f"mfu/{net}, {size.name}, {mode}", round(100 * row["mfu"], 1), "%")
                say(f"against plain/{net}, {size.name}, {mode}", row["ratio"], "times its tokens/s")
    for net in nets:
        say_row(launches_on(DEVICE, sizes[0], net, "eager"))


def profile() -> None:
    """What takes the time of a step."""
    from hypernas.bench.device_steps import SIZES, TINY, profile_of

    profiled = [(TINY, "plain")]
    if GPU:
        profiled = [(SIZES[1], "plain"), (SIZES[1], "kromhc n=4"), (SIZES[0], "plain"), (SIZES[0], "kromhc n=4")]
    for size, net in profiled:
        for row in profile_of(DEVICE, size, net, "graphs" if GPU else "eager"):
            say_row(row)


def search() -> None:
    """A search in this process: what its trials scored, and what its time went into."""
    _search("search", ["--engine", "inline"])


def workers(count: str) -> None:
    """The same search on Ray, `count` trials sharing the GPU."""
    share = ["--gpus-per-trial", str(1 / int(count))] if GPU else []
    _search("one worker" if count == "1" else "four workers", ["--workers", count, *share])


def _search(name: str, flags: list[str]) -> None:
    from hypernas.store import Store

    trials = 12 if GPU else 1
    size = [] if GPU else ["--set", "train.tokens=4000", "--set", "depth=1", "--set", "d_model=32"]
    with tempfile.TemporaryDirectory() as folder:
        url = str(Path(folder) / "nas.db")
        command = ["search", "--study", "check", "--store", url, "--preset", "quick", "--trials", str(trials)]
        clock = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "hypernas", *command, *flags, *size], check=False)
        seconds = time.monotonic() - clock
        say(f"{name}: exit", done.returncode, "")
        with Store(url) as store:
            rows = store.trials(store.study("check"))
    ended = [row for row in rows if row.state == "COMPLETE"]
    for row in rows:
        seconds_of = f"{row.train_seconds or 0:.1f} s of training, {row.evaluate_seconds or 0:.1f} s of scoring"
        print(row.number, row.state, seconds_of, row.provenance.get("cuda_graph"), dict(row.values), row.failure)
    say(f"{name}: wall", round(seconds, 1), "s")
    say(f"{name}: trials a minute", round(60 * len(ended) / seconds, 2), "")
    say(f"{name}: training", round(sum(row.train_seconds or 0 for row in ended), 1), "s of all trials together")
    say(f"{name}: scoring", round(sum(row.evaluate_seconds or 0 for row in ended), 1), "s of all trials together")
    if ended:
        print(ended[-1].provenance)


def boundary() -> None:
    """One op forward and backward at an awkward size, for compute-sanitizer to watch."""
    from hypernas.kernels import dispatch, stream_boundary

    op = stream_boundary.STREAM_BOUNDARY
    for dtype in (torch.float32, torch.bfloat16):
        arguments = stream_boundary.example_arguments(70, 4, 65, dtype, DEVICE)
        errors = dispatch.relative_errors(op, arguments, "triton" if GPU else "reference")
        print(dtype, errors)


PIECES: Mapping[str, Callable[..., None]] = {
    piece.__name__: piece
    for piece in (versions, ceilings, ops, steps, profile, search, workers, boundary)
}  # fmt: skip


if __name__ == "__main__":
    PIECES[sys.argv[1]](*sys.argv[2:])
