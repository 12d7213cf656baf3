"""The coordinates of a model's nets, and the edges between them that blocks are made of."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hypernas.decompose.evidence import Evidence, Structure, take_apart
from hypernas.search_spaces.blocks import cut
from hypernas.search_spaces.costs import ffn_cost
from hypernas.search_spaces.layers import ACTIVATIONS
from hypernas.training.run import Setting

NETS = {kind: name for name, kind in ACTIVATIONS.items()}
Edges = np.ndarray  # (m, C, H): the weights that join coordinate c and unit h, the writing one last
Masks = Mapping[str, Edges]  # of each net, which weights stay


def nets_of(model: nn.Module) -> dict[str, Any]:
    """The feed-forward nets of a model by name."""
    return {name: module for name, module in model.named_modules() if type(module) in NETS}


def _reading(net: Any) -> nn.Linear:
    return net.gate_up if "gate_up" in net._modules else net.linear


def edges_of(net: Any) -> Edges:
    """The weights of a net by the coordinate and the unit they join, (m, C, H)."""
    read = _reading(net).weight.detach().unflatten(0, (-1, net.d_hidden)).transpose(1, 2)  # (m - 1, C, H)
    return torch.cat([read, net.out.weight.detach()[None]]).cpu().numpy()


def parameter_masks(net: Any, mask: Edges) -> list[tuple[nn.Parameter, Tensor]]:
    """The net's parameters, each with its part of a mask over edges."""
    device = net.out.weight.device
    read = torch.from_numpy(mask[:-1].transpose(0, 2, 1).reshape(-1, mask.shape[1]))
    written = torch.from_numpy(np.ascontiguousarray(mask[-1]))
    return [(_reading(net).weight, read.to(device)), (net.out.weight, written.to(device))]


def strongest(evidence: Evidence, share: float) -> Structure:
    """The structure of the strongest `share` of the confirmed edges."""
    confirmed = evidence.statistic[evidence.confirmed]
    if not len(confirmed):
        return take_apart(evidence.reads, evidence.writes)
    count = max(1, round(share * len(confirmed)))
    strong = evidence.statistic >= np.partition(confirmed, -count)[-count]
    return take_apart(evidence.reads & strong, evidence.writes & strong)


def mask_of(structure: Structure, m: int) -> Edges:
    """The weights inside of blocks, (m, C, H)."""
    mask = np.zeros((len(structure.coordinate_order), len(structure.unit_order)), bool)
    for block in structure.blocks:
        mask[np.ix_(block.coordinates, block.units)] = True
    return np.repeat(mask[None], m, axis=0)


def masks_at(nets: Mapping[str, Any], evidence: Mapping[str, Evidence], share: float) -> dict[str, Edges]:
    """What stays of each net at a share of its confirmed edges: blocks, but all where no evidence forms any."""
    out = {}
    for name, net in nets.items():
        edges = edges_of(net)
        known = bool(strongest(evidence[name], 1.0).blocks)
        out[name] = mask_of(strongest(evidence[name], share), len(edges)) if known else np.ones(edges.shape, bool)
    return out


def flops(setting: Setting, model: nn.Module, masks: Masks) -> float:
    """Forward FLOPs a token (or an image) of the whole model if it computes with the masks' weights alone.

    Gates are counted as open: what they save is theirs.
    """
    total = float(setting.space.cost(setting.arch).flops_total)
    positions = 1 if setting.task.unit == "token" else setting.arch.tokens
    for name, net in nets_of(model).items():
        mask = masks[name]
        dense = ffn_cost(NETS[type(net)], net.d_model, net.d_hidden)
        idle = 1 - mask.any((0, 1)).sum() / net.d_hidden
        total -= positions * (dense.matmul - 2 * int(mask.sum()) + dense.elementwise * idle)
    return total


def parameters(setting: Setting, masks: Masks) -> int:
    """Parameters of the whole model without the weights beyond the masks."""
    gone = sum(mask.size - int(mask.sum()) for mask in masks.values())
    return setting.space.cost(setting.arch).parameters_total - gone


def equally_many(name: str, weights: Edges, mask: Edges, seed: int) -> Edges:
    """Another choice of as many weights as `mask` has: what blocks are compared with.

    `magnitude`: the largest (which no dense product can skip: a bound on what is possible). `units`: whole hidden units
    with the largest weights, which run as a smaller dense net. `random`: blocks of the same sizes, their members drawn.
    """
    m, C, H = mask.shape
    if name == "magnitude":
        order = np.argsort(-np.abs(weights), axis=None, kind="stable")
        chosen = np.zeros(mask.size, bool)
        chosen[order[: int(mask.sum())]] = True
        return chosen.reshape(mask.shape)
    if name == "units":
        squares = np.square(weights)
        size = (squares / squares.mean((1, 2), keepdims=True)).sum((0, 1))
        chosen = np.zeros(H, bool)
        chosen[np.argsort(-size, kind="stable")[: round(mask.sum() / (m * C))]] = True
        return np.broadcast_to(chosen, mask.shape).copy()
    rng = np.random.default_rng(seed)
    return np.ascontiguousarray(mask[:, rng.permutation(C)][:, :, rng.permutation(H)])


def in_blocks(model: nn.Module, structures: Mapping[str, Structure]) -> nn.Module:
    """A copy of the model whose nets run their blocks; a net without any stays dense."""
    out = copy.deepcopy(model)
    for name, structure in structures.items():
        if structure.blocks:
            parts = (
                [
                    torch.from_numpy(getattr(block, part)).to(next(model.parameters()).device)
                    for block in structure.blocks
                ]
                for part in ("coordinates", "units")
            )
            out.set_submodule(name, cut(out.get_submodule(name), *parts))
    return out.eval()
