import pytest
import torch

from hypernas.kernels.swiglu import SWIGLU, example_arguments, swiglu, swiglu_reference

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens, C", [(1, 2), (37, 50), (301, 17), (4100, 256)])  # the last goes past the cache
def test_cpu_agrees_with_float64(agrees, dtype, tokens, C):
    agrees(SWIGLU, example_arguments(tokens, C, dtype, CPU))


def test_the_reference_passes_gradcheck():
    arguments = [a.requires_grad_() for a in example_arguments(3, 4, torch.float64, CPU)]
    assert torch.autograd.gradcheck(swiglu_reference, arguments)


def test_inputs_with_gaps_and_batch_axes_are_taken(agrees):
    x, *rest = example_arguments(6, 16, torch.float32, CPU)
    wide = x.reshape(2, 3, -1).repeat(1, 1, 2)
    batched = [r.reshape(2, 3, *r.shape[1:]) if len(r) == 6 else r for r in rest]
    agrees(SWIGLU, (wide[..., ::2], *batched))


def test_no_tokens_give_no_tokens():
    x, *rest = example_arguments(4, 8, torch.float32, CPU)
    empty = [r[:0] if len(r) == 4 else r for r in rest]
    out = swiglu(x[:0], *empty)
    assert (out[0] if isinstance(out, tuple) else out).shape[0] == 0


def test_the_operator_is_well_formed():
    arguments = [a.requires_grad_() for a in example_arguments(3, 8, torch.float32, CPU)]
    torch.library.opcheck(torch.ops.hypernas.swiglu.default, (*arguments, "cpu"))


def test_far_out_values_neither_overflow_nor_turn_nan():
    x = torch.tensor([[-1e4, -88.0, 88.0, 1e4, 1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(swiglu(x), torch.tensor([[0.0, 0.0, 88.0, 1e4]]))


def test_an_odd_last_axis_is_named():
    with pytest.raises(ValueError, match=r"an even last axis; got x \(3, 7\)"):
        swiglu(torch.zeros(3, 7))
