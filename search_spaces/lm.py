"""Space `lm`: decoder-only language models over bytes.

A Transformer (`search_spaces/transformer.py`), or an LSTM (`search_spaces/lstm.py`) to compare it with.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hypernas.search_spaces import costs, lstm, transformer
from hypernas.search_spaces.base import Cost
from hypernas.search_spaces.costs import LayerCost
from hypernas.search_spaces.grid import Family, Flat, GridSpace
from hypernas.search_spaces.growth import GROWTH
from hypernas.search_spaces.transformer import STACK_KEYS, TEXT_KEYS, by_name, make_key

if TYPE_CHECKING:
    from hypernas.search_spaces.nets.lm import LanguageModel


@dataclass(frozen=True, slots=True)
class Arch(transformer.Stack):
    """One Transformer language model."""

    vocab: int
    context: int
    tied_head: bool


TRANSFORMER_KEYS = {
    **by_name(
        make_key("depth", 4, (2, 3, 4, 5, 6), "layers (attention and feed-forward each)", low=1, high=1024),
        make_key("d_model", 128, (64, 96, 128, 160, 192), "width of one residual stream", low=8, high=65536),
    ),
    **STACK_KEYS,
    **TEXT_KEYS,
}


def make_arch(flat: Flat) -> Arch:
    return transformer.stack_arch(Arch, flat)


def cost(arch: Arch) -> Cost:
    """Parameters and FLOPs a token by part, from the architecture alone."""
    stack, gated_flops, kept = transformer.stack_cost(arch, arch.context)
    embedding = LayerCost(arch.vocab * arch.d_model, 0, 0) + transformer.position_cost(arch, arch.context)
    head = costs.head_cost(arch.d_model, arch.vocab, arch.tied_head)
    return costs.total_cost(
        {"embedding": embedding, **stack, "head": head},
        activation_bytes=kept + 4 * (2 * arch.d_model + 2 * arch.vocab),
        gated_flops=gated_flops,
    )


def build(arch: Arch) -> "LanguageModel":
    """The module, initialised from torch's global generator."""
    from hypernas.search_spaces.nets.lm import build_model  # brings torch

    return build_model(arch)


TRANSFORMER = Family(
    name="transformer",
    keys=TRANSFORMER_KEYS,
    arch=make_arch,
    cost=cost,
    build=build,
    canonical=transformer.canonical,
    joints=transformer.JOINTS,
    interacting=transformer.INTERACTING,
    solves=transformer.solves(Arch),
    deepen=transformer.change_depth,
    growth=GROWTH,
)


class LanguageModels(GridSpace):
    """The space `lm`."""

    name = "lm"
    task = "text"
    presets: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "quick": {"depth": "2..4", "d_model": "32,64,96", "context": "128"},
        "small": {"depth": "2..4", "d_model": "64,96,128", "context": "128"},
        "full": {"depth": "4..16", "d_model": "256..1024", "head_dim": "64", "context": "1024", "streams.n": "1,2,4,8"},
    }
    families = (TRANSFORMER, lstm.FAMILY)
