"""Children that start from their parents' trained weights (`nas search --inherit`): which may, and how.

A child may where it computes its parent's function at birth; search_spaces/growth.py says how that is done. What the
search needs to know follows from architectures alone (`obstacle`, `change`); weights are moved on the worker.
"""

from collections.abc import Mapping
from typing import Any

from safetensors.torch import load
from torch import nn

from hypernas.records import Inheritance
from hypernas.search_spaces.base import Space
from hypernas.search_spaces.grid import GridSpace

PARENT = "parent"  # among a trial's sampler attributes: the number of the trial it is a child of
INHERITED = "inherited"  # beside it: what is new in a child that starts from its parent's weights; and its provenance


def obstacle(space: Space, parent: Any, child: Any) -> str | None:
    """Why the child cannot start from the parent's weights; None where it can."""
    if isinstance(space, GridSpace):
        return space.obstacle(parent, child)
    return None if parent == child else f"space {space.name} says nothing of growth"


def change(parent: Mapping[str, Any], child: Mapping[str, Any]) -> str:
    """What differs between two architectures as JSON, like "depth 2 -> 3"; "recipe" where nothing does."""
    names = dict.fromkeys((*parent, *child))
    changed = [f"{n} {parent.get(n)} -> {child.get(n)}" for n in names if parent.get(n) != child.get(n)]
    return ", ".join(changed) or "recipe"


def inherit(model: nn.Module, space: Space, arch: Any, inherits: Inheritance, weights: bytes) -> None:
    """Puts the parent's trained weights, grown to `arch`, into a model whose weights were drawn."""
    parent, trained = space.from_json(inherits.arch), load(weights)
    if isinstance(space, GridSpace):
        drawn = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        trained = dict(space.grown(parent, trained, arch, drawn))
    model.load_state_dict(trained)


def describe_change(inherits: Inheritance) -> dict[str, Any]:
    """The entry of a trial's provenance that names its parent, and how it differs from it."""
    return {INHERITED: f"trial {inherits.trial}: {inherits.change}"}
