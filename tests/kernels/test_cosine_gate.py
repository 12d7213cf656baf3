import pytest
import torch

from hypernas.kernels.cosine_gate import COSINE_GATE, cosine_gate, cosine_gate_reference, example_arguments

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens, C", [(1, 2), (37, 50), (301, 17), (4100, 256)])  # the last goes past the cache
def test_cpu_agrees_with_float64(agrees, dtype, tokens, C):
    agrees(COSINE_GATE, example_arguments(tokens, C, dtype, CPU))


def test_the_reference_passes_gradcheck():
    arguments = [a.requires_grad_() for a in example_arguments(3, 4, torch.float64, CPU)]
    assert torch.autograd.gradcheck(cosine_gate_reference, arguments)


def test_inputs_with_gaps_and_batch_axes_are_taken(agrees):
    x, *rest = example_arguments(6, 16, torch.float32, CPU)
    wide = x.reshape(2, 3, -1).repeat(1, 1, 2)
    batched = [r.reshape(2, 3, *r.shape[1:]) if len(r) == 6 else r for r in rest]
    agrees(COSINE_GATE, (wide[..., ::2], *batched))


def test_no_tokens_give_no_tokens():
    x, *rest = example_arguments(4, 8, torch.float32, CPU)
    empty = [r[:0] if len(r) == 4 else r for r in rest]
    out = cosine_gate(x[:0], *empty)
    assert (out[0] if isinstance(out, tuple) else out).shape[0] == 0


def test_the_operator_is_well_formed():
    arguments = [a.requires_grad_() for a in example_arguments(3, 8, torch.float32, CPU)]
    torch.library.opcheck(torch.ops.hypernas.cosine_gate.default, (*arguments, "cpu"))


def test_it_is_what_a_cosine_gate_computes():
    x, branch, gate = example_arguments(5, 8, torch.float64, CPU)
    gated, cir, distance = cosine_gate(x, branch, gate)
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(gated, gate.unsqueeze(-1) * branch)
    torch.testing.assert_close(cir, 1 - cosine(x, branch, dim=-1))
    torch.testing.assert_close(distance, 2 - 2 * cosine(x + gated, x + branch, dim=-1))


@pytest.mark.parametrize("closed", [0.0, 1.0])
def test_hard_gates_and_silent_branches_have_finite_gradients(closed):
    x, branch, _ = example_arguments(5, 8, torch.float32, CPU)
    leaves = [t.requires_grad_() for t in (x, torch.cat((torch.zeros(2, 8), branch[2:])), torch.full((5,), closed))]
    gradients = torch.autograd.grad(sum(o.sum() for o in cosine_gate(*leaves)), leaves)
    assert all(g.isfinite().all() for g in gradients)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"want branch like x, \(3, 8\) torch.float32, and gate \(3,\)"):
        cosine_gate(torch.zeros(3, 8), torch.zeros(3, 8), torch.zeros(3, 1))
