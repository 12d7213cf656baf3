"""What a trained model is asked beside its loss: how its streams mix."""

from typing import Any

import torch
from torch import Tensor, nn

from search_spaces.layers import GatedSublayer, Sublayer


@torch.no_grad()
def stream_diagnostics(model: nn.Module, inputs: Tensor) -> dict[str, Any]:
    """Mean H_res of every connection over the tokens of `inputs`, and the gain of their product over depth.

    The gain is mHC's (2512.24880, section 3): the largest absolute row sum of the product of the mean matrices
    (forward) and the largest absolute column sum (backward); both are 1 where every matrix is doubly stochastic.
    Empty for a model with a single stream.
    """
    matrices: list[Tensor] = []

    def note(sublayer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        matrices.append(sublayer.connection.mean_mixing(arguments[0]).double())  # type: ignore[union-attr, operator]

    sublayers = [module for module in model.modules() if isinstance(module, Sublayer | GatedSublayer)]
    handles = [sublayer.register_forward_pre_hook(note) for sublayer in sublayers]
    try:
        model.eval()
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not matrices or matrices[0].shape[0] == 1:
        return {}
    product = torch.linalg.multi_dot(matrices[::-1]) if len(matrices) > 1 else matrices[0]
    return {
        "mean_mixing": [[[round(entry, 6) for entry in row] for row in matrix.tolist()] for matrix in matrices],
        "composite_gain": {
            "forward": product.sum(1).abs().max().item(),
            "backward": product.sum(0).abs().max().item(),
        },
    }
