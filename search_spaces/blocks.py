"""Feed-forward nets that run as independent blocks: what `nas decompose` puts in place of the dense ones.

Block b reads and writes `inputs[b]` residual coordinates through `units[b]` hidden units, and no weight joins two
blocks. Which coordinates these are is data: the buffer `coordinates` (sum of inputs,), block by block. The others are
neither read nor written. Costs sum_b inputs[b] units[b] where the dense net costs d_model d_hidden.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypernas.kernels.block_diagonal_linear import block_diagonal_linear
from hypernas.kernels.swiglu import swiglu
from hypernas.search_spaces.layers import GELUNet, ReLUNet, SwiGLU


class BlockNet(nn.Module):
    """The weights of W_out f(W_in x) for block-diagonal W_in and W_out."""

    coordinates: Tensor

    def __init__(self, d_model: int, inputs: tuple[int, ...], units: tuple[int, ...]) -> None:
        super().__init__()
        self.d_model, self.inputs, self.units = d_model, inputs, units
        self.register_buffer("coordinates", torch.arange(sum(inputs)))
        self.linear = self.blocks(units, inputs)
        self.out = self.blocks(inputs, units)

    def blocks(self, outputs: tuple[int, ...], inputs: tuple[int, ...]) -> nn.ParameterList:
        """One random matrix (outputs[b], inputs[b]) a block."""
        return nn.ParameterList(torch.randn(o, i) / math.sqrt(i) for o, i in zip(outputs, inputs, strict=True))

    def hidden(self, h: Tensor) -> Tensor:
        """h (..., sum of inputs), block after block -> (..., sum of units)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_model) -> (..., d_model)."""
        y = block_diagonal_linear(self.hidden(x[..., self.coordinates]), tuple(self.out))
        return torch.zeros_like(x).index_copy(-1, self.coordinates, y.to(x.dtype))


class BlockSwiGLU(BlockNet):
    """W_out (silu(W_gate x) * W_in x) in blocks."""

    def __init__(self, d_model: int, inputs: tuple[int, ...], units: tuple[int, ...]) -> None:
        super().__init__(d_model, inputs, units)
        self.gate = self.blocks(units, inputs)

    def hidden(self, h: Tensor) -> Tensor:
        gate, up = block_diagonal_linear(h, tuple(self.gate)), block_diagonal_linear(h, tuple(self.linear))
        return swiglu(torch.cat([gate, up], -1))


class BlockGELU(BlockNet):
    """W_out gelu(W_in x) in blocks."""

    def hidden(self, h: Tensor) -> Tensor:
        return F.gelu(block_diagonal_linear(h, tuple(self.linear)))


class BlockReLU(BlockNet):
    """W_out relu(W_in x) in blocks."""

    def hidden(self, h: Tensor) -> Tensor:
        return F.relu(block_diagonal_linear(h, tuple(self.linear)))


BLOCK_NETS: dict[type, type[BlockNet]] = {SwiGLU: BlockSwiGLU, GELUNet: BlockGELU, ReLUNet: BlockReLU}


@torch.no_grad()
def cut(net: Any, coordinates: Sequence[Tensor], units: Sequence[Tensor]) -> BlockNet:
    """The blocks of a dense net, each the weights between its coordinates and units; the other weights are left out."""
    sizes = (tuple(len(block) for block in part) for part in (coordinates, units))
    out = BLOCK_NETS[type(net)](net.d_model, *sizes).to(net.out.weight.device)
    out.coordinates.copy_(torch.cat(list(coordinates)))
    for b, (c, u) in enumerate(zip(coordinates, units, strict=True)):
        out.out[b].copy_(net.out.weight[c[:, None], u])
        if isinstance(net, SwiGLU):
            gate, up = net.gate_up.weight.chunk(2)
            out.get_parameter(f"gate.{b}").copy_(gate[u[:, None], c])
            out.linear[b].copy_(up[u[:, None], c])
        else:
            out.linear[b].copy_(net.linear.weight[u[:, None], c])
    return out
