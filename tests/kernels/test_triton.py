import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import resources

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


def assert_fits(row):
    assert row.spills == 0, row
    assert row.shared <= resources.SHARED_LIMIT[row.target], row
    assert row.wide_loads > 0, row


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_what_moves_four_streams_spills_nothing(target):
    launches = [launch for launch in resources.shipped_launches() if launch.shape.startswith("n=4 C=256")]
    assert len(launches) == 9
    for launch in launches:
        assert_fits(resources.compile_for(launch, target))


@pytest.mark.slow
def test_no_shipped_kernel_spills_on_any_target_and_the_documented_table_is_this_one():
    rows = [
        resources.compile_for(launch, target) for launch in resources.shipped_launches() for target in resources.TARGETS
    ]
    for row in rows:
        assert_fits(row)
    documented = set(
        re.findall(r"^\| (?:stream|sinkhorn|rms|swiglu|cosine|narrow).*$", (ROOT / "docs/kernels.md").read_text(), re.M)
    )
    missing = [line for line in resources.table(rows).splitlines()[2:] if line not in documented]
    assert missing == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_agrees_with_float64_on_the_gpu(agrees, dtype):
    from kernels import (
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

    cuda = torch.device("cuda")
    for n in (1, 2, 4, 8):
        for C in (65, 256):
            agrees(
                stream_boundary.STREAM_BOUNDARY, stream_boundary.example_arguments(1000, n, C, dtype, cuda), "triton"
            )
            agrees(stream_chain.STREAM_CHAIN, stream_chain.example_arguments(1000, n, C, 4, dtype, cuda), "triton")
    for n in (1, 3, 4, 9):
        agrees(stream_mix.STREAM_MIX, stream_mix.example_arguments(1000, n, 256, dtype, cuda), "triton")
        agrees(stream_read.STREAM_READ, stream_read.example_arguments(1000, n, 256, dtype, cuda), "triton")
        agrees(sinkhorn.SINKHORN, sinkhorn.example_arguments(1000, n, torch.float32, cuda), "triton")
    for module, op in ((rms_norm, rms_norm.RMS_NORM), (swiglu, swiglu.SWIGLU), (cosine_gate, cosine_gate.COSINE_GATE)):
        for C in (65, 1024):
            agrees(op, module.example_arguments(1000, C, dtype, cuda), "triton")
    agrees(narrow_mlp.NARROW_MLP, narrow_mlp.example_arguments(1000, 512, 128, dtype, cuda), "triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, C, layers", [(2, 65, 3), (4, 256, 4), (8, 1024, 6)])
def test_streams_recomputed_on_the_gpu_have_the_bits_that_were_written_forward(n, C, layers, dtype):
    from kernels import stream_boundary, stream_chain

    cuda = torch.device("cuda")
    X, *pairs = stream_chain.example_arguments(1000, n, C, layers, dtype, cuda)
    phi, bias = stream_boundary.example_arguments(1000, n, C, dtype, cuda)[3:]
    recomputed = stream_chain.stream_chain(X, pairs[::2], pairs[1::2])
    for y, coefficients, streams in zip(pairs[::2], pairs[1::2], recomputed, strict=True):
        X = stream_boundary.stream_boundary(X, y, coefficients, phi, bias)[0]
        assert torch.equal(X, streams)
