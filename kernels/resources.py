"""What the Triton kernels need of a GPU, read from code compiled for it without having one.

`python -m kernels.resources` prints the table of docs/kernels.md: for each shipped kernel, shape and target the
registers, spills and shared memory, and how many of its global loads are 128 bits wide. Launches are taken from the ops
themselves, so what is compiled is what would run. Needs a process in which TRITON_INTERPRET is not set.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import (
    _dispatch,
    cosine_gate,
    narrow_mlp,
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
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float64: "*fp64"}


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel as an op launches it."""

    kernel: str
    shape: str
    function: Any
    signature: dict[str, str | tuple[str, ...]]
    constants: dict[str, Any]
    options: dict[str, int]  # num_warps, num_stages


@dataclass(frozen=True, slots=True)
class Resources:
    kernel: str
    shape: str
    target: str
    registers: int
    spills: int  # spilled registers (AMD) or spill instructions (NVIDIA)
    shared: int  # bytes
    wide_loads: int  # global loads of 128 bits
    loads: int


class _Recorder:
    """Stands in for a kernel: notes what it would be launched with."""

    def __init__(self, function: Any, shape: str, launches: list[Launch]):
        self.function, self.shape, self.launches = function, shape, launches

    def __getitem__(self, grid: tuple[int, ...]) -> "_Recorder":
        return self

    def __call__(self, *args: Any, **keywords: Any) -> None:
        options: dict[str, int] = {name: keywords.pop(name) for name in ("num_warps", "num_stages") if name in keywords}
        constants = keywords
        names = self.function.arg_names
        given = dict(zip(names, args, strict=False)) | constants
        signature = {name: _type_of(given[name], name in constants) for name in names}
        fixed = {name: given[name] for name in names if signature[name] == "constexpr"}
        inner = self.function.fn
        name = inner.__module__.removeprefix("kernels.") + inner.__name__.removesuffix("_kernel")
        self.launches.append(Launch(name, self.shape, self.function, signature, fixed, options))


def _type_of(value: Any, constant: bool) -> Any:
    if constant or value is None:
        return "constexpr"
    if isinstance(value, tuple):
        return tuple(_type_of(part, constant) for part in value)
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"


@contextmanager
def _recording(module: ModuleType, shape: str, launches: list[Launch]) -> Iterator[None]:
    kernels = {name: value for name, value in vars(module).items() if name.endswith("_kernel")}
    try:
        for name, kernel in kernels.items():
            setattr(module, name, _Recorder(kernel, shape, launches))
        yield
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)


def shipped_launches(dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """Every kernel at the shapes that docs/kernels.md lists."""
    cpu, launches = torch.device("cpu"), list[Launch]()
    cases: list[tuple[ModuleType, _dispatch.Op, str, tuple[Any, ...]]] = []
    for n in (1, 2, 4, 8):
        boundary = stream_boundary.example_arguments(64, n, 256, dtype, cpu)
        cases.append((stream_boundary, stream_boundary.STREAM_BOUNDARY, f"n={n} C=256", boundary))
    for n in (2, 4, 8):
        chain = stream_chain.example_arguments(64, n, 256, 4, dtype, cpu)
        cases.append((stream_chain, stream_chain.STREAM_CHAIN, f"n={n} C=256 L=4", chain))
    for n in (3, 4, 9):
        mix = stream_mix.example_arguments(64, n, 256, dtype, cpu)
        cases.append((stream_mix, stream_mix.STREAM_MIX, f"n={n} C=256", mix))
    for n in (2, 4, 8):
        read = stream_read.example_arguments(64, n, 256, dtype, cpu)
        cases.append((stream_read, stream_read.STREAM_READ, f"n={n} C=256 m={len(read[2])}", read))
    for n in (4, 8):
        logits = sinkhorn.example_arguments(64, n, torch.float32, cpu)
        cases.append((sinkhorn, sinkhorn.SINKHORN, f"n={n}", logits))
    for module, op in (
        (rms_norm, rms_norm.RMS_NORM),
        (swiglu, swiglu.SWIGLU),
        (cosine_gate, cosine_gate.COSINE_GATE),
    ):
        cases.append((module, op, "C=256", module.example_arguments(64, 256, dtype, cpu)))
    for H in (64, 128, 256):
        mlp = narrow_mlp.example_arguments(64, 512, H, dtype, cpu)
        cases.append((narrow_mlp, narrow_mlp.NARROW_MLP, f"D=512 H={H}", mlp))
    modules = (
        stream_boundary,
        stream_chain,
        stream_mix,
        stream_read,
        sinkhorn,
        rms_norm,
        swiglu,
        cosine_gate,
        narrow_mlp,
    )
    for module, op, shape, arguments in cases:
        own: list[Launch] = []
        with _all_recording(modules, shape, own), _dispatch.forcing("triton"):
            _dispatch.outputs_and_gradients(op.function, arguments)
        launches += [launch for launch in own if launch.kernel.startswith(module.__name__.removeprefix("kernels."))]
    return launches


@contextmanager
def _all_recording(modules: tuple[ModuleType, ...], shape: str, launches: list[Launch]) -> Iterator[None]:
    if not modules:
        yield
        return
    with _recording(modules[0], shape, launches), _all_recording(modules[1:], shape, launches):
        yield


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
        constexprs=launch.constants,
        attrs={pointer: [["tt.divisibility", 16]] for pointer in pointers},
    )
    compiled = triton.compile(source, target=TARGETS[target], options=launch.options | {"enable_fp_fusion": True})
    numbers = _nvidia(compiled) if target.startswith("sm_") else _amd(compiled)
    return Resources(launch.kernel, launch.shape, target, shared=compiled.metadata.shared, **numbers)


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
    """Markdown: a kernel and shape a line, `registers / spills / shared KiB / wide loads of all` for each target."""
    targets = list(dict.fromkeys(row.target for row in rows))
    lines = ["| kernel | shape | " + " | ".join(targets) + " |", "|---|---|" + "---|" * len(targets)]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        text = f"{row.registers} / {row.spills} / {row.shared / 1024:.0f} / {row.wide_loads} of {row.loads}"
        cells.setdefault((row.kernel, row.shape), {})[row.target] = text
    for (kernel, shape), by_target in cells.items():
        lines.append(f"| {kernel} | {shape} | " + " | ".join(by_target[target] for target in targets) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([compile_for(launch, target) for launch in shipped_launches() for target in TARGETS]))
