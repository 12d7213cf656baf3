"""A linear map whose matrix is block diagonal: what a model taken apart into independent parts runs.

    out[..., o_g : o_(g+1)] = x[..., i_g : i_(g+1)] @ weights[g]^T

x (..., sum of the blocks' inputs), weights[g] (outputs, inputs) of any sizes, equal or not; out (..., sum of outputs).
Costs sum_g 2 o_g i_g FLOPs a token where the dense matrix costs 2 (sum o_g)(sum i_g). One `linear` a block is as fast
as `bmm` on equal blocks in float32 and faster in bfloat16, because `bmm` copies x to bring the blocks together
(`nas bench kernels --op block_diagonal_linear`), so unequal blocks need nothing of their own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def dense_linear(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The definition: the dense matrix with zeros between the blocks.

    Not named as other ops' references are, since those stand in for the op in an exported model, and this one costs
    what the op is there to save.
    """
    return x @ torch.block_diag(*weights).mT


def block_diagonal_linear(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """x through the blocks. Raises ValueError when the blocks' inputs do not add up to the last axis of x."""
    sizes = [weight.shape[1] for weight in weights]
    if sum(sizes) != x.shape[-1]:
        raise ValueError(f"want blocks with {x.shape[-1]} inputs in all for x {tuple(x.shape)}, got {sizes}")
    parts = zip(x.split(sizes, -1), weights, strict=True)
    return torch.cat([torch.nn.functional.linear(part, weight) for part, weight in parts], -1)
