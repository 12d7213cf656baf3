import pytest
import torch

from hypernas.kernels.stream_mix import STREAM_MIX, example_arguments, stream_mix, stream_mix_reference

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens, n, C", [(1, 1, 1), (37, 3, 50), (301, 4, 17), (5, 9, 33), (2100, 4, 256)])
def test_cpu_agrees_with_float64(agrees, dtype, tokens, n, C):
    agrees(STREAM_MIX, example_arguments(tokens, n, C, dtype, CPU))


def test_the_reference_passes_gradcheck():
    arguments = [a.requires_grad_() for a in example_arguments(2, 3, 4, torch.float64, CPU)]
    assert torch.autograd.gradcheck(stream_mix_reference, arguments)


def test_inputs_with_gaps_are_taken(agrees):
    X, y, H, post = example_arguments(6, 4, 16, torch.float32, CPU)
    agrees(STREAM_MIX, (X.repeat(1, 1, 2)[..., ::2], y.T.contiguous().T, H.mT, post))


def test_the_operator_is_well_formed():
    arguments = [a.requires_grad_() for a in example_arguments(3, 2, 8, torch.float32, CPU)]
    torch.library.opcheck(torch.ops.hypernas.stream_mix.default, (*arguments, "cpu"))


def test_wrong_shapes_are_named():
    X, y, H, post = example_arguments(3, 2, 8, torch.float32, CPU)
    with pytest.raises(ValueError, match=r"want H \(3, 2, 2\) for X \(3, 2, 8\), got \(3, 2, 1\)"):
        stream_mix(X, y, H[..., :1], post)
