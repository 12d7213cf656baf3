"""The stack of attention and feed-forward sublayers on residual streams that `lm` and the ViT of `vision` share.

Four ideas meet here: the feed-forward net's shape (conventional or hourglass), the residual stream's width n, the
Kronecker factorisation of its mixing, and where cosine gates skip computation.

What belongs together is one parameter of the sampler (`ffn` = "hourglass 0.5 x4", `streams` = "4 kromhc 2x2",
`gates` = "ffn upper 0.5"), so every trial has the same parameters and none of them is ever without effect.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple, TypeVar

from hypernas.search_spaces import costs
from hypernas.search_spaces.base import Choices, Key, SpaceError, arch_from, arch_to_json
from hypernas.search_spaces.costs import FREE, LayerCost
from hypernas.search_spaces.grid import Flat, Joint, Options, Solve, Values
from hypernas.search_spaces.streams import (
    MIXINGS,
    STREAMS,
    canonical_streams,
    check_streams,
    connection_cost,
    factorisations,
)


@dataclass(frozen=True, slots=True)
class Ffn:
    shape: str
    ratio: float  # d_hidden / d_model
    sub_mlps: int | None  # hourglass only
    activation: str
    blocks: int | None  # independent ones that a net is made of; None: it is dense


@dataclass(frozen=True, slots=True)
class AttentionShape:
    ratio: float  # attention width / d_model


@dataclass(frozen=True, slots=True)
class Streams:
    n: int
    mixing: str
    factors: str | None  # kromhc only, like "2x2"


@dataclass(frozen=True, slots=True)
class Gates:
    placement: str
    layers: str | None
    rate: float | None  # target share of executed tokens (or images)
    consistency: str | None  # what its loss asks of a gate's decisions


@dataclass(frozen=True, slots=True)
class Norm:
    kind: str
    position: str


@dataclass(frozen=True, slots=True)
class Stack:
    """The keys of a Transformer whatever it reads. Flat with dots in JSON; what a branch does not use is None."""

    family: str
    depth: int
    d_model: int
    head_dim: int
    ffn: Ffn
    attention: AttentionShape
    streams: Streams
    gates: Gates
    norm: Norm
    position: str

    @property
    def d_hidden(self) -> int:
        """Hidden units of a feed-forward net (of each sub-MLP), a multiple of 8."""
        return max(8, 8 * round(self.ffn.ratio * self.d_model / 8))

    @property
    def attention_width(self) -> int:
        return round(self.attention.ratio * self.d_model)

    @property
    def gated(self) -> tuple[tuple[bool, bool], ...]:
        """For each layer, whether its attention and its feed-forward net carry a gate."""
        if self.gates.placement == "none":
            return ((False, False),) * self.depth
        chosen = gated_layers(self.gates.layers or "all", self.depth)
        attention, ffn = self.gates.placement in ("attention", "both"), self.gates.placement in ("ffn", "both")
        return tuple((on and attention, on and ffn) for on in chosen)


def gated_layers(layers: str, depth: int) -> tuple[bool, ...]:
    """Which of `depth` layers `gates.layers` names: all, alternate (every second, from the second), upper, or a mask.

    Upper is the upper half; with an odd depth it holds the middle layer. Raises SpaceError.
    """
    if layers == "all":
        return (True,) * depth
    if layers == "alternate":
        return tuple(layer % 2 == 1 for layer in range(depth))
    if layers == "upper":
        return tuple(layer >= depth // 2 for layer in range(depth))
    if len(layers) != depth or set(layers) - {"0", "1"}:
        raise SpaceError(f"gates.layers={layers}: wanted all, alternate, upper or a mask of {depth} digits 0 and 1")
    return tuple(digit == "1" for digit in layers)


AnyStack = TypeVar("AnyStack", bound=Stack)


# Names of what `layers.py` and `gates.py` build; a test holds them equal to the tables there.
NORMS = ("rmsnorm", "layernorm")
POSITIONS = ("rope", "learned", "sinusoidal")
CONSISTENCIES = ("distance", "perturbation")


# ---- keys ----------------------------------------------------------------------------------------------------


def make_key(name: str, default: Any, search: tuple, help: str, **limits: Any) -> Key:
    return Key(name, type(default), default, Choices(search), help, **limits)


def by_name(*keys: Key) -> dict[str, Key]:
    return {key.name: key for key in keys}


CONSISTENCY = make_key("gates.consistency", "distance", ("distance",),
                       "gated output close to the whole one (distance), or steady under small changes (perturbation)",
                       options=CONSISTENCIES)  # fmt: skip
STACK_KEYS = by_name(
    make_key("head_dim", 16, (16,), "width of an attention head; even", low=2, high=1024),
    make_key("ffn.shape", "conventional", ("conventional", "hourglass"), "wide or narrow hidden layer",
             options=("conventional", "hourglass")),
    make_key("ffn.ratio", 8 / 3, (2.0, 8 / 3, 4.0, 0.25, 0.375, 0.5),
             "d_hidden / d_model: at least 1 conventional, below 1 hourglass", low=0.01, high=64),
    make_key("ffn.sub_mlps", 4, (2, 4, 6), "stacked narrow nets of an hourglass", low=1, high=64),
    make_key("ffn.activation", "swiglu", ("swiglu",), "nonlinearity", options=tuple(costs.ACTIVATION_FLOPS)),
    make_key("ffn.blocks", 1, (1,), "independent blocks that every feed-forward net is made of", options=(1, 2, 4, 8)),
    make_key("attention.ratio", 1.0, (0.5, 1.0), "attention width / d_model", low=0.01, high=16),
    make_key("streams.n", 1, (1, 2, 4), "residual streams", options=STREAMS),
    make_key("streams.mixing", "none", ("none", "kromhc"), "how the streams mix", options=MIXINGS),
    make_key("streams.factors", "", ("",), "kromhc's Kronecker factors, like 2x2; empty searches all of n"),
    make_key("gates.placement", "none", ("none", "ffn", "attention", "both"), "which sublayers carry cosine gates",
             options=("none", "ffn", "attention", "both")),
    make_key("gates.layers", "all", ("all", "upper"), "which layers: all, alternate, upper or a mask like 0110"),
    make_key("gates.rate", 0.5, (0.5, 0.75), "target share of executed tokens", low=0.01, high=1.0),
    CONSISTENCY,
    make_key("norm.kind", "rmsnorm", ("rmsnorm",), "normalisation", options=NORMS),
    make_key("norm.position", "pre", ("pre",), "before each branch, or after its addition to the stream",
             options=("pre", "post")),
    make_key("position", "rope", ("rope",), "position encoding", options=POSITIONS),
)  # fmt: skip

TEXT_KEYS = by_name(
    make_key("vocab", 256, (256,), "tokens; 256 is bytes", options=(256,)),
    make_key("context", 256, (256,), "tokens a window", low=8, high=1 << 20),
    make_key("tied_head", True, (True,), "logits from the embedding's weights"),
)


def _ffn_options(values: Values) -> Options:
    out: dict[str, Flat] = {}
    for shape, ratio, blocks in product(values("ffn.shape"), values("ffn.ratio"), values("ffn.blocks")):
        if (shape == "hourglass") != (ratio < 1):
            continue
        option = {"ffn.shape": shape, "ffn.ratio": ratio, "ffn.blocks": blocks}
        apart = f" in {blocks} blocks" if blocks > 1 else ""
        for count in values("ffn.sub_mlps") if shape == "hourglass" else ():
            out[f"{shape} {ratio:.4g} x{count}{apart}"] = option | {"ffn.sub_mlps": count}
        if shape == "conventional":
            out[f"{shape} {ratio:.4g}{apart}"] = option
    if not out:
        raise SpaceError(
            f"ffn.shape={','.join(values('ffn.shape'))} has no legal ffn.ratio among "
            f"{', '.join(f'{ratio:g}' for ratio in values('ffn.ratio'))}: "
            "wanted at least 1 for conventional, below 1 for hourglass"
        )
    return out


def _stream_options(values: Values) -> Options:
    out: dict[str, Flat] = {}
    wrong: list[SpaceError] = []
    for n, mixing in product(values("streams.n"), values("streams.mixing")):
        asked = values("streams.factors")
        every = (factorisations(n) or ("",)) if asked == ("",) else asked
        for factors in every if mixing == "kromhc" else ("",):
            try:
                check_streams(n, mixing, factors)
            except SpaceError as error:
                wrong.append(error)
                continue
            option = {"streams.n": n, "streams.mixing": mixing}
            out[f"{n} {mixing} {factors}".strip()] = option | ({"streams.factors": factors} if factors else {})
    if not out:
        raise wrong[-1]  # of the last mixing tried, kromhc where it is not given: factors are meant for it
    return out


def gate_options(values: Values) -> Options:
    out: dict[str, Flat] = {}
    for placement in values("gates.placement"):
        if placement == "none":
            out["none"] = {"gates.placement": "none"}
            continue
        for chosen, rate, form in product(values("gates.layers"), values("gates.rate"), values("gates.consistency")):
            option = {"gates.placement": placement, "gates.layers": chosen, "gates.rate": rate}
            label = f"{placement} {chosen} {rate:g}" + (f" {form}" if form != "distance" else "")
            out[label] = option | {"gates.consistency": form}
    return out


GATE_CHOICES = Joint(
    "gates",
    ("gates.placement", "gates.layers", "gates.rate", "gates.consistency"),
    gate_options,
    ({"gates.placement": "none"}, {"gates.layers": "all", "gates.rate": 0.5, "gates.consistency": "distance"}),
)
JOINTS = (
    Joint(
        "ffn",
        ("ffn.shape", "ffn.ratio", "ffn.sub_mlps", "ffn.blocks"),
        _ffn_options,
        (
            {"ffn.shape": "conventional", "ffn.ratio": 8 / 3, "ffn.blocks": 1},
            {"ffn.shape": "hourglass", "ffn.ratio": 0.5, "ffn.sub_mlps": 4, "ffn.blocks": 1},
        ),
    ),
    Joint(
        "streams",
        ("streams.n", "streams.mixing", "streams.factors"),
        _stream_options,
        ({"streams.n": 1, "streams.mixing": "none"},),
    ),
    GATE_CHOICES,
)
INTERACTING = (("d_model", "attention.ratio", "head_dim"), ("depth", "gates"), ("norm.position", "streams"))


# ---- architectures -------------------------------------------------------------------------------------------


def without_unused(flat: Flat) -> dict[str, Any]:
    """The keys that have an effect beside the others."""
    flat = dict(flat)
    if flat["ffn.shape"] == "conventional":
        flat.pop("ffn.sub_mlps", None)
    if flat.get("ffn.blocks") == 1:
        del flat["ffn.blocks"]
    if flat["streams.mixing"] != "kromhc":
        flat.pop("streams.factors", None)
    return without_idle_gates(flat)


def without_idle_gates(flat: Flat) -> dict[str, Any]:
    idle = flat["gates.placement"] == "none"
    return {name: value for name, value in flat.items() if not (idle and name in GATE_CHOICES.keys[1:])}


def stack_arch(kind: type[AnyStack], flat: Flat) -> AnyStack:
    """The architecture of a flat dictionary, if it can be built. Raises SpaceError naming value and legal ones."""
    return check(arch_from(kind, without_unused(flat)))


def fitted_arch(kind: type[AnyStack], flat: Flat) -> AnyStack:
    """As `stack_arch`, with the attention width moved to the multiple of head_dim that is nearest."""
    heads = max(1, round(flat["attention.ratio"] * flat["d_model"] / flat["head_dim"]))
    return stack_arch(kind, {**flat, "attention.ratio": heads * flat["head_dim"] / flat["d_model"]})


def solves(kind: type[Stack]) -> Mapping[str, Solve]:
    """Even widths 4 apart: fine enough to meet a budget, and rows stay aligned to 16 bytes."""
    return {
        "d_model": Solve(4, lambda flat: fitted_arch(kind, flat)),
        "depth": Solve(1, lambda flat: stack_arch(kind, flat)),
    }


def change_depth(flat: Flat, depth: int) -> Flat:
    """The same shape with another number of layers; a mask of gates is stretched over them."""
    mask = flat.get("gates.layers", "all")
    if set(mask) <= {"0", "1"}:
        flat = {**flat, "gates.layers": "".join(mask[i * len(mask) // depth] for i in range(depth))}
    return {**flat, "depth": depth}


def check(arch: AnyStack) -> AnyStack:
    if arch.head_dim % 2:
        raise SpaceError(f"head_dim={arch.head_dim}: wanted an even number")
    if arch.attention_width % arch.head_dim or arch.attention_width < arch.head_dim:
        legal = [d for d in range(2, arch.attention_width + 1, 2) if arch.attention_width % d == 0]
        raise SpaceError(
            f"head_dim={arch.head_dim} does not divide the attention width {arch.attention_width} "
            f"(attention.ratio {arch.attention.ratio:g} x d_model {arch.d_model}); "
            f"legal: {', '.join(map(str, legal)) or 'none: widen attention.ratio'}"
        )
    if (arch.ffn.shape == "hourglass") != (arch.ffn.ratio < 1):
        wanted = "below 1" if arch.ffn.shape == "hourglass" else "at least 1"
        raise SpaceError(f"ffn.ratio={arch.ffn.ratio:g} with ffn.shape={arch.ffn.shape}: wanted {wanted}")
    check_streams(arch.streams.n, arch.streams.mixing, arch.streams.factors or "")
    if arch.norm.position == "post" and (arch.streams.n, arch.streams.mixing) != (1, "none"):
        raise SpaceError(
            f"norm.position=post with streams.n={arch.streams.n} and streams.mixing={arch.streams.mixing}: "
            "wanted streams.n=1 and streams.mixing=none, since a norm over the stream undoes what mixing keeps"
        )
    if arch.gates.placement != "none":
        gated_layers(arch.gates.layers or "all", arch.depth)
    return arch


def canonical(arch: Stack) -> dict[str, Any]:
    """Equal for architectures that are the same function."""
    n, mixing, factors = canonical_streams(arch.streams.n, arch.streams.mixing, arch.streams.factors or "")
    flat: dict[str, Any] = arch_to_json(replace(arch, streams=Streams(n, mixing, factors or None)))
    # Ratios count by the whole widths they lead to.
    flat |= {"ffn.ratio": arch.d_hidden, "attention.ratio": arch.attention_width}
    return canonical_gates(flat, [any(pair) for pair in arch.gated])


def canonical_gates(flat: Flat, gated: Iterable[bool]) -> dict[str, Any]:
    """Names of layers written as the mask they stand for; a mask without a gate is no gate."""
    mask = "".join(str(int(on)) for on in gated)
    if flat["gates.placement"] != "none" and "1" in mask:
        # Its usual value goes unnamed: hashes are older than the key.
        usual = flat["gates.consistency"] == CONSISTENCY.default
        named = {name: value for name, value in flat.items() if not (usual and name == CONSISTENCY.name)}
        return named | {"gates.layers": mask}
    return without_idle_gates({**flat, "gates.placement": "none"})


# ---- cost ----------------------------------------------------------------------------------------------------


class BranchCosts(NamedTuple):
    attention: LayerCost
    query: int  # FLOPs that a skipped query saves
    ffn: LayerCost
    token: int  # FLOPs that a token saves which skips the feed-forward net
    norm: LayerCost


def branch_costs(arch: Stack, tokens: int) -> BranchCosts:
    """The branches of one layer, per token of a sequence of `tokens`."""
    norm = costs.norm_cost(arch.norm.kind, arch.d_model)
    rope = arch.position == "rope"
    attention, query = costs.attention_cost(arch.d_model, arch.attention_width, arch.head_dim, tokens, rope)
    sizes = zip(*ffn_blocks(arch), strict=True)
    net = LayerCost(*map(sum, zip(*(costs.ffn_cost(arch.ffn.activation, *size) for size in sizes), strict=True)))
    nets = arch.ffn.sub_mlps or 1
    ffn = net.times(nets) + LayerCost(0, 0, 2 * (nets - 1) * arch.d_model)  # h + total, and the sum
    return BranchCosts(attention, query, ffn, ffn.matmul + ffn.elementwise + inner_norms(arch) * norm.elementwise, norm)


def ffn_blocks(arch: Stack) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Coordinates and hidden units of each block of a feed-forward net, as equal as whole numbers can be."""
    blocks = arch.ffn.blocks or 1

    def parts(total: int) -> tuple[int, ...]:
        return tuple(total // blocks + (b < total % blocks) for b in range(blocks))

    return parts(arch.d_model), parts(arch.d_hidden)


def inner_norms(arch: Stack) -> int:
    """Norms inside one feed-forward branch: one before each net, but none before a conventional one of a post-norm
    layer."""
    return arch.ffn.sub_mlps or int(arch.norm.position == "pre")


def stack_cost(arch: Stack, tokens: int) -> tuple[dict[str, LayerCost], tuple[int, ...], int]:
    """(parts, what each gate saves, activation bytes), all per token of a sequence of `tokens`."""
    branches = branch_costs(arch, tokens)
    connection = LayerCost(
        *connection_cost(arch.streams.n, arch.streams.mixing, arch.streams.factors or "", arch.d_model)
    )
    gates = sum(map(sum, arch.gated))
    # Pre: one before attention, those of the feed-forward branch, one before the head. Post: one after each sum.
    norms = arch.depth * (1 + inner_norms(arch)) + 1
    if arch.norm.position == "post":
        norms = arch.depth * (2 + inner_norms(arch))
    parts = {
        "attention": branches.attention.times(arch.depth),
        "ffn": branches.ffn.times(arch.depth),
        "connections": connection.times(2 * arch.depth),
        "gates": LayerCost(*costs.gate_cost(arch.d_model)).times(gates) if gates else FREE,
        "norms": branches.norm.times(norms),
    }
    saved = tuple(
        flops for pair in arch.gated for on, flops in zip(pair, (branches.query, branches.token), strict=True) if on
    )
    # Kept for backward, in float32: the streams and what each branch's products need.
    nets = arch.ffn.sub_mlps or 1
    kept = arch.depth * (
        2 * arch.streams.n * arch.d_model
        + 3 * arch.d_model
        + 4 * arch.attention_width
        + tokens * (arch.attention_width // arch.head_dim)
        + nets * (2 * arch.d_model + 4 * arch.d_hidden)
    )
    return parts, saved, 4 * kept


def position_cost(arch: Stack, tokens: int) -> LayerCost:
    """Positions added to the embeddings, per token."""
    table = tokens * arch.d_model if arch.position == "learned" else 0
    return LayerCost(table, 0, 0 if arch.position == "rope" else arch.d_model)
