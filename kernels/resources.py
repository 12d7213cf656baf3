"""What the Triton kernels need of a GPU, read from code compiled for it without having one.

`python -m hypernas.kernels.resources` prints the table of docs/kernels.md: for each shipped kernel, dtype, shape and
target the registers, spills and shared memory, and how many of its global loads are 128 bits wide. Launches are taken
from the ops themselves, so what is compiled is what would run. Needs a process in which TRITON_INTERPRET is not set.
Training launches nothing that the table lacks: float32 streams, norms and gates, bfloat16 between matrix products
(tests/kernels/test_resources.py records what it launches).
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hypernas.kernels import (
    OPS,
    cosine_gate,
    dispatch,
    rms_norm,
    sinkhorn,
    stream_boundary,
    stream_chain,
    stream_mix,
    stream_read,
    swiglu,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory a block may use, in bytes: A100, H100, B200, MI300.
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
MODULES = tuple(import_module(f"hypernas.kernels.{name}") for name in OPS)
# ptxas gives up a register or two of its own accord where one more block fits on a multiprocessor then: so many
# instructions, out of about a thousand.
SPILLS_ALLOWED = 4
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float64: "*fp64"}


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel as an op launches it."""

    kernel: str
    dtype: torch.dtype
    shape: str
    function: Any
    signature: dict[str, str | tuple[str, ...]]
    constants: dict[str, Any]
    options: dict[str, int]  # num_warps, num_stages


@dataclass(frozen=True, slots=True)
class Resources:
    kernel: str
    dtype: torch.dtype
    shape: str
    target: str
    registers: int
    spills: int  # spilled registers (AMD) or spill instructions (NVIDIA)
    shared: int  # bytes
    wide_loads: int  # global loads of 128 bits
    loads: int


@dataclass(frozen=True, slots=True)
class Case:
    """An op's call whose kernels the table holds."""

    op: dispatch.Op
    dtype: torch.dtype
    shape: str
    arguments: tuple[Any, ...]


class _Recorder:
    """Stands in for a kernel: records what it would be launched with."""

    def __init__(self, function: Any, case: Case, launches: list[Launch]):
        self.function, self.case, self.launches = function, case, launches

    def __getitem__(self, grid: tuple[int, ...]) -> "_Recorder":
        return self

    def __call__(self, *args: Any, **keywords: Any) -> None:
        options: dict[str, int] = {name: keywords.pop(name) for name in ("num_warps", "num_stages") if name in keywords}
        constants = keywords
        names = self.function.arg_names
        given = dict(zip(names, args, strict=False)) | constants
        signature = {name: _type_of(given[name], name in constants) for name in names}
        fixed = {name: given[name] for name in names if signature[name] == "constexpr"}
        name = self.function.fn.__name__.removesuffix("_kernel")
        case = self.case
        self.launches.append(Launch(name, case.dtype, case.shape, self.function, signature, fixed, options))


def _type_of(value: Any, constant: bool) -> Any:
    if constant or value is None:
        return "constexpr"
    if isinstance(value, tuple):
        return tuple(_type_of(part, constant) for part in value)
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"


@contextmanager
def _recording(case: Case, launches: list[Launch]) -> Iterator[None]:
    """Kernels of every op record their launches in place of running: one op's backward may call another's."""
    kernels = [
        (module, name, value) for module in MODULES for name, value in vars(module).items() if name.endswith("_kernel")
    ]
    try:
        for module, name, kernel in kernels:
            setattr(module, name, _Recorder(kernel, case, launches))
        yield
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


def shipped_cases() -> list[Case]:
    """Every op at the shapes that docs/kernels.md lists, in both dtypes; Sinkhorn's iteration has one."""
    return [case for dtype in (torch.float32, torch.bfloat16) for case in _cases(dtype)]


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    cpu = torch.device("cpu")
    for n in (1, 2, 4, 8):
        boundary = stream_boundary.example_arguments(64, n, 256, dtype, cpu)
        yield Case(stream_boundary.STREAM_BOUNDARY, dtype, f"n={n} C=256", boundary)
        if n == 4:  # a net's first read, before anything was written
            first = (boundary[0], None, None, *boundary[3:])
            yield Case(stream_boundary.STREAM_BOUNDARY, dtype, f"n={n} C=256 first", first)
    for n in (2, 4, 8):
        chain = stream_chain.example_arguments(64, n, 256, 4, dtype, cpu)
        yield Case(stream_chain.STREAM_CHAIN, dtype, f"n={n} C=256 L=4", chain)
    for n in (3, 4, 9):
        mix = stream_mix.example_arguments(64, n, 256, dtype, cpu)
        yield Case(stream_mix.STREAM_MIX, dtype, f"n={n} C=256", mix)
    for n, m in ((1, 6), (2, 8), (4, 24), (8, 80)):  # the first: each stream of hyper-connections for itself
        read = stream_read.example_arguments(64, n, 256, dtype, cpu, m)
        yield Case(stream_read.STREAM_READ, dtype, f"n={n} C=256 m={m}", read)
    if dtype == torch.float32:
        for n in (4, 8):
            yield Case(sinkhorn.SINKHORN, dtype, f"n={n}", sinkhorn.example_arguments(64, n, dtype, cpu))
    yield Case(rms_norm.RMS_NORM, dtype, "C=256", rms_norm.example_arguments(64, 256, dtype, cpu))
    yield Case(swiglu.SWIGLU, dtype, "C=256", swiglu.example_arguments(64, 256, dtype, cpu))
    yield Case(cosine_gate.COSINE_GATE, dtype, "C=256", cosine_gate.example_arguments(64, 256, dtype, cpu))


def launches_of(case: Case) -> list[Launch]:
    """The op's own kernels, forward and backward, as the call launches them."""
    launches: list[Launch] = []
    with _recording(case, launches), dispatch.forcing("triton"):
        dispatch.outputs_and_gradients(case.op.function, case.arguments)
    return [launch for launch in launches if launch.kernel.startswith(case.op.name)]


def shipped_launches() -> list[Launch]:
    """Every kernel of `shipped_cases`."""
    return [launch for case in shipped_cases() for launch in launches_of(case)]


def _exact_on(target: str, constants: dict[str, Any]) -> dict[str, str]:
    """What `long_precision` answers on an AMD GPU, whatever it answered here."""
    return {"PRECISION": "ieee"} if constants.get("PRECISION") == "tf32x3" and not target.startswith("sm_") else {}


def compile_for(launch: Launch, target: str) -> Resources:
    """Compile without a device and read what the code needs."""
    names = launch.function.arg_names
    # torch's allocator aligns to more than 16 bytes; without saying so no load is 128 bits wide.
    pointers: list[tuple[int, ...]] = []
    for index, name in enumerate(names):
        kind = launch.signature[name]
        if isinstance(kind, tuple):
            pointers += [(index, part) for part in range(len(kind))]
        elif kind.startswith("*"):
            pointers.append((index,))
    source = ASTSource(
        fn=launch.function,
        signature=launch.signature,
        constexprs=launch.constants | _exact_on(target, launch.constants),
        attrs={pointer: [["tt.divisibility", 16]] for pointer in pointers},
    )
    compiled = triton.compile(source, target=TARGETS[target], options=launch.options | {"enable_fp_fusion": True})
    numbers = _nvidia(compiled) if target.startswith("sm_") else _amd(compiled)
    return Resources(launch.kernel, launch.dtype, launch.shape, target, shared=compiled.metadata.shared, **numbers)


def _nvidia(compiled: Any) -> dict[str, int]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        listing = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+)", usage.stdout + usage.stderr)
    if found is None:
        raise RuntimeError(f"cuobjdump names no registers: {(usage.stdout + usage.stderr)[:200]}")
    operations = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)", listing.stdout, re.MULTILINE)
    loads = [operation for operation in operations if operation.startswith("LDG")]
    return {
        "registers": int(found[1]),
        "spills": sum(operation.startswith(("LDL", "STL")) for operation in operations),
        "wide_loads": sum(".128" in load for load in loads),
        "loads": len(loads),
    }


def _amd(compiled: Any) -> dict[str, int]:
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    return {
        "registers": field("vgpr_count"),
        "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
        "wide_loads": len(re.findall(r"(?:buffer|global)_load_dwordx4", text)),
        "loads": len(re.findall(r"(?:buffer|global)_load_", text)),
    }


def table(rows: list[Resources]) -> str:
    """Markdown: a kernel, dtype and shape a line, `registers / spills / shared KiB / wide loads of all` a target."""
    targets = list(dict.fromkeys(row.target for row in rows))
    lines = ["| kernel | dtype | shape | " + " | ".join(targets) + " |", "|---|---|---|" + "---|" * len(targets)]
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        text = f"{row.registers} / {row.spills} / {row.shared / 1024:.0f} / {row.wide_loads} of {row.loads}"
        key = (row.kernel, str(row.dtype).removeprefix("torch."), row.shape)
        cells.setdefault(key, {})[row.target] = text
    for key, by_target in cells.items():
        lines.append(f"| {' | '.join(key)} | " + " | ".join(by_target[target] for target in targets) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(f"triton {triton.__version__}\n")
    print(table([compile_for(launch, target) for launch in shipped_launches() for target in TARGETS]))
