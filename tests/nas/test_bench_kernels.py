import pytest
import torch

from kernels import _dispatch
from nas import bench_kernels
from nas.bench_kernels import OPS, run, table


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_rows_and_ratios(op, monkeypatch):
    monkeypatch.setattr(bench_kernels, "ROUNDS", 3)
    fast = "cpu" if bench_kernels.case_of(op, 2, 16, 8, torch.float32, torch.device("cpu")).op else "torch"
    result = run(op, 2, 16, 64, "float32", backend=fast)
    assert set(result) == {"device", "versions", "rows"}
    phases = ("forward",) if op == "stream_chain" else ("forward", "forward+backward")
    assert [(row["name"], row["backend"]) for row in result["rows"]] == [
        (f"{op}/{phase}", backend) for phase in phases for backend in ("naive", fast, "floor")
    ]
    assert all(row["value"] >= 0 and row["unit"] == "ms" for row in result["rows"])
    assert all(row["ratio"] == 1.0 for row in result["rows"] if row["backend"] == "naive")
    assert len(table([result]).splitlines()) == 2 + len(phases)


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    monkeypatch.setitem(_dispatch.TOLERANCE, torch.float32, 0.0)
    with pytest.raises(_dispatch.BackendError, match="cpu differs from the float64 definition of swiglu"):
        run("swiglu", 1, 16, 64, "float32")


def test_threads_and_back_end_are_put_back():
    before = torch.get_num_threads()
    run("rms_norm", 1, 16, 64, "float32", backend="cpu")
    assert torch.get_num_threads() == before and _dispatch._requested == "auto"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"op": "softmax"}, "--op softmax: wanted one of stream_boundary"),
        ({"dtype": "float16"}, "--dtype float16: wanted one of float32, bfloat16"),
        ({"backend": "triton"}, "--backend triton: for swiglu on cpu wanted compile or cpu"),
        ({"device": "tpu"}, "--device tpu: wanted cpu"),
    ],
)
def test_what_is_not_known_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        run(**({"op": "swiglu", "n": 1, "C": 16, "tokens": 8, "dtype": "float32"} | change))
