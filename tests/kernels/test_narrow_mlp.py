import pytest
import torch

from kernels.narrow_mlp import NARROW_MLP, example_arguments, narrow_mlp, narrow_mlp_reference

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens, D, H", [(2, 5, 3), (37, 50, 20), (301, 64, 17)])
def test_cpu_agrees_with_float64(agrees, dtype, tokens, D, H):
    agrees(NARROW_MLP, example_arguments(tokens, D, H, dtype, CPU))


def test_the_reference_passes_gradcheck():
    arguments = [a.requires_grad_() for a in example_arguments(2, 4, 3, torch.float64, CPU)]
    assert torch.autograd.gradcheck(narrow_mlp_reference, arguments)


def test_batch_axes_and_gaps_are_taken(agrees):
    x, *weights = example_arguments(12, 10, 4, torch.float32, CPU)
    agrees(NARROW_MLP, (x.reshape(3, 4, 10).transpose(0, 1), *weights))


def test_shapes_that_do_not_fit_are_named():
    x, norm, gate_up, down = example_arguments(3, 8, 4, torch.float32, CPU)
    with pytest.raises(ValueError, match=r"want gate_up \(8, 8\) for x \(3, 8\), got \(7, 8\)"):
        narrow_mlp(x, norm, gate_up[:-1], down)
