"""What a trained model is asked beside its loss: how its streams mix."""

from typing import Any

import torch
from torch import Tensor, nn

from search_spaces.layers import ResidualStack


@torch.no_grad()
def stream_diagnostics(model: nn.Module, inputs: Tensor) -> dict[str, Any]:
    """Mean H_res of every connection over the tokens of `inputs`, and the gain of their product over depth.

    The gain is mHC's (2512.24880, section 3): the largest absolute row sum of the product of the mean matrices
    (forward) and the largest absolute column sum (backward); both are 1 where every matrix is doubly stochastic.
    Empty for a model with a single stream.
    """
    stack = next((module for module in model.modules() if isinstance(module, ResidualStack)), None)
    if stack is None:
        return {}
    entered: list[Tensor] = []
    handle = stack.register_forward_pre_hook(lambda _, arguments: entered.append(arguments[0]))
    try:
        model.eval()
        model(inputs)
    finally:
        handle.remove()
    matrices: list[Tensor] = []
    sublayers: Any = stack.sublayers
    streams = sublayers[0].connection.expand(entered[0])
    for sublayer in sublayers:
        connection = sublayer.connection
        matrices.append(connection.mean_mixing(streams).double())
        h, coefficients = connection.read(streams)
        streams = connection.write(streams, sublayer(h), coefficients)
    if matrices[0].shape[0] == 1:
        return {}
    product = torch.linalg.multi_dot(matrices[::-1]) if len(matrices) > 1 else matrices[0]
    return {
        "mean_mixing": [[[round(entry, 6) for entry in row] for row in matrix.tolist()] for matrix in matrices],
        "composite_gain": {
            "forward": product.sum(1).abs().max().item(),
            "backward": product.sum(0).abs().max().item(),
        },
    }
