"""Growing a trained Transformer: the weights of a larger one that computes the same function, before it trains on.

One rule serves every change: **what is new writes nothing at first.** A new hidden unit, head, sub-MLP or layer reads
with the weights that were drawn for it, and its output weights are zero. Those get a gradient in the first step, what
it reads with in the second. Net2Net (Chen et al. 2016, 1511.05641) copies units and splits their output instead, which
leaves twins: equal halves have equal gradients for ever. Here nothing is a copy of anything, so there is no symmetry to
break, and a width need not grow by a whole factor.

A wider residual stream, C -> C' channels, carries the old one as x' = s [x, 0] with s = sqrt(C' / C). Then
mean(x'^2) = mean(x^2), so RMSNorm(x') = s [RMSNorm(x), 0] with its epsilon and its old weights. So whatever writes to
the stream is multiplied by s, and whatever reads it, normalised or not, is divided by s. A tied head is both at once:
the norm before it is divided by s^2.

New layers come behind the old ones, or between them where gates ask for that. hc and hc_static start as the exact
identity on the streams. The doubly stochastic mixings (mhc, mhc_lite, kromhc) start e^-8 away from it, but keep the sum
over the streams, which is all that the head reads: behind the last layer, and only there, they change nothing.
New gates start open. So more gates, or another target rate, change no output at birth either.
"""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hypernas.search_spaces.base import arch_to_json
from hypernas.search_spaces.grid import Growth
from hypernas.search_spaces.transformer import Stack

if TYPE_CHECKING:
    from torch import Tensor

Weights = Mapping[str, "Tensor"]  # a state_dict

# What may differ between parent and child, as long as nothing gets smaller; every other key has to be the same.
GROWS = frozenset(
    [
        *("depth", "d_model", "ffn.ratio", "ffn.sub_mlps", "attention.ratio"),
        *("gates.placement", "gates.layers", "gates.rate", "gates.consistency"),
    ]
)
KEEPS_STREAMS = ("none", "hc_static", "hc")  # mixings that start as the identity on every stream
# Names of a model's tensors by what they do to the residual stream; `out.0` is of a net in blocks.
WRITES = re.compile(r"(^embedding\.weight|^positions\.weight|^patches\.conv\.weight|\.out\.(weight|\d+))$")
READS = re.compile(r"((query|key|value|gate_up|linear|head|controller\.0)\.weight|\.projection)$")
LAYER = re.compile(r"^stack\.sublayers\.(\d+)\.")  # two sublayers a layer


def obstacle(parent: Stack, child: Stack) -> str | None:
    """Why the child cannot start as the parent's function; None where it can."""
    before, after = arch_to_json(parent), arch_to_json(child)
    for name in {**before, **after}:
        if name not in GROWS and before.get(name) != after.get(name):
            return f"{name} {before.get(name)} -> {after.get(name)} is another function"
    sizes = {
        "depth": (parent.depth, child.depth),
        "d_model": (parent.d_model, child.d_model),
        "hidden units": (parent.d_hidden, child.d_hidden),
        "attention width": (parent.attention_width, child.attention_width),
        "ffn.sub_mlps": (parent.ffn.sub_mlps or 1, child.ffn.sub_mlps or 1),
    }
    for name, (old, new) in sizes.items():
        if new < old:
            return f"{name} {old} -> {new} takes part of the function away"
    wider, deeper = child.d_model > parent.d_model, child.depth > parent.depth
    if wider and child.norm.kind != "rmsnorm":
        return f"d_model grows, and {child.norm.kind} takes the mean over channels"
    if wider and child.position == "sinusoidal":
        return "d_model grows, and every width has sinusoidal positions of its own"
    if wider and child.ffn.blocks:
        return "d_model grows, and blocks divide its coordinates otherwise"
    if deeper and child.norm.position == "post":
        return "depth grows, and a post-norm layer that writes nothing still normalises"
    places = layer_places(parent, child)
    if places is None:
        return "a gate of the parent has no place in the child"
    if places != tuple(range(parent.depth)) and child.streams.mixing not in KEEPS_STREAMS:
        return f"gates ask for a new layer between old ones, where {child.streams.mixing} would mix the streams"
    return None


def layer_places(parent: Stack, child: Stack) -> tuple[int, ...] | None:
    """Where in the child each of the parent's layers stands: as early as the gates it carries allow, in order.

    None where some layer finds no place that has its gates.
    """
    free = enumerate(child.gated)
    places = []
    for gates in parent.gated:
        place = next((i for i, has in free if all(h or not g for g, h in zip(gates, has, strict=True))), None)
        if place is None:
            return None
        places.append(place)
    return tuple(places)


def grown(parent: Stack, weights: Weights, child: Stack, drawn: Weights) -> "dict[str, Tensor]":
    """The child's weights, from its parent's trained ones and those that were drawn for the child itself.

    Both are state_dicts of one dtype; `obstacle` of the two architectures has to be None.
    """
    import torch  # takes a second and a half, which a space that is only read should not cost

    with torch.no_grad():
        layers = {place: layer for layer, place in enumerate(layer_places(parent, child) or ())}
        scale = math.sqrt(child.d_model / parent.d_model)
        tied = getattr(child, "tied_head", False)
        out: dict[str, Tensor] = {}
        for name, tensor in drawn.items():
            writes = WRITES.search(name) is not None
            new = torch.zeros_like(tensor) if writes else tensor.clone()
            old = weights.get(_ancestor(name, layers))
            if old is not None:
                factor = scale if writes else 1 / scale if READS.search(name) else 1.0
                if tied and name == "norm.weight":
                    factor = 1 / scale**2
                corner = _axes(name, old, parent.d_model)
                _axes(name, new, child.d_model)[tuple(slice(size) for size in corner.shape)] = factor * corner
            out[name] = new
        return out


def _ancestor(name: str, layers: Mapping[int, int]) -> str:
    """What the parent calls a tensor of the child; a name that it has not, where the layer is new."""
    found = LAYER.match(name)
    if found is None:
        return name
    layer, half = divmod(int(found[1]), 2)
    return f"stack.sublayers.{2 * layers[layer] + half}.{name[found.end() :]}" if layer in layers else ""


def _axes(name: str, tensor: "Tensor", d_model: int) -> "Tensor":
    """A view with an axis for everything that grows: the halves of `gate_up`, and the streams, apart."""
    if name.endswith("gate_up.weight"):
        return tensor.unflatten(0, (2, -1))
    if name.endswith((".projection", ".gamma")):
        return tensor.unflatten(-1, (-1, d_model))
    return tensor


GROWTH: Growth[Any] = Growth(obstacle, grown)
