"""Parameters and FLOPs of the layers that spaces share, from their sizes alone: no torch is needed to price a network.

The `*_cost` functions price a layer a token: (parameters, matrix-product FLOPs, elementwise FLOPs). One
multiply-accumulate is 2 FLOPs; elementwise work counts 1 for each add, multiply, divide, exponential or root.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

from hypernas.search_spaces.base import Cost


class LayerCost(NamedTuple):
    """Parameters, and FLOPs a token in matrix products and in everything else."""

    parameters: int
    matmul: int
    elementwise: int

    def __add__(self, other: tuple) -> "LayerCost":
        return LayerCost(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: int) -> "LayerCost":
        return LayerCost(*(count * value for value in self))


FREE = LayerCost(0, 0, 0)
SIGMOID = 3  # exp, add, divide
# A hidden unit. silu and the product; gelu by its error function counted as 1 (scale, erf, add, two products); max.
ACTIVATION_FLOPS = {"swiglu": SIGMOID + 2, "gelu": 5, "relu": 1}
CONTROLLER = (16,)  # hidden units of a cosine gate's controller, layer by layer: `gates.CosineGate.hidden`


def total_cost(parts: Mapping[str, LayerCost], activation_bytes: int, gated_flops: tuple[int, ...] = ()) -> Cost:
    """A whole network's cost from its parts."""
    return Cost(
        parameters={name: part.parameters for name, part in parts.items()},
        flops={name: part.matmul + part.elementwise for name, part in parts.items()},
        matmul=sum(part.matmul for part in parts.values()),
        elementwise=sum(part.elementwise for part in parts.values()),
        activation_bytes=activation_bytes,
        gated_flops=gated_flops,
    )


def norm_cost(kind: str, d_model: int) -> LayerCost:
    # rmsnorm: square, sum, scale, weight; layernorm also subtracts the mean (sum, subtract) and adds a bias.
    return LayerCost(d_model, 0, 4 * d_model) if kind == "rmsnorm" else LayerCost(2 * d_model, 0, 7 * d_model)


def attention_cost(d_model: int, width: int, head_dim: int, context: int, rotary: bool) -> tuple[LayerCost, int]:
    """The layer's cost a token, and the FLOPs of it that a skipped query saves (all but keys and values).

    The full T x T square is counted, as a causal mask does not shorten the matrix products.
    """
    projection = 2 * d_model * width
    scores = 2 * 2 * context * width  # query x key, weights x value
    softmax = 5 * context * (width // head_dim)  # scale, subtract the maximum, exp, sum, divide
    rotation = 3 * width if rotary else 0  # of queries, and again of keys
    cost = LayerCost(4 * d_model * width, 4 * projection + scores, softmax + 2 * rotation)
    return cost, 2 * projection + scores + softmax + rotation


def ffn_cost(activation: str, d_model: int, d_hidden: int) -> LayerCost:
    matrices = 3 if activation == "swiglu" else 2
    return LayerCost(
        matrices * d_model * d_hidden, 2 * matrices * d_model * d_hidden, ACTIVATION_FLOPS[activation] * d_hidden
    )


def head_cost(d_model: int, vocab: int, tied: bool) -> LayerCost:
    return LayerCost(0 if tied else vocab * d_model, 2 * d_model * vocab, 0)


def gate_cost(d_model: int, hidden: tuple[int, ...] = CONTROLLER) -> tuple[int, int, int]:
    """(parameters, matmul FLOPs, elementwise FLOPs) of one gate, FLOPs per decision at inference.

    Elementwise: the controller's biases and ReLUs, sigmoid and its 2, softplus(s) and b with its gain, compare.
    """
    weights = sum(inputs * outputs for inputs, outputs in pairwise((d_model, *hidden, 1)))
    return weights + sum(hidden) + 1 + 2, 2 * weights, 2 * sum(hidden) + 1 + 2 + 2 + 1
