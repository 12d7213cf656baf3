import pytest
import torch

from hypernas.bench import kernels, timing
from hypernas.bench.kernels import (
    case_of,
    grown_case,
    run,
    run_all,
    table,
)
from hypernas.bench.request import TORCH_OPS, token_counts
from hypernas.kernels import OPS, dispatch

CPU = torch.device("cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("op", [*OPS, *TORCH_OPS])
def test_every_op_has_its_rows_and_ratios(op, monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 3)
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
    monkeypatch.setattr(timing, "ROUNDS", 1)
    rows = run_all("swiglu", 1, 16, "8, 16", "float32,bfloat16", backend="cpu")["rows"]
    kinds = list(dict.fromkeys((row["name"], row["phase"], row["tokens"], row["dtype"]) for row in rows))
    assert kinds == [
        (f"swiglu/{phase} {dtype} T={tokens}", phase, tokens, dtype)
        for tokens in (8, 16)
        for dtype in ("float32", "bfloat16")
        for phase in ("forward", "forward+backward")
    ]
    assert token_counts("4096,65536") == [4096, 65536]


@pytest.mark.parametrize("op", [*OPS, *TORCH_OPS])
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


# ---- on a device -----------------------------------------------------------------------------------------------------


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
