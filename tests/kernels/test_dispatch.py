import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources, PTXASError

from hypernas.kernels import OPS, dispatch
from hypernas.kernels.dispatch import BackendError, Choice, forget_choices, list_choices, set_backend, use_backend
from hypernas.kernels.rms_norm import RMS_NORM, rms_norm, rms_norm_reference
from hypernas.kernels.swiglu import swiglu


def test_an_unknown_back_end_is_refused_with_the_legal_ones():
    with pytest.raises(ValueError, match=r"kernels=fast: wanted one of auto, reference, triton, cpu"):
        set_backend("fast")


def test_the_setting_before_a_with_block_comes_back_even_after_an_error():
    with use_backend("reference"):
        with pytest.raises(ZeroDivisionError), use_backend("cpu"):
            raise ZeroDivisionError
        rms_norm(torch.randn(3, 4), torch.ones(4))
    assert list_choices() == {"rms_norm": Choice("reference", "asked for")}


def test_the_record_names_what_ran_and_why():
    rms_norm(torch.randn(3, 4), torch.ones(4))
    assert list_choices()["rms_norm"] == Choice("cpu", "the fast back end for cpu tensors")
    rms_norm(torch.randn(3, 4).double(), torch.ones(4))
    assert "float64" in list_choices()["rms_norm[cpu,float64]"].reason
    forget_choices()
    assert list_choices() == {}


def test_triton_on_cpu_tensors_is_an_error_that_says_what_to_do():
    with (
        use_backend("triton"),
        pytest.raises(BackendError, match="runs on cuda tensors, got cpu: use auto or reference"),
    ):
        rms_norm(torch.randn(3, 4), torch.ones(4))


def test_meta_tensors_take_the_reference():
    out = rms_norm(torch.empty(3, 4, device="meta"), torch.empty(4, device="meta"))
    assert out.shape == (3, 4) and list_choices()["rms_norm"].backend == "reference"


def test_a_wrong_back_end_is_reported_and_not_used():
    def off_by_little(x, weight, eps=1e-6):
        return rms_norm_reference(x, weight, eps) * 1.0001

    wrong = replace(RMS_NORM, name="wrong_norm", function=off_by_little)
    with pytest.warns(UserWarning, match="wrong_norm runs on the reference back end: cpu differs from the float64"):
        assert dispatch.choose(wrong, "cpu", torch.float32) == "reference"
    with use_backend("cpu"), pytest.raises(BackendError, match=r"output 0 1\.0e-04"):
        dispatch.choose(wrong, "cpu", torch.float32)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Triton Error [CUDA]: an illegal instruction was encountered"),
        OutOfResources(300_000, 232_448, "shared memory"),
        PTXASError("ptxas fatal"),
        AssertionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_back_end_that_does_not_compile_or_launch_is_reported_and_not_used(error):
    def unlaunchable(x, weight, eps=1e-6):
        raise error

    broken = replace(RMS_NORM, name=f"no_norm_{type(error).__name__}", function=unlaunchable)
    with pytest.warns(UserWarning, match=f"cpu cannot run {broken.name} in float32: {type(error).__name__}"):
        assert dispatch.choose(broken, "cpu", torch.float32) == "reference"
    assert type(error).__name__ in list_choices()[broken.name].reason
    with use_backend("cpu"), pytest.raises(BackendError, match="cannot run no_norm"):
        dispatch.choose(broken, "cpu", torch.float32)


def test_memory_that_runs_out_is_no_verdict_on_a_back_end():
    def hungry(x, weight, eps=1e-6):
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        dispatch.choose(replace(RMS_NORM, name="hungry_norm", function=hungry), "cpu", torch.float32)


def test_a_missing_compiler_gives_one_clear_line_and_the_reference(monkeypatch):
    from hypernas.kernels import cpu_library

    monkeypatch.setattr(cpu_library.shutil, "which", lambda name: None)
    monkeypatch.setattr(dispatch, "_cache", {})
    cpu_library.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"no C\+\+ compiler: install g\+\+"):
            out = swiglu(torch.randn(3, 8))
        assert out.shape == (3, 4) and list_choices()["swiglu"].backend == "reference"
    finally:
        cpu_library.library.cache_clear()


def test_the_self_test_leaves_the_random_state_and_inference_mode_alone(monkeypatch):
    monkeypatch.setattr(dispatch, "_cache", {})
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with torch.inference_mode():
        swiglu(torch.ones(3, 8))
    assert torch.equal(before, torch.get_rng_state()) and list_choices()["swiglu"].backend == "cpu"


def test_compile_sees_through_an_op_forward_and_backward():
    compiled = torch.compile(lambda x, w: rms_norm(x, w).sin(), fullgraph=True, backend="aot_eager")
    x, weight = torch.randn(5, 7, requires_grad=True), torch.ones(7, requires_grad=True)
    got = torch.autograd.grad(compiled(x, weight).sum(), (x, weight))
    want = torch.autograd.grad(rms_norm_reference(x, weight).sin().sum(), (x, weight))
    torch.testing.assert_close(got, want)


def test_export_keeps_the_op_and_runs_its_self_test_outside_the_trace(monkeypatch):
    class Model(torch.nn.Module):
        def forward(self, x):
            return swiglu(x)

    monkeypatch.setattr(dispatch, "_cache", {})
    x = torch.randn(3, 8)
    program = torch.export.export(Model(), (x,))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["hypernas.swiglu.default"]
    torch.testing.assert_close(program.module()(x), swiglu(x))


def test_the_list_of_ops_is_that_of_the_modules_that_define_one():
    modules = {path.stem for path in Path(dispatch.__file__).parent.glob("*.py") if " = Op(" in path.read_text()}
    assert set(OPS) == modules and len(OPS) == len(modules)
    ops = [getattr(import_module(f"hypernas.kernels.{name}"), name.upper()) for name in OPS]
    assert [op.name for op in ops] == list(OPS)


def test_the_list_of_ops_is_had_without_torch():
    program = "import sys; from hypernas.kernels import OPS; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
