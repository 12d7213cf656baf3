"""Triton, where it is installed; elsewhere stand-ins under which kernels can be defined but not launched."""

from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton exists for Linux only

    class _Language:
        """Stands for annotations and decorators that name parts of triton.language."""

        def __getattr__(self, name: str) -> Any:
            return self

    class _Triton:
        @staticmethod
        def jit(function: Any) -> Any:
            return function

    triton, tl = _Triton(), _Language()

__all__ = ["accumulator", "blocks", "long_precision", "precision", "row_tile", "tl", "triton"]


def accumulator(dtype: torch.dtype) -> Any:
    """What a kernel sums in: float32, or float64 for float64 tensors (under the interpreter)."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def precision(dtype: torch.dtype) -> str:
    """`input_precision` of a tl.dot over few terms: exact for float32 (tf32 keeps 10 bits); bfloat16 ignores it."""
    return "ieee" if dtype != torch.bfloat16 else "tf32"


def long_precision(dtype: torch.dtype) -> str:
    """`precision` of a tl.dot over a whole row: for float32 three products of tf32, as exact (4e-7 on an H100) and done
    by an NVIDIA GPU's matrix units. Over few terms they cost more than they save."""
    return "tf32x3" if dtype == torch.float32 and not torch.version.hip else precision(dtype)


def blocks(total: int, size: int) -> int:
    """Programs needed to cover `total` items by `size`."""
    return -(-total // size)


def row_tile(C: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile of a kernel that holds whole rows of C elements: 4096 elements, 2 KiB a warp, or one longer row."""
    width = 1 << max(C - 1, 15).bit_length()
    return {"BT": max(1, 4096 // width), "BC": width, "num_warps": 16 if width > 4096 else 2 * dtype.itemsize}
