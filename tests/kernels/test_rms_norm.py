import pytest
import torch

from hypernas.kernels.rms_norm import RMS_NORM, example_arguments, rms_norm, rms_norm_reference

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens, C", [(1, 2), (37, 50), (301, 17), (4100, 256)])  # the last goes past the cache
def test_cpu_agrees_with_float64(agrees, dtype, tokens, C):
    agrees(RMS_NORM, example_arguments(tokens, C, dtype, CPU))


def test_the_reference_passes_gradcheck():
    arguments = [a.requires_grad_() for a in example_arguments(3, 4, torch.float64, CPU)]
    assert torch.autograd.gradcheck(rms_norm_reference, arguments)


def test_inputs_with_gaps_and_batch_axes_are_taken(agrees):
    x, *rest = example_arguments(6, 16, torch.float32, CPU)
    wide = x.reshape(2, 3, -1).repeat(1, 1, 2)
    batched = [r.reshape(2, 3, *r.shape[1:]) if len(r) == 6 else r for r in rest]
    agrees(RMS_NORM, (wide[..., ::2], *batched))


def test_no_tokens_give_no_tokens():
    x, *rest = example_arguments(4, 8, torch.float32, CPU)
    empty = [r[:0] if len(r) == 4 else r for r in rest]
    out = rms_norm(x[:0], *empty)
    assert (out[0] if isinstance(out, tuple) else out).shape[0] == 0


def test_the_operator_is_well_formed():
    arguments = [a.requires_grad_() for a in example_arguments(3, 8, torch.float32, CPU)]
    torch.library.opcheck(torch.ops.hypernas.rms_norm.default, (*arguments, 1e-6, "cpu"))


def test_it_is_torchs_rms_norm():
    x, weight = example_arguments(5, 8, torch.float64, CPU)
    torch.testing.assert_close(rms_norm(x, weight), torch.nn.functional.rms_norm(x, (8,), weight, 1e-6))


def test_a_weight_of_another_width_is_named():
    with pytest.raises(ValueError, match=r"want weight \(8,\) for x \(3, 8\), got \(7,\)"):
        rms_norm(torch.zeros(3, 8), torch.zeros(7))
