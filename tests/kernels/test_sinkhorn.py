import pytest
import torch

from hypernas.kernels.sinkhorn import SINKHORN, example_arguments, sinkhorn, sinkhorn_reference

CPU = torch.device("cpu")


@pytest.mark.parametrize("tokens, n", [(1, 1), (37, 3), (301, 4), (17, 8)])
def test_cpu_agrees_with_float64(agrees, tokens, n):
    agrees(SINKHORN, example_arguments(tokens, n, torch.float32, CPU))


@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_any_number_of_iterations_agrees(agrees, iterations):
    agrees(SINKHORN, (*example_arguments(20, 4, torch.float32, CPU), iterations))


def test_rows_sum_to_one_and_columns_nearly():
    matrices = sinkhorn(*example_arguments(50, 4, torch.float32, CPU))
    torch.testing.assert_close(matrices.sum(-1), torch.ones(50, 4))
    torch.testing.assert_close(matrices.sum(-2), torch.ones(50, 4), atol=1e-2, rtol=0)


def test_logits_far_apart_neither_overflow_nor_divide_by_zero():
    logits = torch.tensor([[[200.0, 0.0], [0.0, 0.0]], [[-200.0, -200.0], [0.0, 0.0]]])
    out = sinkhorn(logits)
    assert out.isfinite().all()
    torch.testing.assert_close(out, sinkhorn_reference(logits))


def test_the_reference_passes_gradcheck():
    (logits,) = example_arguments(2, 3, torch.float64, CPU)
    assert torch.autograd.gradcheck(lambda x: sinkhorn_reference(x, 3), logits.requires_grad_())


def test_the_operator_is_well_formed():
    (logits,) = example_arguments(3, 2, torch.float32, CPU)
    torch.library.opcheck(torch.ops.hypernas.sinkhorn.default, (logits.requires_grad_(), 5, "cpu"))


@pytest.mark.parametrize(
    "shape, dtype, iterations, message",
    [
        ((2, 3, 4), torch.float32, 20, r"want \(\.\.\., n, n\) and at least 1 iteration, got \(2, 3, 4\) and 20"),
        ((2, 3, 3), torch.float32, 0, "at least 1 iteration"),
        ((2, 3, 3), torch.bfloat16, 20, "want float32 or float64 logits, got torch.bfloat16"),
    ],
)
def test_bad_input_is_named(shape, dtype, iterations, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn(torch.zeros(shape, dtype=dtype), iterations)
