"""Which back end computes an op: the process-wide setting, the choice for one call, and its record.

Three back ends: `reference` (eager PyTorch, the definition), `triton` (GPU) and `cpu` (compiled C++). `auto` takes
the fast one of the tensor's device and falls back on the reference where that one cannot run, with the reason kept
in `list_choices()`. A fast back end is compared with the float64 reference, outputs and gradients, before its first
use in a process; one that disagrees is not used. Nothing is logged but one warning when a back end that should work
does not.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "triton", "cpu")
# Norm-wise relative error that a correct kernel stays under; bf16 rounds inputs and outputs at 2^-9 each.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1e-2}


class BackendError(RuntimeError):
    """A back end was asked for that this machine cannot run, or whose results are wrong."""


@dataclass(frozen=True, slots=True)
class Choice:
    backend: str
    reason: str


@dataclass(frozen=True, slots=True)
class Op:
    """What the dispatcher knows of one op.

    `function` is the public function, `reference` its definition with the same signature; `example(dtype, device)`
    returns small arguments for both, of awkward sizes; `backends` names the fast back ends that exist.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    example: Callable[[torch.dtype, torch.device], tuple[Any, ...]]
    backends: tuple[str, ...]

    def backend_for(self, device: str, dtype: torch.dtype) -> str:
        """What `choose` answers. A method, since torch.compile takes no frozen dataclass as a constant's argument."""
        return choose(self, device, dtype)

    # torch.compiler.assume_constant_result sets the same mark, but imports the compiler: two seconds a process.
    backend_for._dynamo_marked_constant = True  # type: ignore[attr-defined]


_requested = "auto"
_chosen: dict[str, dict[tuple[str, torch.dtype], Choice]] = {}
_cache: dict[tuple[str, str, str, torch.dtype], Choice] = {}
_testing: str | None = None  # the back end under self-test: taken without asking


def set_backend(name: str) -> None:
    """Fix the back end of every op in this process: `auto`, `reference`, `triton` or `cpu`. Raises ValueError."""
    global _requested
    if name not in BACKENDS:
        raise ValueError(f"kernels={name!s}: wanted one of {', '.join(BACKENDS)}")
    _requested = name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`set_backend(name)` inside a `with` block; the setting before it comes back afterwards."""
    before = _requested
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def list_choices() -> Mapping[str, Choice]:
    """What ran for each op since `forget_choices`, keyed `op` or, where calls differed, `op[device,dtype]`."""
    rows: dict[str, Choice] = {}
    for op, choices in sorted(_chosen.items()):
        if len(set(choices.values())) == 1:
            rows[op] = next(iter(choices.values()))
        else:
            rows |= {f"{op}[{device},{str(dtype).removeprefix('torch.')}]": c for (device, dtype), c in choices.items()}
    return rows


def forget_choices() -> None:
    """Start a new record, for the next trial of a warm worker."""
    _chosen.clear()


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose(op: Op, device: str, dtype: torch.dtype) -> str:
    """The back end for a call of `op` on tensors of this device type and dtype; `torch.compile` burns it in.

    Raises BackendError when a back end was forced that this device or machine cannot run.
    """
    if _testing is not None:
        return _testing
    key = (_requested, op.name, device, dtype)
    choice = _cache.get(key)
    if choice is None:
        choice = _cache[key] = _decide(op, device, dtype)
    _chosen.setdefault(op.name, {})[device, dtype] = choice
    return choice.backend


def _decide(op: Op, device: str, dtype: torch.dtype) -> Choice:
    forced = _requested != "auto"
    if _requested == "reference":
        return Choice("reference", "asked for")
    backend = _requested if forced else {"cpu": "cpu", "cuda": "triton"}.get(device)
    if backend is None:
        return Choice("reference", f"no fast back end for {device} tensors")
    wanted_device = "cpu" if backend == "cpu" or interpreting() else "cuda"
    if device != wanted_device and device != "meta":
        raise BackendError(f"kernels={backend} runs on {wanted_device} tensors, got {device}: use auto or reference")
    if device == "meta":
        return Choice("reference", "meta tensors hold no data")
    if backend not in op.backends:
        return Choice("reference", f"no {backend} version of {op.name}")
    if dtype not in TOLERANCE or (dtype is torch.float64 and not (backend == "triton" and interpreting())):
        return Choice("reference", f"{backend} computes float32 and bfloat16, got {str(dtype).removeprefix('torch.')}")
    try:
        self_test(op, backend, dtype, torch.device(device))
    except BackendError as error:
        if forced:
            raise
        warnings.warn(f"{op.name} runs on the reference back end: {error}", stacklevel=2)
        return Choice("reference", str(error))
    return Choice(backend, "asked for" if forced else f"the fast back end for {device} tensors")


def self_test(op: Op, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """Compare `backend` with the float64 reference on the op's example. Raises BackendError naming what is off, or what
    the back end's compiler or its launch raised."""
    # In a thread of its own, which starts without the caller's inference mode, autocast and tracing.
    try:
        with ThreadPoolExecutor(1) as pool:
            errors = pool.submit(lambda: relative_errors(op, op.example(dtype, device), backend)).result()
    except (BackendError, torch.OutOfMemoryError):  # memory that ran out says nothing of the kernel
        raise
    except Exception as error:  # compilers raise what they like, and a trial can do without a kernel
        lines = str(error).strip().splitlines()
        said = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        raise BackendError(f"{backend} cannot run {op.name} in {str(dtype).removeprefix('torch.')}: {said}") from error
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE[dtype]}
    if wrong:
        listed = ", ".join(f"{name} {error:.1e}" for name, error in wrong.items())
        raise BackendError(
            f"{backend} differs from the float64 definition of {op.name} in {str(dtype).removeprefix('torch.')}"
            f" (relative error: {listed}; allowed {TOLERANCE[dtype]:.0e})"
        )


@contextmanager
def forcing(backend: str) -> Iterator[None]:
    """Every op on `backend` inside the block, unasked and untested: for self-tests and whoever studies a back end."""
    global _testing
    before, _testing = _testing, backend
    try:
        yield
    finally:
        _testing = before


def relative_errors(op: Op, args: tuple[Any, ...], backend: str) -> dict[str, float]:
    """Error of `backend` against the reference in float64, for each output and each gradient of `args`.

    Norm of the difference over norm of the wanted tensor; NaN counts as infinite. The gradients answer to fixed
    random cotangents, so every output takes part.
    """
    with forcing(backend):
        got = outputs_and_gradients(op.function, args)
    double = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    want = outputs_and_gradients(op.reference, double)
    return {name: _relative_error(got[name], want[name]) for name in want}


def outputs_and_gradients(function: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Tensor]:
    """`{"output 0": ..., "gradient 0": ...}` of `function(*args)`; gradients by position in `args`."""
    with torch.enable_grad():
        leaves = [a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        raw = function(*leaves)
        outputs = [o for o in (raw if isinstance(raw, tuple) else (raw,)) if o is not None]
        live = [o for o in outputs if o.requires_grad]
        generator = torch.Generator().manual_seed(0)
        cotangents = [torch.randn(o.shape, generator=generator).bfloat16().to(o) for o in live]
        wanted = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad]
        gradients = iter(torch.autograd.grad(live, wanted, cotangents, allow_unused=True)) if live else iter(())
    result = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    for i, leaf in enumerate(leaves):
        if live and isinstance(leaf, Tensor) and leaf.requires_grad:
            gradient = next(gradients)
            result[f"gradient {i}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return result


def _relative_error(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    got, want = got.double(), want.double()
    error = (got - want).norm() / want.norm().clamp_min(1e-30)
    return 0.0 if torch.equal(got, want) else (float(error) if torch.isfinite(error) else float("inf"))
