import pytest
import torch

from hypernas.kernels.gather_scatter import gather_scatter, gather_scatter_reference


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_kept_tokens_pass_the_function_and_others_are_zero(share):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 11, 6, generator=generator).transpose(0, 1).requires_grad_()
    keep = torch.rand(11, 3, generator=generator) < share
    seen = []

    def function(rows):
        seen.append(len(rows))
        return rows.sin()

    out = gather_scatter(x, keep, function)
    torch.testing.assert_close(out, torch.where(keep.unsqueeze(-1), x.sin(), 0.0))
    assert sum(seen) == int(keep.sum())
    if share:
        want = gather_scatter_reference(x, keep, torch.sin)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), x), torch.autograd.grad(want.sum(), x))


def test_the_function_may_change_the_width():
    out = gather_scatter(torch.ones(4, 2), torch.tensor([True, False, True, False]), lambda rows: rows.repeat(1, 3))
    assert out.shape == (4, 6) and out.sum() == 12


def test_a_mask_that_does_not_match_is_named():
    with pytest.raises(ValueError, match=r"want keep \(4,\) of bool, got \(3,\) of torch.bool"):
        gather_scatter(torch.ones(4, 2), torch.ones(3, dtype=torch.bool), torch.sin)
