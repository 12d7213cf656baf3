import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

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

ROOT = Path(__file__).parents[2]


def test_kernels_are_right_tight_and_race_free_under_the_interpreter():
    """Everything in interpreted.py, in a process where Triton interprets."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            str(Path(__file__).with_name("interpreted.py")),
        ],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


ABSENT = ("sqlalchemy", "alembic", "ray", "optuna", "plotly", "dash", "click", "rich", "moocore", "psutil", "PIL",
          "pytest_timeout", "mlxtend", "psycopg")  # fmt: skip
COLLECT = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ImportError(name + " is not installed here")
sys.meta_path.insert(0, Absent())
import pytest
sys.exit(pytest.main("-q -o addopts= -p no:cacheprovider -m gpu --collect-only tests/kernels".split()))
"""


def test_kernels_are_tested_on_a_machine_without_database_ray_or_optuna():
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COLLECT], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "test_triton_agrees_with_float64_on_the_gpu[stream_boundary-4-256-float32]" in done.stdout


# Each case is a test, so that workers share the compiling.
F32, BF16 = torch.float32, torch.bfloat16
CUDA = torch.device("cuda")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def first_read(tokens, n, C, dtype, device):
    """stream_boundary before anything was written."""
    X, _, _, phi, bias = stream_boundary.example_arguments(tokens, n, C, dtype, device)
    return X, None, None, phi, bias


def read_of(tokens, n, C, m, dtype, device):
    return stream_read.example_arguments(tokens, n, C, dtype, device, m)


def shapes() -> Iterator[tuple[dispatch.Op, Callable[..., tuple], tuple[int, ...], torch.dtype]]:
    """(op, what makes its arguments, (n, C, ...) without tokens, dtype)."""
    for dtype in (F32, BF16):
        for n in (1, 2, 4, 8):
            for C in (65, 256, 1024):
                yield stream_boundary.STREAM_BOUNDARY, stream_boundary.example_arguments, (n, C), dtype
                yield stream_chain.STREAM_CHAIN, stream_chain.example_arguments, (n, C, 4), dtype
        yield stream_boundary.STREAM_BOUNDARY, stream_boundary.example_arguments, (16, 65), dtype
        yield stream_boundary.STREAM_BOUNDARY, first_read, (4, 256), dtype
        yield stream_boundary.STREAM_BOUNDARY, first_read, (2, 65), dtype
        for n, C in [*((n, 256) for n in range(1, 10)), (4, 65), (4, 1024)]:
            yield stream_mix.STREAM_MIX, stream_mix.example_arguments, (n, C), dtype
            yield stream_read.STREAM_READ, stream_read.example_arguments, (n, C), dtype
        for n, C, m in ((1, 256, 6), (4, 65, 32), (9, 65, 30)):
            yield stream_read.STREAM_READ, read_of, (n, C, m), dtype
        for C in (65, 256, 1024, 5000):
            yield rms_norm.RMS_NORM, rms_norm.example_arguments, (C,), dtype
            yield swiglu.SWIGLU, swiglu.example_arguments, (C,), dtype
            yield cosine_gate.COSINE_GATE, cosine_gate.example_arguments, (C,), dtype
    for n in range(1, 10):
        yield sinkhorn.SINKHORN, sinkhorn.example_arguments, (n,), F32


def parameters(tokens: int, cases: Iterable[tuple]) -> list:
    named = {}
    for op, make, shape, dtype in cases:
        words = [
            op.name,
            *(["first"] if make is first_read else []),
            *map(str, shape),
            str(dtype).removeprefix("torch."),
        ]
        named["-".join(words)] = pytest.param(
            op, partial(make, tokens, *shape, dtype), marks=on_gpu, id="-".join(words)
        )
    return list(named.values())


# Tokens that fill no block: 1000 is no multiple of 16.
@pytest.mark.parametrize("op, make", parameters(1000, shapes()))
def test_triton_agrees_with_float64_on_the_gpu(agrees, op, make):
    agrees(op, make(CUDA), "triton")


ONE_OF_EACH = [
    (stream_boundary.STREAM_BOUNDARY, stream_boundary.example_arguments, (4, 256), F32),
    (stream_boundary.STREAM_BOUNDARY, first_read, (4, 256), F32),
    (stream_chain.STREAM_CHAIN, stream_chain.example_arguments, (4, 256, 4), F32),
    (stream_mix.STREAM_MIX, stream_mix.example_arguments, (4, 256), F32),
    (stream_read.STREAM_READ, stream_read.example_arguments, (4, 256), F32),
    (stream_read.STREAM_READ, stream_read.example_arguments, (8, 256), F32),
    (sinkhorn.SINKHORN, sinkhorn.example_arguments, (4,), F32),
    (rms_norm.RMS_NORM, rms_norm.example_arguments, (256,), F32),
    (cosine_gate.COSINE_GATE, cosine_gate.example_arguments, (256,), F32),
    (swiglu.SWIGLU, swiglu.example_arguments, (256,), F32),
    (swiglu.SWIGLU, swiglu.example_arguments, (256,), BF16),
]


def test_every_op_is_among_what_a_gpu_is_tested_with():
    assert {op.name for op, *_ in shapes()} == {op.name for op, *_ in ONE_OF_EACH} == set(OPS)


# Enough tokens for several partial sums and for more programs than a GPU runs at once.
@pytest.mark.parametrize("op, make", parameters(50_001, ONE_OF_EACH))
def test_a_kernel_gives_equal_bits_on_two_runs(op, make):
    arguments = make(CUDA)
    with dispatch.forcing("triton"):
        first, second = (dispatch.outputs_and_gradients(op.function, arguments) for _ in range(2))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, C, layers", [(2, 65, 3), (4, 256, 4), (8, 1024, 6)])
def test_streams_recomputed_on_the_gpu_have_the_bits_that_were_written_forward(n, C, layers, dtype):
    X, *pairs = stream_chain.example_arguments(1000, n, C, layers, dtype, CUDA)
    phi, bias = stream_boundary.example_arguments(1000, n, C, dtype, CUDA)[3:]
    recomputed = stream_chain.stream_chain(X, pairs[::2], pairs[1::2])
    for y, coefficients, streams in zip(pairs[::2], pairs[1::2], recomputed, strict=True):
        X = stream_boundary.stream_boundary(X, y, coefficients, phi, bias)[0]
        assert torch.equal(X, streams)
