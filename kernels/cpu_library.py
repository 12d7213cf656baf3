"""The compiled C++ library: built once a machine at first use, called through ctypes.

The sources in `kernels/cpu/` know nothing of torch, so any g++ or clang++ builds them in seconds, and no torch
upgrade breaks them. The library's name carries a hash of sources, flags, compiler and CPU, because
`-march=native` code must not travel to another kind of machine.
"""

import ctypes
import fcntl
import hashlib
import shutil
import subprocess
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hypernas.files import scratch_folder, user_cache
from hypernas.kernels import processor
from hypernas.kernels.dispatch import BackendError

# The kernels are vectorised by hand: -O3 takes twice as long to compile and gains nothing, and -ffast-math would only
# bring its harm: a diverged run whose NaN disappears, and, at link time, crtfastmath.o, which flushes denormals in the
# whole process.
FLAGS = [
    "-O2",
    "-march=native",
    "-std=c++17",
    "-fPIC",
    "-fopenmp",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
]
LINK_FLAGS = ["-shared", "-fopenmp"]
BUILD_SECONDS = 180  # long enough for a machine that is busy with other work


Argument = Tensor | tuple[Tensor, ...] | int | float | None


def call(name: str, dtype: torch.dtype, *args: Argument) -> None:
    """Run the C function `name`. Tensors go as pointers and must be contiguous, tuples of them as arrays of pointers,
    None as a null pointer, whole numbers as int64 and others as double; the thread count is torch's. Raises
    BackendError without a library."""
    function = getattr(library(), name)
    code = {torch.float32: 0, torch.bfloat16: 1}[dtype]
    function(ctypes.c_int64(code), ctypes.c_int64(torch.get_num_threads()), *map(_as_c, args))


def _as_c(value: Argument) -> Any:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, tuple):
        return (ctypes.c_void_p * len(value))(*map(_as_c, value))
    if isinstance(value, Tensor):
        if not value.is_contiguous() or value.device.type != "cpu":
            raise ValueError(f"want a contiguous CPU tensor, got strides {value.stride()} on {value.device}")
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_double(value)


@cache
def library() -> ctypes.CDLL:
    """The library of this machine, built when it is not in the cache. Raises BackendError with what to do."""
    try:
        return ctypes.CDLL(str(build(cache_folder())))
    except OSError as error:
        raise BackendError(f"the compiled CPU kernels cannot be built or loaded: {error}") from error


def cache_folder() -> Path:
    """Where compiled kernels are kept. Raises OSError as `user_cache` does."""
    return user_cache() / "kernels"


def build(folder: Path, extra_flags: tuple[str, ...] = ()) -> Path:
    """Path of the library in `folder`, compiled there unless it exists; two processes at once build it once.

    Raises BackendError when there is no compiler or it fails, OSError when `folder` cannot be written.
    """
    compiler = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    if compiler is None:
        raise BackendError("no C++ compiler: install g++ for the fast CPU kernels, or pass --kernels reference")
    with as_file(files("hypernas.kernels") / "cpu") as sources:
        target = folder / f"kernels-{_fingerprint(sources, compiler, extra_flags)}.so"
        if target.exists():
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "build.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                _compile(compiler, sources, target, extra_flags)
    return target


def _compile(compiler: str, sources: Path, target: Path, extra_flags: tuple[str, ...]) -> None:
    with scratch_folder(target.parent, "build-") as scratch:
        objects = [(source, scratch / f"{source.stem}.o") for source in sorted(sources.glob("*.cpp"))]
        running = [
            subprocess.Popen(
                [compiler, *FLAGS, *extra_flags, "-c", str(source), "-o", str(out)],
                stderr=subprocess.PIPE,
                text=True,
            )
            for source, out in objects
        ]
        for process in running:
            _require_success(compiler, process)
        library_file = scratch / "kernels.so"
        link = [compiler, *LINK_FLAGS, *extra_flags, *(str(out) for _, out in objects), "-o", str(library_file)]
        linking = subprocess.Popen(link, stderr=subprocess.PIPE, text=True)
        _require_success(compiler, linking)
        library_file.replace(target)  # atomic: a reader sees the whole library or none


def _require_success(compiler: str, process: "subprocess.Popen[str]") -> None:
    try:
        _, errors = process.communicate(timeout=BUILD_SECONDS)
    except subprocess.TimeoutExpired as error:
        process.kill()
        raise BackendError(f"{compiler} took over {BUILD_SECONDS} s on the CPU kernels") from error
    if process.returncode:
        lines = [line for line in errors.splitlines() if "error" in line] or errors.splitlines() or ["no message"]
        raise BackendError(f"{compiler} cannot compile the CPU kernels: {lines[0]}")


def _fingerprint(sources: Path, compiler: str, extra_flags: tuple[str, ...]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = [version, processor.cpu_flags(), *FLAGS, *LINK_FLAGS, *extra_flags]
    parts += [source.name + source.read_text() for source in sorted(sources.iterdir()) if source.is_file()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
