"""Checks what a search needs on this machine, one line each, and says what to do about what is missing."""

import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from hypernas.errors import UserError

FREE_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Line:
    check: str
    ok: bool
    found: str
    do: str = ""


def examine(store: str, study: str | None, space: str = "lm", address: str | None = None) -> list[Line]:
    """Every check, in order; none stops the others."""
    return [run_check(name, check) for name, check in checks(store, study, space, address)]


def checks(
    store: str, study: str | None, space: str = "lm", address: str | None = None
) -> list[tuple[str, Callable[[], str]]]:
    """The checks by name; each returns what it found and raises RuntimeError for what is wrong."""
    listed: list[tuple[str, Callable[[], str]]] = [
        ("python", lambda: sys.version.split()[0]),
        ("store", lambda: _store(store)),
        ("disk", _disk),
        *device_checks(),
        ("compiler", _compiler),
        ("data", _data),
        ("ray", lambda: _ray(address)),
        ("smallest architecture", lambda: _step(space, largest=False)),
        ("largest architecture", lambda: _step(space, largest=True)),
    ]
    if study is not None:
        listed.append((f"study {study}", lambda: _study(store, study, space)))
    return listed


def device_checks() -> list[tuple[str, Callable[[], str]]]:
    """What trainings run on: the device, its kernels, and how workers share a GPU."""
    return [("device", _device), ("triton", _triton), *([("sharing", _sharing)] if _has_gpu() else [])]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def run_check(name: str, check: Callable[[], str]) -> Line:
    try:
        return Line(name, True, check())
    except Exception as error:  # noqa: BLE001 - whatever is wrong here is what the user wants to read
        found, _, do = str(error).partition(" -> ")
        return Line(name, False, found or type(error).__name__, do or "put that right and run nas doctor again")


def _store(url: str) -> str:
    from hypernas.errors import StoreError
    from hypernas.store import Reader

    try:
        with Reader(url) as opened:
            return f"{opened.shown} holds {len(opened.studies())} studies"
    except StoreError as error:
        if error.missing:
            return f"{url} is not there yet; a search creates it"
        raise


def _disk() -> str:
    free = shutil.disk_usage(Path.cwd()).free
    if free < FREE_BYTES:
        raise RuntimeError(f"{free / 2**30:.1f} GiB free here -> make room: weights and checkpoints are kept here")
    return f"{free / 2**30:.0f} GiB free"


def _device() -> str:
    import torch

    from hypernas.training.worker import inspect_device

    found = inspect_device(gpu=True)
    if found.problem:
        raise RuntimeError(
            f"torch {torch.__version__} cannot use the GPU here: {found.problem} -> "
            "install torch with constraints-cuda.txt, see nvidia-smi, or search with --gpus-per-trial 0"
        )
    if found.device == "cpu":
        return f"torch {torch.__version__}, CPU only, {torch.backends.cpu.get_cpu_capability()}"
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    listed = {f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in devices}
    return f"torch {torch.__version__}, CUDA {torch.version.cuda}, {len(devices)} GPUs ({'; '.join(sorted(listed))})"


def _triton() -> str:
    import torch

    try:
        import_module("triton")
    except ImportError as error:
        raise RuntimeError(f"{error} -> pip install triton (Linux), or search with --kernels reference") from error
    if not torch.cuda.is_available():
        return f"{version('triton')}, not used: it needs a GPU"
    from hypernas.kernels import dispatch, rms_norm

    start = time.perf_counter()
    try:
        for dtype in (torch.float32, torch.bfloat16):
            dispatch.self_test(rms_norm.RMS_NORM, "triton", dtype, torch.device("cuda"))
    except Exception as error:
        raise RuntimeError(f"{version('triton')}: {error} -> searches use the reference kernels here") from error
    seconds = time.perf_counter() - start
    return f"{version('triton')}, compiled a kernel that agrees with float64, in {seconds:.1f} s"


def _sharing() -> str:
    """NVIDIA's Multi-Process Service lets kernels of several processes run at the same time."""
    pipes = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
    if (pipes / "control").exists():
        return "NVIDIA's Multi-Process Service runs: workers that share a GPU compute at the same time"
    return (
        "workers that share a GPU (--gpus-per-trial 0.25) take turns; with NVIDIA's Multi-Process Service "
        "(nvidia-cuda-mps-control -d) they compute at the same time"
    )


def _compiler() -> str:
    from hypernas.kernels.processor import has_amx

    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError(
            "no C++ compiler: the CPU kernels cannot be built -> install g++, or use --kernels reference"
        )
    units = "AMX" if has_amx() else "no AMX"
    return f"{compiler}, {units}"


def _data() -> str:
    from hypernas.data.text import load_corpus

    corpus = load_corpus(None)
    return f"{corpus.name}: {len(corpus.train):,} bytes to train on, {len(corpus.validation):,} to validate"


def _ray(address: str | None) -> str:
    from hypernas.engines.ray_pool import RayPool

    start = time.perf_counter()
    pool = RayPool(1, address=address)
    try:
        if not pool.free:
            raise RuntimeError("no worker became ready -> ray status shows which resources are missing")
        seconds = time.perf_counter() - start
        has = ", ".join(f"{count:g} {name}" for name, count in sorted(pool.resources().items()))
    finally:
        pool.close()
    return f"{'a cluster of our own' if address is None else address} with {has}: a warm worker in {seconds:.1f} s"


def _step(name: str, *, largest: bool) -> str:
    """Trains one step of the space's smallest or largest architecture."""
    from hypernas.config.study_config import StudyConfig
    from hypernas.records import Job, Result
    from hypernas.study.search import prepare
    from hypernas.training.worker import run

    prepared = prepare(StudyConfig(space=name))
    arch = prepared.plan.space.largest() if largest else prepared.plan.space.baseline()
    if not largest:
        arch = replace(arch, depth=1)
    from hypernas.data.tasks import TASKS
    from hypernas.search_spaces.base import arch_to_json

    size = 2 * TASKS[prepared.plan.space.task].units(arch)
    job = Job(
        study="doctor",
        trial=0,
        token=0,
        space=prepared.plan.space_spec,
        arch=arch_to_json(arch),
        recipe=replace(prepared.plan.recipe, tokens=size, batch_tokens=size),
        data_path=None,
        data_hash=prepared.data_hash,
        data_seed=0,
    )
    *_, result = run(job)
    assert isinstance(result, Result)
    if result.failure:
        raise RuntimeError(f"{result.failure.message} -> see nas describe for what it needs")
    return f"{result.parameters:,} parameters, one step in {result.train_seconds:.2f} s"


def _study(store: str, name: str, space: str = "lm") -> str:
    from hypernas.data.tasks import TASKS
    from hypernas.search_spaces import SPACES, name_space, stored_space
    from hypernas.search_spaces.base import SpaceError
    from hypernas.store import Reader

    with Reader(store) as opened:
        row = name_space(opened.study(name), None if space in SPACES else space)
    if row.settings.imported:
        return "it was imported from Optuna, to be looked at: it needs nothing here"
    try:
        task = TASKS[stored_space(row.space).task]
    except SpaceError as error:
        raise UserError(
            f"its space is not here: {error} -> go on where {row.space.name} is, or bring it here"
        ) from error
    data = task.load(row.settings.data_path)
    if data.hash != row.data_hash:
        raise UserError(f"its data has another hash here -> resume it where {row.data_name} is the same")
    return f"space {row.space.name} loads, data {row.data_name} is the same"
