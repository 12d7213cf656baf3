"""Triton's interpreter made fit to test with: bfloat16 that rounds, and a trace of every memory access.

Import before any kernel runs, in a process started with TRITON_INTERPRET=1. The interpreter keeps bfloat16 as 16-bit
integers and then multiplies, sums and truncates the bit patterns; `correct_bfloat16` converts where it should. `Trace`
sees each load and store with its addresses, which tells bytes moved, accesses out of bounds and races.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder


def _round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bit patterns, to nearest with ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(
        np.uint16
    )
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(np.shape(values))


def _widen(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(np.shape(bits))


def correct_bfloat16() -> None:
    """Patch the interpreter's conversions, tl.dot and tl.sum for bfloat16. Call once a process."""
    cast, dot, total, fp_to_fp = (
        Builder.cast_impl,
        Builder.create_dot,
        interpreter.ReduceOps.sum,
        Builder.create_fp_to_fp,
    )

    def cast_impl(self, source, to):
        have, want = source.dtype.scalar, to.scalar
        if have == tl.bfloat16 and want in (tl.float32, tl.float64):
            return interpreter.TensorHandle(_widen(source.data).astype(interpreter._get_np_dtype(to)), want)
        if want == tl.bfloat16 and have in (tl.float32, tl.float64):
            return interpreter.TensorHandle(_round_to_bfloat16(source.data.astype(np.float32)), want)
        return cast(self, source, to)

    def create_fp_to_fp(self, source, to, rounding):
        if tl.bfloat16 in (source.dtype.scalar, to.scalar):
            return cast_impl(self, source, to)
        return fp_to_fp(self, source, to, rounding)

    def create_dot(self, a, b, *rest):
        def wide(h):
            return interpreter.TensorHandle(_widen(h.data), tl.float32) if h.dtype.scalar == tl.bfloat16 else h

        return dot(self, wide(a), wide(b), *rest)

    def reduce_sum(self, handle):
        if handle.dtype.scalar == tl.bfloat16:
            raise TypeError("tl.sum of bfloat16 sums bit patterns here: cast to float32 first")
        return total(self, handle)

    for name in ("create_si_to_fp", "create_fp_ext", "create_fp_trunc", "cast_impl"):
        setattr(Builder, name, cast_impl)
    Builder.create_fp_to_fp, Builder.create_dot, interpreter.ReduceOps.sum = create_fp_to_fp, create_dot, reduce_sum


@dataclass
class Trace:
    """Accesses to the tensors that kernels were launched with: bytes touched at least once, and what went wrong."""

    tensors: dict[int, torch.Tensor] = field(default_factory=dict)  # by address; held, so that none is used twice
    read: dict[int, np.ndarray] = field(default_factory=dict)  # per byte: was it read, was it written
    written: dict[int, np.ndarray] = field(default_factory=dict)
    owner: dict[int, np.ndarray] = field(default_factory=dict)  # which program wrote the byte, -1 for none
    out_of_bounds: list[str] = field(default_factory=list)
    races: list[str] = field(default_factory=list)

    def add(self, tensor: torch.Tensor) -> None:
        address, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        if address not in self.tensors:
            self.tensors[address] = tensor
            self.read[address], self.written[address] = np.zeros(size, bool), np.zeros(size, bool)
        self.owner[address] = np.full(size, -1, np.int64)  # a launch starts when the one before has ended

    def bytes_moved(self) -> int:
        return int(sum(seen.sum() for table in (self.read, self.written) for seen in table.values()))

    def record(self, kind: str, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        addresses = pointers[np.broadcast_to(mask, pointers.shape)].ravel().astype(np.int64)
        program = interpreter.interpreter_builder.grid_idx
        number = hash(program) & 0x7FFFFFFF
        known = np.zeros(addresses.size, bool)
        for name, tensor in self.tensors.items():
            start, end = name, name + tensor.numel() * tensor.element_size()
            ours = (addresses >= start) & (addresses + size <= end)
            known |= ours
            at = addresses[ours] - start
            owners = self.owner[name][at]
            if kind == "load":
                for byte in range(size):
                    self.read[name][at + byte] = True
                if ((owners != -1) & (owners != number)).any():
                    self.races.append(
                        f"program {program} reads what another wrote in a tensor of {tuple(tensor.shape)}"
                    )
                continue
            if ((owners != -1) & (owners != number)).any() or np.unique(at).size != at.size:
                self.races.append(f"program {program} and another store to one address of {tuple(tensor.shape)}")
            for byte in range(size):
                self.written[name][at + byte] = True
            self.owner[name][at] = number
        if not known.all():
            self.out_of_bounds.append(f"program {program}: {int((~known).sum())} {kind}s outside every tensor")


@contextmanager
def tracing() -> Iterator[Trace]:
    """Trace every kernel launched inside the block; an address in none of its tensors counts as out of bounds."""
    trace = Trace()
    load, store, launch = Builder.create_masked_load, Builder.create_masked_store, interpreter.GridExecutor.__call__

    def size_of(pointers) -> int:
        return interpreter._get_np_dtype(pointers.get_element_ty()).itemsize

    def traced_load(self, pointers, mask, *rest):
        trace.record("load", pointers.data, mask.data, size_of(pointers))
        return load(self, pointers, mask, *rest)

    def traced_store(self, pointers, value, mask, *rest):
        trace.record("store", pointers.data, mask.data, size_of(pointers))
        return store(self, pointers, value, mask, *rest)

    def traced_launch(self, *arguments, **keywords):
        for argument in arguments:
            for tensor in argument if isinstance(argument, tuple) else (argument,):
                if isinstance(tensor, torch.Tensor):
                    trace.add(tensor)
        return launch(self, *arguments, **keywords)

    Builder.create_masked_load, Builder.create_masked_store = traced_load, traced_store
    interpreter.GridExecutor.__call__ = traced_launch
    try:
        yield trace
    finally:
        Builder.create_masked_load, Builder.create_masked_store = load, store
        interpreter.GridExecutor.__call__ = launch
