"""The Triton kernels under the interpreter. tests/kernels/test_triton.py runs this file in a process of its own,
because TRITON_INTERPRET must be set before triton is imported, and such a process can compile nothing."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parent))
import interpreter

from hypernas.kernels import (
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

interpreter.correct_bfloat16()
CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def without_branch(tokens, n, C, dtype, device):
    X, _, _, phi, bias = stream_boundary.example_arguments(tokens, n, C, dtype, device)
    return X, None, None, phi, bias


CASES = [
    (stream_boundary.STREAM_BOUNDARY, stream_boundary.example_arguments, shape)
    for shape in [(1, 1, 1), (37, 1, 70), (33, 2, 65), (37, 4, 70), (5, 8, 130)]
]
CASES += [(stream_boundary.STREAM_BOUNDARY, without_branch, shape) for shape in [(37, 4, 70), (33, 1, 64)]]
for op, make in (
    (rms_norm.RMS_NORM, rms_norm.example_arguments),
    (swiglu.SWIGLU, swiglu.example_arguments),
    (cosine_gate.COSINE_GATE, cosine_gate.example_arguments),
):
    CASES += [(op, make, shape) for shape in [(1, 2), (37, 70), (65, 257)]]
CASES += [
    (stream_chain.STREAM_CHAIN, stream_chain.example_arguments, shape)
    for shape in [(1, 1, 1, 1), (37, 4, 70, 3), (5, 8, 130, 6)]
]
CASES += [
    (stream_mix.STREAM_MIX, stream_mix.example_arguments, shape) for shape in [(1, 1, 1), (37, 3, 70), (5, 9, 65)]
]
CASES += [
    # The last has more rows than a program takes at once. One stream of one channel has no direction: its gradient is
    # a difference of equals.
    (stream_read.STREAM_READ, stream_read.example_arguments, shape)
    for shape in [(1, 3, 1), (37, 3, 70), (5, 9, 65)]
]
SINKHORN_CASES = [(1, 1, 20), (37, 3, 20), (65, 4, 7), (3, 9, 1)]  # tokens, n, iterations


# In float64, in which formulas agree to the last digits, the largest of each op; what is rounded, at every shape.
AGREE = [(*case, dtype) for case in CASES for dtype in (torch.float32, torch.bfloat16)]
LARGEST = {(op.name, make.__name__): (op, make, shape) for op, make, shape in CASES}
AGREE += [(*case, torch.float64) for case in LARGEST.values()]


@pytest.mark.parametrize("op, make, shape, dtype", AGREE, ids=lambda value: str(getattr(value, "name", value)))
def test_triton_agrees_with_float64(agrees, op, make, shape, dtype):
    agrees(op, make(*shape, dtype, CPU), "triton")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("tokens, n, iterations", SINKHORN_CASES)
def test_sinkhorn_agrees_with_float64(agrees, tokens, n, iterations, dtype):
    agrees(sinkhorn.SINKHORN, (*sinkhorn.example_arguments(tokens, n, dtype, CPU), iterations), "triton")


class OffByLittle:
    """A kernel whose result is 1e-4 too large, as a compiler's fault might make it."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(x, out, *rest, **tile):
            self.kernel[grid](x, out, *rest, **tile)
            out.mul_(1.0001)

        return launch


def test_where_a_gpus_kernel_is_wrong_the_reference_runs_and_the_record_says_so(monkeypatch):
    # As on a GPU, but for where the example lies: the interpreter takes tensors of the CPU.
    op = replace(swiglu.SWIGLU, name="as_on_a_gpu", example=lambda dtype, device: swiglu.SWIGLU.example(dtype, CPU))
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    assert dispatch.choose(op, "cuda", torch.float32) == "triton"
    monkeypatch.setattr(swiglu, "swiglu_forward_kernel", OffByLittle(swiglu.swiglu_forward_kernel))
    wrong = replace(op, name="wrong_on_a_gpu")
    with pytest.warns(UserWarning, match="wrong_on_a_gpu runs on the reference back end: triton differs"):
        assert dispatch.choose(wrong, "cuda", torch.float32) == "reference"
    assert "output 0 1.0e-04" in dispatch.list_choices()["wrong_on_a_gpu"].reason


@pytest.mark.parametrize("n, C", [(1, 256), (4, 256), (8, 128)])
def test_stream_boundary_moves_the_bytes_of_its_formula_without_races_or_stray_accesses(n, C):
    T, size = 64, 2
    inputs = stream_boundary.example_arguments(T, n, C, torch.bfloat16, CPU)
    m = len(inputs[4])
    weights = m * n * C * size + m * 4
    with interpreter.tracing() as trace:
        streams, u, following, z, r = torch.ops.hypernas.stream_boundary(*inputs, 1e-6, "triton")
    assert trace.out_of_bounds == [] and trace.races == []
    numbers = 2 * n + 2 * n + m + 1  # float32 a token
    assert trace.bytes_moved() <= 1.1 * (T * ((2 * n + 2) * C * size + 4 * numbers) + weights)

    with interpreter.tracing() as trace:
        torch.ops.hypernas.stream_boundary_backward(streams, u, following, *inputs, z, r, "triton")
    assert trace.out_of_bounds == [] and trace.races == []
    numbers = 2 * n + 2 * n + 2 * n + m + 1 + 2 * m  # the last: weights of the projection's gradient, written and read
    projection = m * n * C * 4
    # The projection's gradient reads X and y a second time; a byte read twice counts once.
    assert trace.bytes_moved() <= 1.1 * (T * ((3 * n + 3) * C * size + 4 * numbers) + weights + projection)


@pytest.mark.parametrize(
    "module, forward_elements, backward_elements",
    [(rms_norm, 2, 3), (swiglu, 3, 5), (cosine_gate, 3, 5)],
    ids=["rms_norm", "swiglu", "cosine_gate"],
)
def test_row_kernels_move_the_bytes_of_their_formulas_without_races_or_stray_accesses(
    module, forward_elements, backward_elements
):
    T, C, size = 64, 200, 2
    name = module.__name__.removeprefix("hypernas.kernels.")
    inputs = module.example_arguments(T, C, torch.bfloat16, CPU)
    options = (1e-6, "triton") if module is rms_norm else ("triton",)
    small = T * 8 * 4 + 6 * C * 4  # numbers a token; a weight, and its sums of each program
    with interpreter.tracing() as trace:
        out = getattr(torch.ops.hypernas, name)(*inputs, *options)
    assert trace.out_of_bounds == [] and trace.races == []
    assert trace.bytes_moved() <= 1.1 * (T * forward_elements * C * size + small)

    given = (*out[:3], *inputs, out[3]) if module is cosine_gate else (out, *inputs)
    with interpreter.tracing() as trace:
        getattr(torch.ops.hypernas, f"{name}_backward")(*given, *options)
    assert trace.out_of_bounds == [] and trace.races == []
    assert trace.bytes_moved() <= 1.1 * (T * backward_elements * C * size + small)


def test_stream_chain_moves_the_bytes_of_its_formula_without_races_or_stray_accesses():
    T, n, C, layers, size = 40, 4, 200, 3, 2
    X, *pairs = stream_chain.example_arguments(T, n, C, layers, torch.bfloat16, CPU)
    with interpreter.tracing() as trace:
        torch.ops.hypernas.stream_chain(X, pairs[::2], pairs[1::2], "triton")
    assert trace.out_of_bounds == [] and trace.races == []
    moved = T * (n + layers * (n + 1)) * C * size + T * layers * 2 * n * 4
    assert trace.bytes_moved() == moved


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, n, C, layers", [(1, 2, 1, 1), (37, 4, 70, 2), (5, 8, 130, 3)])
def test_recomputed_streams_have_the_bits_that_were_written_forward(tokens, n, C, layers, dtype):
    X, *pairs = stream_chain.example_arguments(tokens, n, C, layers, dtype, CPU)
    phi, bias = stream_boundary.example_arguments(tokens, n, C, dtype, CPU)[3:]
    with dispatch.use_backend("triton"):
        recomputed = stream_chain.stream_chain(X, pairs[::2], pairs[1::2])
        for y, coefficients, streams in zip(pairs[::2], pairs[1::2], recomputed, strict=True):
            X = stream_boundary.stream_boundary(X, y, coefficients, phi, bias)[0]
            assert torch.equal(X, streams)


def test_stream_mix_moves_the_bytes_of_its_formula_without_races_or_stray_accesses():
    T, n, C, size = 40, 3, 200, 2
    inputs = stream_mix.example_arguments(T, n, C, torch.bfloat16, CPU)
    with interpreter.tracing() as trace:
        out = torch.ops.hypernas.stream_mix(*inputs, "triton")
    assert trace.out_of_bounds == [] and trace.races == []
    coefficients = T * (n * n + n) * 4
    assert trace.bytes_moved() <= 1.1 * (T * (2 * n + 1) * C * size + coefficients)
    with interpreter.tracing() as trace:
        torch.ops.hypernas.stream_mix_backward(out, *inputs, "triton")
    assert trace.out_of_bounds == [] and trace.races == []
    assert trace.bytes_moved() <= 1.1 * (T * (3 * n + 2) * C * size + 2 * coefficients)


def test_stream_read_moves_the_bytes_of_its_formula_without_races_or_stray_accesses():
    T, n, C, size = 64, 4, 200, 2
    inputs = stream_read.example_arguments(T, n, C, torch.bfloat16, CPU)
    m = len(inputs[2])
    weights = m * n * C * size + m * 4
    with interpreter.tracing() as trace:
        u, logits, z, r = torch.ops.hypernas.stream_read(*inputs, 1e-6, "triton")
    assert trace.out_of_bounds == [] and trace.races == []
    assert trace.bytes_moved() <= 1.1 * (T * ((n + 1) * C * size + 4 * (2 * m + 1)) + weights)
    with interpreter.tracing() as trace:
        torch.ops.hypernas.stream_read_backward(u, logits, *inputs, logits, z, r, "triton")
    assert trace.out_of_bounds == [] and trace.races == []
    numbers = 3 * m + 1 + 2 * m  # the last: weights of the projection's gradient, written and read
    assert trace.bytes_moved() <= 1.1 * (T * ((2 * n + 1) * C * size + 4 * numbers) + weights + m * n * C * 4)


def test_sinkhorn_moves_the_bytes_of_its_formula_without_races_or_stray_accesses():
    T, n = 70, 3
    (logits,) = sinkhorn.example_arguments(T, n, torch.float32, CPU)
    with interpreter.tracing() as trace:
        out = torch.ops.hypernas.sinkhorn(logits, 5, "triton")
    assert trace.out_of_bounds == [] and trace.races == []
    assert trace.bytes_moved() == T * 2 * n * n * 4
    with interpreter.tracing() as trace:
        torch.ops.hypernas.sinkhorn_backward(out, logits, 5, "triton")
    assert trace.out_of_bounds == [] and trace.races == []
    assert trace.bytes_moved() == T * 3 * n * n * 4


@triton.jit
def _no_mask(X, OUT, N, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(OUT + i, tl.load(X + i), mask=i < N)


@triton.jit
def _shared_store(X, OUT, N, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(OUT + tl.arange(0, B), tl.load(X + i, mask=i < N, other=0.0))


@triton.jit
def _reads_a_neighbour(X, OUT, N, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(OUT + i, tl.load(X + i, mask=i < N, other=0.0), mask=i < N)
    tl.store(X + i, tl.load(OUT + i - 1, mask=(i > 0) & (i < N), other=0.0), mask=i < N)


@triton.jit
def _reads_twice_as_much(X, OUT, N, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    extra = tl.load(OUT + i, mask=i < N, other=0.0)
    tl.store(OUT + i, tl.load(X + i, mask=i < N, other=0.0) + 0.0 * extra, mask=i < N)


@pytest.mark.parametrize(
    "kernel, bug",
    [
        (_no_mask, "out of bounds"),
        (_shared_store, "race"),
        (_reads_a_neighbour, "race"),
        (_reads_twice_as_much, "bytes"),
    ],
    ids=["no mask", "shared store", "reads a neighbour", "reads too much"],
)
def test_planted_bugs_are_caught(kernel, bug):
    space = torch.zeros(128)  # so that the bug reads memory that exists
    x, out = space[:100], torch.zeros(100)
    with interpreter.tracing() as trace:
        kernel[(2,)](x, out, 100, B=64)
    found = {
        "out of bounds": bool(trace.out_of_bounds),
        "race": bool(trace.races),
        "bytes": trace.bytes_moved() > 1.1 * 2 * 100 * 4,
    }
    assert found[bug]


def test_corrected_bfloat16_rounds_as_torch_does():
    values = torch.randn(1000)
    rounded = torch.from_numpy(interpreter._widen(interpreter._round_to_bfloat16(values.numpy())))
    assert torch.equal(rounded, values.bfloat16().float())
