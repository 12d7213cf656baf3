"""A net in blocks is the dense net without the weights between them."""

import pytest
import torch

from hypernas.search_spaces.blocks import cut
from hypernas.search_spaces.layers import GELUNet, ReLUNet, SwiGLU


@pytest.mark.parametrize("kind", [SwiGLU, GELUNet, ReLUNet])
def test_blocks_compute_what_the_dense_net_does_without_the_weights_between_them(kind: type) -> None:
    torch.manual_seed(0)
    coordinates = [torch.tensor([5, 0, 3]), torch.tensor([1, 6])]  # of 8; the others are in no block
    units = [torch.tensor([2, 7]), torch.tensor([0, 4, 1])]
    net = kind(8, 8)
    blocked = cut(net, coordinates, units)
    together = torch.zeros(8, 8)  # (units, coordinates)
    for c, u in zip(coordinates, units, strict=True):
        together[u[:, None], c] = 1
    with torch.no_grad():
        net.out.weight *= together.T
        read = net.gate_up if kind is SwiGLU else net.linear
        read.weight *= together.repeat(2 if kind is SwiGLU else 1, 1)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(blocked(x), net(x))
    assert not blocked(x)[..., [2, 4, 7]].any()
