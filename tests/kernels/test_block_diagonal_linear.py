import pytest
import torch

from hypernas.kernels.block_diagonal_linear import block_diagonal_linear, dense_linear


@pytest.mark.parametrize("sizes", [[(3, 3), (3, 3)], [(2, 5), (7, 1), (1, 4)], [(4, 6)]])
def test_blocks_equal_the_dense_matrix_outputs_and_gradients(sizes):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(o, i, generator=generator, dtype=torch.float64, requires_grad=True) for o, i in sizes]
    inputs = sum(i for _, i in sizes)
    x = torch.randn(5, 2, inputs, generator=generator, dtype=torch.float64, requires_grad=True)
    got, want = block_diagonal_linear(x, weights), dense_linear(x, weights)
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(out.square().sum(), (x, *weights)) for out in (got, want)]
    torch.testing.assert_close(*gradients)


def test_blocks_that_do_not_cover_the_input_are_named():
    with pytest.raises(ValueError, match=r"want blocks with 5 inputs in all for x \(2, 5\), got \[3, 3\]"):
        block_diagonal_linear(torch.zeros(2, 5), [torch.zeros(1, 3), torch.zeros(1, 3)])
