import pytest
import torch

from kernels import linear_cross_entropy as module
from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference


@pytest.mark.parametrize("large", [0, 2**30])
def test_both_forms_equal_cross_entropy_of_the_logits(monkeypatch, large):
    monkeypatch.setattr(module, "LARGE", large)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 8, generator=generator, requires_grad=True)
    weight = torch.randn(101, 8, generator=generator, requires_grad=True)
    target = torch.randint(0, 101, (37,), generator=generator)
    got, want = linear_cross_entropy(x, weight, target), linear_cross_entropy_reference(x, weight, target)
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(loss, (x, weight)) for loss in (got, want)]
    torch.testing.assert_close(*gradients)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"want x \(T, C\), weight \(V, C\) and target \(T,\), got \(3, 4\), \(9, 5\)"):
        linear_cross_entropy(torch.zeros(3, 4), torch.zeros(9, 5), torch.zeros(3, dtype=torch.long))
