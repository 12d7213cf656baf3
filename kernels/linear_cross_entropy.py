"""Cross entropy of a linear head, without the whole matrix of logits where that would be large.

    loss = mean over tokens of  logsumexp(x W^T) - (x W^T)[target]

x (T, C), weight (V, C), target (T,) of int64; loss is a scalar. PyTorch's own operator is used both ways: for logits
under `LARGE` bytes the plain form, above it the chunked one, which holds a part of the T V logits at a time and pays
10 to 40 % more time on a CPU (`nas bench kernels --op linear_cross_entropy`). Sources: Wijmans et al. 2024, 2411.09009.
"""

import torch
from torch import Tensor

LARGE = 2**30  # bytes of logits; forward and backward of the plain form hold about three times as many


def linear_cross_entropy_reference(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The definition."""
    return torch.nn.functional.cross_entropy(x @ weight.mT, target)


def linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Mean loss. Raises ValueError when x (T, C), weight (V, C) and target (T,) do not fit each other."""
    if x.ndim != 2 or weight.shape[1:] != x.shape[1:] or target.shape != x.shape[:1]:
        shapes = f"{tuple(x.shape)}, {tuple(weight.shape)} and {tuple(target.shape)}"
        raise ValueError(f"want x (T, C), weight (V, C) and target (T,), got {shapes}")
    large = len(x) * len(weight) * x.element_size() > LARGE
    options = torch.nn.LinearCrossEntropyOptions() if large else None
    return torch.nn.functional.linear_cross_entropy(x, weight, target, options=options)
