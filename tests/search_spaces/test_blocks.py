"""A net in blocks is the dense net without the weights between them."""

import pytest
import torch

from search_spaces.blocks import BlockGELU, BlockReLU, BlockSwiGLU
from search_spaces.layers import GELUNet, ReLUNet, SwiGLU


@pytest.mark.parametrize(("dense", "blocked"), [(SwiGLU, BlockSwiGLU), (GELUNet, BlockGELU), (ReLUNet, BlockReLU)])
def test_blocks_compute_what_the_dense_net_does_without_the_weights_between_them(dense: type, blocked: type) -> None:
    torch.manual_seed(0)
    coordinates, units = [[5, 0, 3], [1, 6]], [[2, 7], [0, 4, 1]]  # of 8 and 8; the rest is in no block
    net, whole = blocked(8, (3, 2), (2, 3)), dense(8, 8)
    net.coordinates.copy_(torch.tensor([5, 0, 3, 1, 6]))
    for parameter in whole.parameters():
        parameter.data.zero_()
    with torch.no_grad():
        for b, (c, u) in enumerate(zip(coordinates, units, strict=True)):
            whole.out.weight[torch.tensor(c)[:, None], torch.tensor(u)] = net.out[b]
            if dense is SwiGLU:
                whole.gate_up.weight[torch.tensor(u)[:, None], torch.tensor(c)] = net.gate[b]
                whole.gate_up.weight[8 + torch.tensor(u)[:, None], torch.tensor(c)] = net.linear[b]
            else:
                whole.linear.weight[torch.tensor(u)[:, None], torch.tensor(c)] = net.linear[b]
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(net(x), whole(x))
    assert not net(x)[..., [2, 4, 7]].any()
