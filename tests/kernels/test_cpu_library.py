import ctypes
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hypernas.kernels import (
    cosine_gate,
    cpu_library,
    dispatch,
    processor,
    sinkhorn,
    stream_boundary,
    stream_chain,
    stream_mix,
    stream_read,
    swiglu,
)
from hypernas.kernels.dispatch import BackendError
from hypernas.kernels.rms_norm import example_arguments as norm_arguments
from hypernas.kernels.rms_norm import rms_norm


def test_two_builds_at_once_compile_once_and_leave_one_library(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        cpu_library, "_compile", lambda compiler, sources, target, flags: (compiled.append(1), target.touch())
    )
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: cpu_library.build(tmp_path), range(4)))
    assert len(paths) == 1 and len(compiled) == 1


def test_another_cpu_compiler_or_source_is_another_library(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_library, "_compile", lambda compiler, sources, target, flags: target.touch())
    here = cpu_library.build(tmp_path)
    monkeypatch.setattr(processor, "cpu_flags", lambda: "flags: sse2")
    assert cpu_library.build(tmp_path) != here
    assert cpu_library.build(tmp_path, ("-g",)) != cpu_library.build(tmp_path)


def test_a_compiler_that_fails_names_its_error_and_leaves_nothing_behind(tmp_path):
    with pytest.raises(BackendError, match=r"cannot compile the CPU kernels: .*no-such-flag"):
        cpu_library.build(tmp_path, ("-no-such-flag",))
    assert list(tmp_path.glob("*.so")) == []


def test_a_cache_folder_that_cannot_be_written_is_one_readable_error(tmp_path, monkeypatch):
    (tmp_path / "hypernas").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_library.library.cache_clear()
    try:
        with pytest.raises(BackendError, match=r"cannot be built or loaded: .*hypernas"):
            cpu_library.library()
    finally:
        cpu_library.library.cache_clear()


def test_tensors_with_gaps_never_reach_c():
    with pytest.raises(ValueError, match="want a contiguous CPU tensor"):
        cpu_library.call("swiglu_forward", torch.float32, 4, 4, torch.randn(8, 8).T, torch.empty(4, 4))


def test_loading_the_library_keeps_denormals():
    cpu_library.library()
    tiny = torch.full((16,), 1e-40)
    assert float((tiny * 1.0).sum()) > 1.5e-39


def test_nan_comes_out_where_nan_went_in():
    x = torch.ones(2, 40)
    x[0, 3] = float("nan")
    out = rms_norm(x, torch.ones(40))
    assert out[0].isnan().all() and not out[1].isnan().any()
    assert swiglu.swiglu(x)[0, 3].isnan() and not swiglu.swiglu(x)[1].isnan().any()


EVERY_OP = {
    "stream_boundary": (stream_boundary.stream_boundary, stream_boundary.example_arguments, (1100, 4, 32)),
    "stream_chain": (stream_chain.STREAM_CHAIN.function, stream_chain.example_arguments, (1100, 4, 32, 3)),
    "stream_mix": (stream_mix.stream_mix, stream_mix.example_arguments, (1100, 3, 32)),
    "stream_read": (stream_read.stream_read, stream_read.example_arguments, (1100, 3, 32)),
    "sinkhorn": (sinkhorn.sinkhorn, sinkhorn.example_arguments, (1100, 4)),
    "rms_norm": (rms_norm, norm_arguments, (1100, 32)),
    "swiglu": (swiglu.swiglu, swiglu.example_arguments, (1100, 32)),
    "cosine_gate": (cosine_gate.cosine_gate, cosine_gate.example_arguments, (1100, 32)),
}


@pytest.mark.parametrize("op", EVERY_OP)
def test_results_do_not_depend_on_the_number_of_threads(op):
    function, example, shape = EVERY_OP[op]
    arguments = example(*shape, torch.float32, torch.device("cpu"))

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        results = dispatch.outputs_and_gradients(function, arguments)
        torch.set_num_threads(before)
        return results

    one, three = run(1), run(3)
    assert all(torch.equal(one[name], three[name]) for name in one)


# Runs every op at odd sizes in a process with the sanitizers' runtime loaded first.
SANITIZED = """
import ctypes, sys
import torch
from hypernas.kernels import cpu_library
cpu_library.library = lambda: library
library = ctypes.CDLL(sys.argv[1])
from hypernas.kernels import dispatch, cosine_gate, rms_norm, sinkhorn, stream_boundary, stream_chain, stream_mix
from hypernas.kernels import stream_read, swiglu
cpu = torch.device("cpu")
for dtype in (torch.float32, torch.bfloat16):
    for tokens, n, C in ((1, 1, 1), (7, 2, 17), (37, 4, 50), (19, 8, 33), (5, 16, 3)):
        X, y, *rest = stream_boundary.example_arguments(tokens, n, C, dtype, cpu)
        cases = [
            (stream_boundary.STREAM_BOUNDARY, (X, y, *rest)),
            (stream_boundary.STREAM_BOUNDARY, (X, None, None, *rest[1:])),
            (stream_chain.STREAM_CHAIN, stream_chain.example_arguments(tokens, n, C, 3, dtype, cpu)),
            (stream_mix.STREAM_MIX, stream_mix.example_arguments(tokens, n, C, dtype, cpu)),
            (stream_read.STREAM_READ, stream_read.example_arguments(tokens, n, C, dtype, cpu, 2 * n + 1)),
            (rms_norm.RMS_NORM, rms_norm.example_arguments(tokens, C, dtype, cpu)),
            (swiglu.SWIGLU, swiglu.example_arguments(tokens, C, dtype, cpu)),
            (cosine_gate.COSINE_GATE, cosine_gate.example_arguments(tokens, C, dtype, cpu)),
            (sinkhorn.SINKHORN, sinkhorn.example_arguments(tokens, n, dtype, cpu)),
        ]
        for op, arguments in cases:
            with dispatch.forcing("cpu"):
                dispatch.outputs_and_gradients(op.function, arguments)
print("clean")
"""


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", "undefined"])
def test_the_library_is_clean_under_sanitizers(tmp_path, sanitizer):
    library = cpu_library.build(tmp_path, ("-g", "-O1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"))
    name = {"address": "libasan.so", "undefined": "libubsan.so"}[sanitizer]
    runtime = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    environment = os.environ | {"LD_PRELOAD": runtime.strip(), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(library)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.stdout.strip() == "clean", done.stderr[-3000:]


def test_the_library_needs_nothing_of_torch():
    needed = subprocess.run(
        ["readelf", "-d", cpu_library.build(cpu_library.cache_folder())], capture_output=True, text=True, check=True
    ).stdout
    assert "NEEDED" in needed and "torch" not in needed
    assert isinstance(cpu_library.library(), ctypes.CDLL)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other machines have other instruction sets")
@pytest.mark.parametrize("instructions", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_the_sources_compile_for_every_generation_of_x86(instructions, tmp_path):
    """Whatever this machine has: a register that only AVX-512 names would stop the build on all others."""
    assert cpu_library.build(tmp_path, (f"-march={instructions}",)).exists()
