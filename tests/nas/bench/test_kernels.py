import gc
import itertools
import math

import pytest
import torch

from hypernas.bench import kernels
from hypernas.bench.kernels import (
    OPS,
    buffers,
    captured,
    case_of,
    ceilings,
    copied,
    copying,
    grown_case,
    prepare,
    rotated,
    run,
    run_all,
    sets_beyond,
    size_of,
    table,
    token_counts,
)
from hypernas.kernels import dispatch

CPU = torch.device("cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_rows_and_ratios(op, monkeypatch):
    monkeypatch.setattr(kernels, "ROUNDS", 3)
    fast = "cpu" if case_of(op, 2, 16, 8, torch.float32, CPU).op else "torch"
    result = run(op, 2, 16, 64, "float32", backend=fast)
    assert set(result) == {"device", "versions", "rows"}
    phases = ("forward",) if op == "stream_chain" else ("forward", "forward+backward")
    assert [(row["name"], row["backend"]) for row in result["rows"]] == [
        (f"{op}/{phase}", backend) for phase in phases for backend in ("naive", fast, "floor")
    ]
    assert all(row["value"] >= 0 and row["unit"] == "ms" for row in result["rows"])
    assert all(row["ratio"] == 1.0 for row in result["rows"] if row["backend"] == "naive")
    assert all(row["share_of_copy"] == 1.0 for row in result["rows"] if row["backend"] == "floor")
    for row in result["rows"]:
        assert (row["op"], row["tokens"], row["dtype"], row["timed"]) == (op, 64, "float32", "single calls")
        assert row["phase"] in phases and row["GB/s"] > 0
    assert len(table([result]).splitlines()) == 2 + len(phases)


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    monkeypatch.setitem(dispatch.TOLERANCE, torch.float32, 0.0)
    with pytest.raises(dispatch.BackendError, match="cpu differs from the float64 definition of swiglu"):
        run("swiglu", 1, 16, 64, "float32")


def test_threads_and_back_end_are_put_back():
    before = torch.get_num_threads()
    run("rms_norm", 1, 16, 64, "float32", backend="cpu")
    assert torch.get_num_threads() == before and dispatch._requested == "auto"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"op": "softmax"}, "--op softmax: wanted one of stream_boundary"),
        ({"dtypes": "float16"}, "--dtype float16: wanted one of float32, bfloat16"),
        ({"backend": "triton"}, "--backend triton: for swiglu on cpu wanted compile or cpu"),
        ({"device": "tpu"}, "--device tpu: wanted cpu"),
        ({"tokens": "64,many"}, "--tokens 64,many: wanted whole numbers from 1 on with commas between them"),
        ({"tokens": "0"}, "--tokens 0: wanted whole numbers from 1"),
    ],
)
def test_what_is_not_known_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        run_all(**({"op": "swiglu", "n": 1, "C": 16, "tokens": "8", "dtypes": "float32"} | change))


def test_several_token_counts_and_dtypes_stand_in_the_names(monkeypatch):
    monkeypatch.setattr(kernels, "ROUNDS", 1)
    rows = run_all("swiglu", 1, 16, "8, 16", "float32,bfloat16", backend="cpu")["rows"]
    kinds = list(dict.fromkeys((row["name"], row["phase"], row["tokens"], row["dtype"]) for row in rows))
    assert kinds == [
        (f"swiglu/{phase} {dtype} T={tokens}", phase, tokens, dtype)
        for tokens in (8, 16)
        for dtype in ("float32", "bfloat16")
        for phase in ("forward", "forward+backward")
    ]
    assert token_counts("4096,65536") == [4096, 65536]


@pytest.mark.parametrize("touched", [1, 10**6, 50 * 2**20, 10**9])
def test_no_set_is_still_in_the_cache_when_its_turn_comes(touched):
    cache = 50 * 2**20
    sets = sets_beyond(cache, touched)
    assert sets * touched >= 2 * cache > (sets - 1) * touched


def test_memory_is_counted_once():
    x = torch.zeros(8, 2)
    assert size_of((x, [x[2:], None], torch.zeros(3, dtype=torch.bfloat16), 7)) == 8 * 2 * 4 + 6


def test_a_copy_of_arguments_lies_elsewhere():
    arguments = case_of("rms_norm", 1, 16, 8, torch.float32, CPU).arguments
    assert size_of((arguments, copied(arguments))) == 2 * size_of(arguments)


@pytest.mark.parametrize("op", OPS)
def test_arguments_for_many_tokens_are_copies_of_those_for_few(op, monkeypatch):
    monkeypatch.setattr(kernels, "DRAWN", 16)
    few, many, drawn = (make(op, 2, 32, tokens, torch.float32, CPU) for make, tokens in (
        (grown_case, 16), (grown_case, 40), (case_of, 40)))  # fmt: skip
    assert (many.forward_bytes, many.backward_bytes) == (drawn.forward_bytes, drawn.backward_bytes)
    for ours, theirs, first in zip(
        (*many.arguments, *many.naive_arguments),
        (*drawn.arguments, *drawn.naive_arguments),
        (*few.arguments, *few.naive_arguments),
        strict=True,
    ):
        if isinstance(ours, torch.Tensor):
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.is_contiguous()
            assert len(first) == len(ours) or torch.equal(ours[16:32], ours[:16])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, gpu])])
def test_ceilings_have_their_four_rows(device):
    rows = ceilings(torch.device(device))
    assert [row["unit"] for row in rows] == ["TB/s", "TFLOP/s", "us", "us"]
    assert all(row["value"] > 0 for row in rows)


# ---- on a device -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("phase", ["forward", "forward+backward"])
@pytest.mark.parametrize("op", [op for op in OPS if op != "gather_scatter"])
def test_a_replay_computes_what_the_calls_compute_and_takes_every_set_in_turn(op, phase):
    case = case_of(op, 4, 64, 256, torch.float32, torch.device("cuda"))
    if phase not in kernels._phases(case):
        pytest.skip("has no backward of its own")
    sets = [case.arguments, copied(case.arguments), copied(case.arguments)]
    calls = [prepare(case.function, arguments, phase) for arguments in sets]
    graph, results = captured(calls, repeats=2)
    got = [[tensor.detach() for tensor in kernels._tensors(each)] for each in results]
    assert size_of(got) == 3 * size_of(got[0])  # apart
    if phase == "forward":  # a replay reads the arguments where they lie, each set its own
        sets[1][0].neg_()
    for tensor in itertools.chain(*got):
        tensor.fill_(math.nan)
    graph.replay()
    for call, each in zip(calls, got, strict=True):
        for ours, tensor in zip(each, kernels._tensors(call()), strict=True):
            torch.testing.assert_close(ours, tensor.detach(), rtol=1e-4, atol=1e-4)
    assert any(not torch.equal(first, second) for first, second in zip(got[0], got[1], strict=True))


@pytest.mark.gpu
@gpu
def test_what_a_graph_reads_stays_allocated():
    cuda = torch.device("cuda")
    before = torch.cuda.memory_allocated()
    candidate = rotated(copying, buffers(2**20, cuda), 2**20, cuda)
    gc.collect()
    assert candidate.timed == "graph"
    assert torch.cuda.memory_allocated() - before >= candidate.sets * 2**20


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_a_device_are_timed_by_graphs(dtype):
    rows = run_all("rms_norm", 1, 64, "256,8192", dtype, backend="triton", device="cuda")["rows"]
    assert {(row["timed"], row["unit"]) for row in rows} == {("graph", "us")}
    assert all(row["value"] > 0 and row["calls"] % row["sets"] == 0 for row in rows)
    assert min(row["sets"] for row in rows if row["tokens"] == 256) > 100


@pytest.mark.gpu
@gpu
def test_what_no_graph_holds_is_timed_call_by_call_and_says_why():
    rows = run("gather_scatter", 1, 64, 256, "float32", device="cuda")["rows"]
    said = {row["backend"]: row["timed"] for row in rows}
    assert said["floor"] == "graph" and said["torch"].startswith("single calls: ")
    assert run("rms_norm", 1, 64, 256, "float32", backend="triton", device="cuda")["rows"][0]["timed"] == "graph"
