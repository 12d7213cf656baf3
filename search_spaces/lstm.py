"""LSTM language models: the recurrent baseline that algorithmic progress is measured against (2511.21622).

Only depth and d_model are chosen. Its modules are in `nets/lstm.py`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypernas.search_spaces import costs
from hypernas.search_spaces.base import Cost, arch_from
from hypernas.search_spaces.costs import SIGMOID, LayerCost
from hypernas.search_spaces.grid import Family, Flat, Solve
from hypernas.search_spaces.transformer import TEXT_KEYS, by_name, make_key

if TYPE_CHECKING:
    from hypernas.search_spaces.nets.lstm import RecurrentLanguageModel


@dataclass(frozen=True, slots=True)
class Arch:
    """One LSTM language model."""

    family: str
    depth: int
    d_model: int
    vocab: int
    context: int
    tied_head: bool


def make_arch(flat: Flat) -> Arch:
    arch: Arch = arch_from(Arch, flat)
    return arch


def layer_cost(d_model: int) -> LayerCost:
    """Two products into four gates. Elementwise: their bias and their sum (4 d each), three sigmoids, two tanh, and
    4 d for the new cell and output. One bias, where nn.LSTMCell has two whose sum alone matters."""
    parameters = 8 * d_model * d_model + 4 * d_model
    return LayerCost(parameters, 16 * d_model * d_model, (8 + 3 * SIGMOID + 2 + 4) * d_model)


def cost(arch: Arch) -> Cost:
    """Parameters and FLOPs a token by part."""
    parts = {
        "embedding": LayerCost(arch.vocab * arch.d_model, 0, 0),
        "recurrent": layer_cost(arch.d_model).times(arch.depth),
        "head": costs.head_cost(arch.d_model, arch.vocab, arch.tied_head),
    }
    # Kept for backward, in float32: four gates, the cell, its tanh and the output, of each layer.
    return costs.total_cost(parts, activation_bytes=4 * (7 * arch.depth * arch.d_model + arch.d_model + 2 * arch.vocab))


def build(arch: Arch) -> "RecurrentLanguageModel":
    """The module, initialised from torch's global generator."""
    from hypernas.search_spaces.nets.lstm import build_model  # brings torch

    return build_model(arch)


LSTM_KEYS = {
    **by_name(
        make_key("depth", 2, (1, 2, 3), "layers", low=1, high=1024),
        make_key("d_model", 128, (64, 96, 128, 160, 192), "width of one layer", low=8, high=65536),
    ),
    **TEXT_KEYS,
}
FAMILY = Family(
    name="lstm",
    keys=LSTM_KEYS,
    arch=make_arch,
    cost=cost,
    build=build,
    solves={"d_model": Solve(4, make_arch), "depth": Solve(1, make_arch)},
)
