"""Space `lm`: decoder-only language models.

Four ideas are searched together: the feed-forward net's shape (conventional or hourglass), the residual stream's
width n, the Kronecker factorisation of its mixing, and where cosine gates skip computation; with depth and width.

What belongs together is one parameter of the sampler (`ffn` = "hourglass 0.5 x4", `streams` = "4 kromhc 2x2",
`gates` = "ffn upper 0.5"), so every trial has the same parameters and none of them is ever without effect.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import product
from typing import Any, Self

import torch
from torch import Tensor, nn

from search_spaces import layers
from search_spaces.base import (
    Choices,
    Cost,
    Domain,
    Key,
    SpaceError,
    Suggest,
    arch_to_json,
    digest,
    nearest,
    nearest_default,
)
from search_spaces.connections import (
    canonical_streams,
    check_streams,
    connection_cost,
    factorisations,
    make_connection,
)
from search_spaces.gates import CosineGate, gate_cost, gated_layers
from search_spaces.layers import FREE, LayerCost

PARTS = ("embedding", "attention", "ffn", "connections", "gates", "norms", "head")


@dataclass(frozen=True, slots=True)
class Ffn:
    shape: str
    ratio: float  # d_hidden / d_model
    sub_mlps: int | None  # hourglass only
    activation: str


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
    rate: float | None  # target share of executed tokens


@dataclass(frozen=True, slots=True)
class Norm:
    kind: str
    position: str


@dataclass(frozen=True, slots=True)
class Arch:
    """One language model. Flat keys with dots in JSON; what a branch does not use is None and left out."""

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
    vocab: int
    context: int
    tied_head: bool

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


def _key(name: str, default: Any, search: tuple, help: str, **limits: Any) -> Key:
    return Key(name, type(default), default, Choices(search), help, **limits)


KEYS: dict[str, Key] = {
    key.name: key
    for key in (
        _key("family", "transformer", ("transformer",), "kind of network", options=("transformer",)),
        _key("depth", 4, (2, 3, 4, 5, 6), "layers (attention and feed-forward each)", low=1, high=1024),
        _key("d_model", 128, (64, 96, 128, 160, 192), "width of one residual stream", low=8, high=65536),
        _key("head_dim", 16, (16,), "width of an attention head; even", low=2, high=1024),
        _key("ffn.shape", "conventional", ("conventional", "hourglass"), "wide or narrow hidden layer",
             options=("conventional", "hourglass")),
        _key("ffn.ratio", 8 / 3, (2.0, 8 / 3, 4.0, 0.25, 0.375, 0.5),
             "d_hidden / d_model: at least 1 conventional, below 1 hourglass", low=0.01, high=64),
        _key("ffn.sub_mlps", 4, (2, 4, 6), "stacked narrow nets of an hourglass", low=1, high=64),
        _key("ffn.activation", "swiglu", ("swiglu",), "nonlinearity", options=tuple(layers.ACTIVATIONS)),
        _key("attention.ratio", 1.0, (0.5, 1.0), "attention width / d_model", low=0.01, high=16),
        _key("streams.n", 1, (1, 2, 4), "residual streams", options=(1, 2, 3, 4, 6, 8, 9, 12, 16)),
        _key("streams.mixing", "none", ("none", "kromhc"), "how the streams mix",
             options=("none", "hc_static", "hc", "mhc", "mhc_lite", "kromhc")),
        _key("streams.factors", "", ("",), "kromhc's Kronecker factors, like 2x2; empty searches all of n"),
        _key("gates.placement", "none", ("none", "ffn", "attention", "both"), "which sublayers carry cosine gates",
             options=("none", "ffn", "attention", "both")),
        _key("gates.layers", "all", ("all", "upper"), "which layers: all, alternate, upper or a mask like 0110"),
        _key("gates.rate", 0.5, (0.5, 0.75), "target share of executed tokens", low=0.01, high=1.0),
        _key("norm.kind", "rmsnorm", ("rmsnorm",), "normalisation", options=tuple(layers.NORMS)),
        _key("norm.position", "pre", ("pre",), "where the norm stands", options=("pre",)),
        _key("position", "rope", ("rope",), "position encoding", options=tuple(layers.POSITIONS)),
        _key("vocab", 256, (256,), "tokens; 256 is bytes", options=(256,)),
        _key("context", 256, (256,), "tokens a window", low=8, high=1 << 20),
        _key("tied_head", True, (True,), "logits from the embedding's weights"),
    )
}  # fmt: skip


def check(arch: Arch) -> Arch:
    """The architecture, if it can be built. Raises SpaceError naming the value and the legal ones."""
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
    if arch.gates.placement != "none":
        gated_layers(arch.gates.layers or "all", arch.depth)
    return arch


# ---- the space -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LanguageModels:
    """The space `lm`; `restricted` holds the domains that `--set` changed."""

    restricted: Mapping[str, Domain] = field(default_factory=dict)
    name = "lm"
    task = "text"
    presets = {  # noqa: RUF012
        "quick": {"depth": "2..4", "d_model": "32,64,96", "context": "128"},
        "small": {"depth": "2..4", "d_model": "64,96,128", "context": "128"},
        "full": {
            "depth": "4..16",
            "d_model": "256..1024",
            "head_dim": "64",
            "context": "1024",
            "streams.n": "1,2,4,8",
        },
    }

    @property
    def keys(self) -> Mapping[str, Key]:
        return KEYS

    def restrict(self, settings: Mapping[str, str]) -> Self:
        domains = dict(self.restricted)
        for name, text in settings.items():
            if name not in KEYS:
                raise SpaceError(f"unknown key {name!r} in space lm; {nearest(name, tuple(KEYS))}")
            domains[name] = KEYS[name].parse(text)
        if "streams.n" in settings and "streams.mixing" not in domains and "streams.factors" not in domains:
            domains["streams.mixing"] = KEYS["streams.mixing"].search
        space = replace(self, restricted=domains)
        space.check_not_empty()
        return space

    def check_not_empty(self) -> None:
        """Raises SpaceError when the restrictions leave no choice for a group of keys, or no buildable baseline."""
        for options in (self._ffn_options, self._stream_options, self._gate_options):
            if not options:
                raise SpaceError(self._why_empty())
        self.baseline()

    def _why_empty(self) -> str:
        shape, n, mixing = (self._values(key) for key in ("ffn.shape", "streams.n", "streams.mixing"))
        if not self._ffn_options:
            return (
                f"ffn.shape={','.join(shape)} has no legal ffn.ratio among "
                f"{', '.join(f'{ratio:g}' for ratio in self._values('ffn.ratio'))}: "
                "wanted at least 1 for conventional, below 1 for hourglass"
            )
        # Let the check name what is wrong with the first combination.
        factors = self._values("streams.factors")[0] or "x".join(str(n[0]))
        check_streams(n[0], mixing[0], factors if mixing[0] == "kromhc" else "")
        return f"no streams.factors multiply to streams.n={','.join(map(str, n))}"

    def _values(self, name: str) -> tuple:
        """What a key may be, in the search."""
        domain = self.restricted.get(name, KEYS[name].search)
        assert isinstance(domain, Choices)  # every key of this space is searched on a grid
        return domain.values

    def _default(self, name: str) -> Any:
        """The baseline's value: the key's own default, or the nearest that is allowed."""
        return nearest_default(KEYS[name], self.restricted[name]) if name in self.restricted else KEYS[name].default

    @cached_property
    def _ffn_options(self) -> dict[str, tuple[str, float, int | None]]:
        def options() -> Iterator[tuple[str, float, int | None]]:
            for shape, ratio in product(self._values("ffn.shape"), self._values("ffn.ratio")):
                if (shape == "hourglass") == (ratio < 1):
                    counts = self._values("ffn.sub_mlps") if shape == "hourglass" else (None,)
                    yield from ((shape, ratio, count) for count in counts)

        return {f"{s} {r:.4g}" + (f" x{k}" if k else ""): (s, r, k) for s, r, k in options()}

    @cached_property
    def _stream_options(self) -> dict[str, tuple[int, str, str | None]]:
        out: dict[str, tuple[int, str, str | None]] = {}
        for n, mixing in product(self._values("streams.n"), self._values("streams.mixing")):
            asked = self._values("streams.factors")
            every = factorisations(n) if asked == ("",) else asked
            for factors in every if mixing == "kromhc" else ("",):
                try:
                    check_streams(n, mixing, factors)
                except SpaceError:
                    continue
                out[f"{n} {mixing} {factors}".strip()] = (n, mixing, factors or None)
        return out

    @cached_property
    def _gate_options(self) -> dict[str, tuple[str, str | None, float | None]]:
        out: dict[str, tuple[str, str | None, float | None]] = {}
        for placement in self._values("gates.placement"):
            if placement == "none":
                out["none"] = ("none", None, None)
                continue
            for chosen, rate in product(self._values("gates.layers"), self._values("gates.rate")):
                out[f"{placement} {chosen} {rate:g}"] = (placement, chosen, rate)
        return out

    def _assemble(self, ffn: tuple, streams: tuple, gates: tuple, pick: Mapping[str, Any]) -> Arch:
        return Arch(
            family=pick["family"],
            depth=pick["depth"],
            d_model=pick["d_model"],
            head_dim=pick["head_dim"],
            ffn=Ffn(ffn[0], ffn[1], ffn[2], pick["ffn.activation"]),
            attention=AttentionShape(pick["attention.ratio"]),
            streams=Streams(*streams),
            gates=Gates(*gates),
            norm=Norm(pick["norm.kind"], pick["norm.position"]),
            position=pick["position"],
            vocab=pick["vocab"],
            context=pick["context"],
            tied_head=pick["tied_head"],
        )

    def baseline(self) -> Arch:
        """A plain pre-norm SwiGLU Transformer, as far as the restrictions allow."""
        ratio, shape = self._default("ffn.ratio"), self._default("ffn.shape")
        options = [option for option in self._ffn_options.values() if option[0] == shape]
        if not options:
            raise SpaceError(self._why_empty())
        ffn = min(options, key=lambda option: (option[1] != ratio, option[2] != self._default("ffn.sub_mlps")))
        streams = next(iter(self._stream_options.values()))
        gates = next(iter(self._gate_options.values()))
        return check(self._assemble(ffn, streams, gates, {name: self._default(name) for name in SINGLE}))

    def suggest(self, trial: Suggest) -> Arch:
        pick = {name: Choices(self._values(name)).suggest(trial, name) for name in SINGLE}
        groups = {name: options[Choices(tuple(options)).suggest(trial, name)] for name, options in self._groups.items()}
        return check(self._assemble(groups["ffn"], groups["streams"], groups["gates"], pick))

    @property
    def _groups(self) -> dict[str, dict[str, tuple]]:
        return {"ffn": self._ffn_options, "streams": self._stream_options, "gates": self._gate_options}

    def params(self, arch: Arch) -> dict[str, Any]:
        flat = arch_to_json(arch)
        chosen = {
            "ffn": (arch.ffn.shape, arch.ffn.ratio, arch.ffn.sub_mlps),
            "streams": (arch.streams.n, arch.streams.mixing, arch.streams.factors),
            "gates": (arch.gates.placement, arch.gates.layers, arch.gates.rate),
        }
        params: dict[str, Any] = {}
        for name in SINGLE:
            values = self._values(name)
            if flat[name] not in values:
                raise SpaceError(f"{name}={flat[name]} is outside the search: {', '.join(map(str, values))}")
            if len(values) > 1:
                params[name] = flat[name]
        for name, options in self._groups.items():
            label = next((label for label, option in options.items() if option == chosen[name]), None)
            if label is None:
                raise SpaceError(f"{name} {chosen[name]} is outside the search: {', '.join(options)}")
            if len(options) > 1:
                params[name] = label
        return params

    def largest(self) -> Arch:
        """Most FLOPs: deepest, widest, and the costliest of each group there."""
        top = {name: self._values(name)[0] for name in SINGLE}
        top |= {name: max(self._values(name)) for name in ("depth", "d_model", "attention.ratio", "context")}
        gates = max(self._gate_options.values(), key=lambda option: option[0] == "none")
        ffn, streams, none = (next(iter(options.values())) for options in self._groups.values())
        ffn = max(
            self._ffn_options.values(), key=lambda o: self.cost(self._assemble(o, streams, none, top)).flops_total
        )
        streams = max(
            self._stream_options.values(), key=lambda o: self.cost(self._assemble(ffn, o, none, top)).flops_total
        )
        return self._assemble(ffn, streams, gates, top)

    def from_json(self, arch: Mapping[str, Any]) -> Arch:
        unknown = next((name for name in arch if name not in KEYS), None)
        if unknown:
            raise SpaceError(f"unknown key {unknown!r} in space lm; {nearest(unknown, tuple(KEYS))}")
        flat = {name: self._default(name) for name in KEYS}
        if "ffn.ratio" not in arch and arch.get("ffn.shape", flat["ffn.shape"]) == "hourglass":
            flat["ffn.ratio"] = 0.5
        if "streams.mixing" not in arch and int(arch.get("streams.n", flat["streams.n"])) > 1:
            flat["streams.mixing"] = "kromhc"
        flat |= {name: KEYS[name].check(value) for name, value in arch.items()}
        if flat["streams.mixing"] != "kromhc":
            flat["streams.factors"] = None
        elif not flat["streams.factors"]:
            flat["streams.factors"] = next(iter(factorisations(flat["streams.n"])), "")
        if flat["ffn.shape"] == "conventional":
            flat["ffn.sub_mlps"] = None
        if flat["gates.placement"] == "none":
            flat["gates.layers"] = flat["gates.rate"] = None
        nested = {"ffn": Ffn, "attention": AttentionShape, "streams": Streams, "gates": Gates, "norm": Norm}
        groups = {
            group: kind(**{f.name: flat.pop(f"{group}.{f.name}") for f in fields(kind)})
            for group, kind in nested.items()
        }
        return check(Arch(**flat, **groups))

    def arch_hash(self, arch: Arch) -> str:
        n, mixing, factors = canonical_streams(arch.streams.n, arch.streams.mixing, arch.streams.factors or "")
        flat = arch_to_json(replace(arch, streams=Streams(n, mixing, factors or None)))
        if arch.gates.placement != "none":
            flat["gates.layers"] = "".join(str(int(on)) for on in gated_layers(arch.gates.layers or "all", arch.depth))
        # Ratios count by the whole widths they lead to.
        flat |= {"ffn.ratio": arch.d_hidden, "attention.ratio": arch.attention_width}
        return digest(flat)

    def cost(self, arch: Arch) -> Cost:
        return cost(arch)

    def build(self, arch: Arch) -> nn.Module:
        return build(arch)


SINGLE = tuple(name for name in KEYS if not name.startswith(("ffn.s", "ffn.r", "streams.", "gates.")))


# ---- cost ----------------------------------------------------------------------------------------------------


def _branch_costs(arch: Arch) -> tuple[LayerCost, int, LayerCost, int, LayerCost]:
    """Attention with the FLOPs a skipped query saves, the FFN with those a skipped token saves, one norm."""
    norm = LayerCost(*layers.norm_cost(arch.norm.kind, arch.d_model))
    attention, query_flops = layers.attention_cost(
        arch.d_model, arch.attention_width, arch.head_dim, arch.context, arch.position == "rope"
    )
    net = layers.ffn_cost(arch.ffn.activation, arch.d_model, arch.d_hidden)
    nets = arch.ffn.sub_mlps or 1
    adds = LayerCost(0, 0, 2 * (nets - 1) * arch.d_model)  # h + total, and the sum
    ffn = net.times(nets) + adds
    skipped = ffn.matmul + ffn.elementwise + nets * norm.elementwise
    return attention, query_flops, ffn, skipped, norm


def cost(arch: Arch) -> Cost:
    """Parameters and FLOPs a token by part, from the architecture alone."""
    attention, query_flops, ffn, ffn_flops, norm = _branch_costs(arch)
    connection = LayerCost(
        *connection_cost(arch.streams.n, arch.streams.mixing, arch.streams.factors or "", arch.d_model)
    )
    gate = LayerCost(*gate_cost(arch.d_model))
    gated = arch.gated
    positions = {"rope": 0, "learned": arch.context * arch.d_model, "sinusoidal": 0}[arch.position]
    embedding = LayerCost(arch.vocab * arch.d_model + positions, 0, 0 if arch.position == "rope" else arch.d_model)
    parts = {
        "embedding": embedding,
        "attention": attention.times(arch.depth),
        "ffn": ffn.times(arch.depth),
        "connections": connection.times(2 * arch.depth),
        "gates": gate.times(sum(map(sum, gated))) if any(map(any, gated)) else FREE,
        "norms": norm.times(arch.depth * (1 + (arch.ffn.sub_mlps or 1)) + 1),
        "head": LayerCost(0 if arch.tied_head else arch.vocab * arch.d_model, 2 * arch.d_model * arch.vocab, 0),
    }
    saved = [flops for pair in gated for on, flops in zip(pair, (query_flops, ffn_flops), strict=True) if on]
    # Kept for backward, in float32: the streams and what each branch's products need.
    nets = arch.ffn.sub_mlps or 1
    kept = arch.depth * (
        2 * arch.streams.n * arch.d_model
        + 3 * arch.d_model
        + 4 * arch.attention_width
        + arch.context * (arch.attention_width // arch.head_dim)
        + nets * (2 * arch.d_model + 4 * arch.d_hidden)
    )
    return Cost(
        parameters={name: part.parameters for name, part in parts.items()},
        flops={name: part.matmul + part.elementwise for name, part in parts.items()},
        matmul=sum(part.matmul for part in parts.values()),
        elementwise=sum(part.elementwise for part in parts.values()),
        activation_bytes=4 * (kept + 2 * arch.d_model + 2 * arch.vocab),
        gated_flops=tuple(saved),
    )


# ---- the module ----------------------------------------------------------------------------------------------


class LanguageModel(nn.Module):
    """Byte (or token) embedding, sublayers on residual streams, a norm, logits."""

    def __init__(
        self,
        vocab: int,
        d_model: int,
        context: int,
        positions: nn.Module,
        sublayers: list[nn.Module],
        norm: nn.Module,
        head: nn.Module,
    ) -> None:
        super().__init__()
        self.vocab, self.d_model, self.context = vocab, d_model, context
        self.embedding = nn.Embedding(vocab, d_model)
        self.positions = positions
        self.sublayers = nn.ModuleList(sublayers)
        self.norm = norm
        self.head = head

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) integers, T at most `context` -> logits (B, T, vocab)."""
        x = self.positions(self.embedding(tokens))
        streams = self.sublayers[0].connection.expand(x)
        for sublayer in self.sublayers:
            streams = sublayer(streams)
        x = self.norm(self.sublayers[-1].connection.reduce(streams))
        return self.head(x, self.embedding.weight)

    @torch.no_grad()
    def generate(self, tokens: Tensor, count: int, temperature: float, generator: torch.Generator | None) -> Tensor:
        """tokens (B, T) continued by `count` sampled ones -> (B, T + count); the last `context` tokens are seen."""
        self.eval()
        for _ in range(count):
            logits = self(tokens[:, -self.context :])[:, -1] / max(temperature, 1e-6)
            following = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, following], dim=1)
        return tokens


def _ffn(arch: Arch) -> nn.Module:
    norm, net = layers.NORMS[arch.norm.kind], layers.ACTIVATIONS[arch.ffn.activation]
    if arch.ffn.shape == "conventional":
        return layers.PreNormFFN(norm(arch.d_model), net(arch.d_model, arch.d_hidden))
    nets = [layers.PreNorm(norm(arch.d_model), net(arch.d_model, arch.d_hidden)) for _ in range(arch.ffn.sub_mlps or 1)]
    return layers.Hourglass(nets)


def _attention(arch: Arch) -> nn.Module:
    rotary = layers.Rotary(arch.head_dim, arch.context) if arch.position == "rope" else layers.NoRotation()
    attention = layers.Attention(arch.d_model, arch.attention_width, arch.head_dim, rotary)
    return layers.PreNormAttention(layers.NORMS[arch.norm.kind](arch.d_model), attention)


def build(arch: Arch) -> LanguageModel:
    """The module, initialised from torch's global generator."""
    _, query_flops, _, ffn_flops, _ = _branch_costs(arch)
    sublayers: list[nn.Module] = []
    for gated in arch.gated:
        for branch, on, flops in zip((_attention(arch), _ffn(arch)), gated, (query_flops, ffn_flops), strict=True):
            connection = make_connection(
                arch.streams.n, arch.streams.mixing, arch.streams.factors or "", arch.d_model, len(sublayers)
            )
            if on:
                gate = CosineGate(arch.d_model, arch.gates.rate or 1.0, float(flops))
                sublayers.append(layers.GatedSublayer(connection, branch, gate))
            else:
                sublayers.append(layers.Sublayer(connection, branch))
    positions = layers.POSITIONS[arch.position]
    model = LanguageModel(
        vocab=arch.vocab,
        d_model=arch.d_model,
        context=arch.context,
        positions=positions() if arch.position == "rope" else positions(arch.d_model, arch.context),
        sublayers=sublayers,
        norm=layers.NORMS[arch.norm.kind](arch.d_model),
        head=layers.TiedHead() if arch.tied_head else layers.Head(arch.d_model, arch.vocab),
    )
    layers.initialise(model, branches=2 * arch.depth)
    return model
