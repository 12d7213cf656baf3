import pytest
import torch

from hypernas.kernels.stream_read import STREAM_READ, example_arguments, stream_read, stream_read_reference

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 9, 16])
@pytest.mark.parametrize("tokens, C", [(1, 5), (37, 50), (300, 64), (19, 17)])
def test_cpu_agrees_with_float64(agrees, dtype, n, tokens, C):
    agrees(STREAM_READ, example_arguments(tokens, n, C, dtype, CPU, 2 * n + 3))


@pytest.mark.parametrize("n, m", [(3, 3), (3, 12), (4, 24), (6, 20)])
def test_any_number_of_rows_agrees(agrees, n, m):
    agrees(STREAM_READ, example_arguments(40, n, 32, torch.float32, CPU, m))


def test_stores_past_the_cache_agree_too(agrees):
    agrees(STREAM_READ, example_arguments(4100, 4, 64, torch.float32, CPU))


def test_the_reference_passes_gradcheck():
    arguments = [a.requires_grad_() for a in example_arguments(2, 3, 4, torch.float64, CPU)]
    assert torch.autograd.gradcheck(stream_read_reference, arguments)


def test_inputs_with_gaps_batch_axes_and_other_dtypes_are_taken(agrees):
    X, phi, bias = example_arguments(24, 3, 10, torch.float32, CPU)
    gaps = X.repeat(1, 1, 2)[..., ::2].reshape(2, 12, 3, 10).transpose(0, 1)
    assert not gaps.is_contiguous()
    agrees(STREAM_READ, (gaps, phi.T.contiguous().T, bias))
    leaf = phi.bfloat16().requires_grad_()
    assert torch.autograd.grad(stream_read(X, leaf, bias)[0].sum(), leaf)[0].dtype == torch.bfloat16


def test_streams_of_zeros_read_zero_and_have_finite_gradients():
    X, phi, bias = (a.requires_grad_() for a in example_arguments(3, 4, 8, torch.float32, CPU))
    u, logits = stream_read(X * 0, phi, bias)
    assert u.abs().max() == 0 and torch.equal(logits, bias.expand(3, -1))
    assert torch.autograd.grad(logits.sum(), phi)[0].isfinite().all()


def test_an_unused_output_adds_nothing_to_the_gradients():
    arguments = [a.requires_grad_() for a in example_arguments(5, 4, 8, torch.float32, CPU)]
    for index in range(2):
        got = torch.autograd.grad(stream_read(*arguments)[index].square().sum(), arguments)
        want = torch.autograd.grad(stream_read_reference(*arguments)[index].square().sum(), arguments)
        torch.testing.assert_close(got, want)


def test_the_operator_is_well_formed():
    arguments = [a.requires_grad_() for a in example_arguments(3, 2, 8, torch.float32, CPU)]
    torch.library.opcheck(torch.ops.hypernas.stream_read.default, (*arguments, 1e-6, "cpu"))


@pytest.mark.parametrize(
    "phi, bias", [((4, 17), (4,)), ((1, 16), (1,)), ((4, 16), (5,))], ids=["channels", "too few rows", "bias"]
)
def test_wrong_shapes_are_named(phi, bias):
    with pytest.raises(ValueError, match=r"want phi \(m, 16\) with m >= 2 and bias \(m,\) for X \(3, 2, 8\), got"):
        stream_read(torch.zeros(3, 2, 8), torch.zeros(phi), torch.zeros(bias))
