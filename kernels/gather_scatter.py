"""Run a function on some of the tokens only: gather them, run, scatter the results among zeros.

    out[t] = function(x[keep])[rank of t among the kept]  where keep[t], else 0

x (..., C), keep (...) bool; function (N, C) -> (N, D) for any N, not called when nothing is kept; out (..., D). Moves
the kept rows four times and the zeros once. PyTorch's own `index_select` and
`index_copy` are used: they leave nothing to win, and indexing by mask takes nearly twice as long
(`nas bench kernels --op gather_scatter`). Source: conditional execution in CosineGate, 2512.22206.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def gather_scatter_reference(x: Tensor, keep: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The definition, by mask."""
    flat, mask = x.reshape(-1, x.shape[-1]), keep.reshape(-1)
    if not bool(mask.any()):
        return torch.zeros_like(x)
    rows = function(flat[mask])
    out = torch.zeros(len(flat), rows.shape[-1], dtype=rows.dtype, device=rows.device)
    out[mask] = rows
    return out.reshape(*x.shape[:-1], -1)


def gather_scatter(x: Tensor, keep: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function` on the tokens of x where keep, zeros elsewhere. Raises ValueError when keep does not match x.

    Where nothing is kept the width of the result is that of x.
    """
    if keep.shape != x.shape[:-1] or keep.dtype != torch.bool:
        raise ValueError(f"want keep {tuple(x.shape[:-1])} of bool, got {tuple(keep.shape)} of {keep.dtype}")
    index = keep.reshape(-1).nonzero().squeeze(1)
    if not len(index):
        return torch.zeros_like(x)
    rows = function(x.reshape(-1, x.shape[-1]).index_select(0, index))
    out = torch.zeros(keep.numel(), rows.shape[-1], dtype=rows.dtype, device=rows.device)
    return out.index_copy(0, index, rows).reshape(*x.shape[:-1], -1)
