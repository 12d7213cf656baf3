"""The modules of a stack of attention and feed-forward sublayers, built from its architecture."""

import math

from torch import nn

from hypernas.search_spaces import layers
from hypernas.search_spaces.blocks import BLOCK_NETS
from hypernas.search_spaces.connections import Connection, PostNormResidual, make_connection
from hypernas.search_spaces.gates import GATES
from hypernas.search_spaces.transformer import Stack, branch_costs, ffn_blocks


def make_norm(arch: Stack) -> nn.Module:
    """Before a branch, after a sum, or before the head: the norm that the architecture asks for."""
    return layers.NORMS[arch.norm.kind](arch.d_model)


def _make_ffn(arch: Stack) -> nn.Module:
    if arch.ffn.shape == "conventional":
        norm = make_norm(arch) if arch.norm.position == "pre" else layers.NoNorm()
        return layers.PreNormFFN(norm, _make_net(arch))
    return layers.Hourglass([layers.PreNorm(make_norm(arch), _make_net(arch)) for _ in range(arch.ffn.sub_mlps or 1)])


def _make_net(arch: Stack) -> nn.Module:
    net = layers.ACTIVATIONS[arch.ffn.activation]
    if arch.ffn.blocks is None:
        return net(arch.d_model, arch.d_hidden)
    blocked = BLOCK_NETS[net](arch.d_model, *ffn_blocks(arch))
    for matrix in blocked.out:  # drawn with their own inputs in mind; the rest is `initialise`'s rule
        matrix.data /= math.sqrt(residual_writes(arch))
    return blocked


def _make_attention(arch: Stack, kind: type[layers.Attention], tokens: int) -> nn.Module:
    rotary = layers.Rotary(arch.head_dim, tokens) if arch.position == "rope" else layers.NoRotation()
    norm = make_norm(arch) if arch.norm.position == "pre" else layers.NoNorm()
    return layers.PreNormAttention(norm, kind(arch.d_model, arch.attention_width, arch.head_dim, rotary))


def make_stack(arch: Stack, attention: type[layers.Attention], tokens: int) -> layers.ResidualStack:
    """Attention and feed-forward sublayers in turn, for sequences of at most `tokens`."""
    costs = branch_costs(arch, tokens)
    sublayers: list[nn.Module] = []
    for gated in arch.gated:
        branches = (_make_attention(arch, attention, tokens), _make_ffn(arch))
        for branch, on, flops in zip(branches, gated, (costs.query, costs.token), strict=True):
            connection = _make_connection(arch, len(sublayers))
            if on:
                gate = GATES[arch.gates.consistency or "distance"](arch.d_model, arch.gates.rate or 1.0, float(flops))
                sublayers.append(layers.GatedSublayer(connection, branch, gate))
            else:
                sublayers.append(layers.Sublayer(connection, branch))
    return layers.ResidualStack(sublayers)


def _make_connection(arch: Stack, index: int) -> Connection:
    """The connection of sublayer number `index`; that of a post-norm net normalises what the sublayer before wrote."""
    if arch.norm.position == "post" and index:
        return PostNormResidual(make_norm(arch))
    return make_connection(arch.streams.n, arch.streams.mixing, arch.streams.factors or "", arch.d_model, index)


def make_positions(arch: Stack, tokens: int) -> nn.Module:
    kind = layers.POSITIONS[arch.position]
    return kind() if arch.position == "rope" else kind(arch.d_model, tokens)


def residual_writes(arch: Stack) -> int:
    """By whose square root `initialise` divides the weights that write to the residual stream.

    Hyper-connections sum n streams before the head, and their paper scales those weights by sqrt(n) more so that the
    sum keeps the standard deviation of a plain net's output (2409.19606, section 4): which way, only its reason says.
    """
    streams = arch.streams.n if arch.streams.mixing in ("hc_static", "hc") else 1
    return 2 * arch.depth * streams
