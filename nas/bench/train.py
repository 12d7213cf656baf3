"""`nas bench train`: whole training steps, back end against back end and against what people train with today.

Every row is tokens a second of the product's own training step (forward, backward, clipping, AdamW) on one thread, and
its ratio to the row of the same name called its baseline; a ratio is the median over rounds in which all rows take
turns, by `thread_time`, as in `nas bench kernels`. In float32; and once more with products in bfloat16, everybody's,
on a CPU that trains so.

On a GPU (`--device cuda`) the rows are those of `hypernas.bench.device_steps`.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hypernas.bench.device import device_name, versions
from hypernas.bench.timing import median_ratio, time_candidates
from hypernas.errors import UserError
from hypernas.kernels import dispatch, processor
from hypernas.records import Recipe
from hypernas.search_spaces.connections import KroneckerHyperConnection
from hypernas.search_spaces.gates import CosineGate, gates_of
from hypernas.search_spaces.layers import ResidualStack, attention
from hypernas.search_spaces.lm import LanguageModels
from hypernas.training.device import deterministic, product_dtype
from hypernas.training.step import make_optimizers, train_step

BATCH_TOKENS = 2048
SKIP_TOKENS = 32_768
PROFILED = 5  # steps
ATTENTION = (16, 4, 256, 32)  # batch, heads, tokens, channels a head
SIZE: dict[str, Any] = {"depth": 4, "d_model": 128, "context": 128}
STREAMS = {"streams.n": 4, "streams.mixing": "kromhc", "streams.factors": "2x2"}
HOURGLASS = {"ffn.shape": "hourglass", "ffn.ratio": 0.5, "ffn.sub_mlps": 4}
GATES = {"gates.placement": "ffn"}
PLAIN: dict[str, Any] = {
    "norm.kind": "layernorm", "position": "learned", "ffn.ratio": 4.0, "ffn.activation": "gelu", "head_dim": 16
}  # fmt: skip
CPU = torch.device("cpu")


class PublishedKromHC(KroneckerHyperConnection):
    """KromHC as its authors write it: every matrix made, streams normalised before they are projected."""

    def read(self, X: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        flat = X.flatten(-2)
        normalised = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.gamma)
        logits = self.alpha[self.columns] * (normalised @ self.projection.mT) + self.bias
        pre, post = logits[..., : 2 * self.n].sigmoid().unflatten(-1, (2, self.n)).unbind(-2)
        return torch.einsum("btn,btnc->btc", pre, X), (2 * post, *self.mixing(logits[..., 2 * self.n :]))

    def write(self, X: Tensor, y: Tensor, coefficients: tuple[Tensor, ...]) -> Tensor:
        post, *factors = coefficients
        matrix = factors[0]
        for factor in factors[1:]:
            matrix = torch.einsum("btij,btkl->btikjl", matrix, factor).flatten(-2).flatten(-3, -2)
        return matrix @ X + post.unsqueeze(-1) * y.unsqueeze(-2)


class PeerStack(nn.Module):
    """The branches of a residual stack on the streams of the package `hyper-connections`, mHC with n streams."""

    def __init__(self, stack: ResidualStack, n: int, d_model: int) -> None:
        super().__init__()
        from hyper_connections.manifold_constrained_hyper_connections import (
            get_init_and_expand_reduce_stream_functions,
        )

        connection, self.expand, self.reduce = get_init_and_expand_reduce_stream_functions(n, dim=d_model)
        self.sublayers = nn.ModuleList(
            [connection(branch=sublayer, layer_index=index) for index, sublayer in enumerate(stack.sublayers)]
        )

    def forward(self, x: Tensor) -> Tensor:
        streams = self.expand(x)
        for sublayer in self.sublayers:
            streams = sublayer(streams)
        return self.reduce(streams)


class PlainBlock(nn.Module):
    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.project = nn.Linear(d_model, d_model, bias=False)
        self.up = nn.Linear(d_model, 4 * d_model, bias=False)
        self.down = nn.Linear(4 * d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)
        query, key, value = heads.unbind(2)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(y.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class PlainTransformer(nn.Module):
    """What one writes by hand in the style of nanoGPT: LayerNorm, GELU of ratio 4, learned positions, tied head."""

    def __init__(self, depth: int, d_model: int, context: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, d_model), nn.Embedding(context, d_model)
        self.blocks = nn.Sequential(*[PlainBlock(d_model, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(d_model)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)


class HalfOpen(CosineGate):
    """A gate that pays for its decision and then runs every second token."""

    def decide(self, h: Tensor) -> Tensor:
        chosen = super().decide(h)
        half = torch.zeros_like(chosen)
        half[..., ::2] = True
        return half


def run() -> dict[str, Any]:
    """All rows. Raises UserError without the package `hyper-connections`."""
    try:
        import hyper_connections  # noqa: F401
    except ImportError as error:
        raise UserError("nas bench train compares with hyper-connections: pip install 'hypernas[peers]'") from error
    deterministic()
    processor.keep_freed_memory()
    rows = _first_step()
    for products in dict.fromkeys((torch.float32, product_dtype(CPU))):
        suffix = "" if products is torch.float32 else ", bfloat16"
        kromhc = _kromhc_steps(products)
        rows += _training(f"kromhc n=4, hourglass, gates{suffix}", kromhc, "naive")
        rows += _profile(f"kromhc n=4, hourglass, gates{suffix}", kromhc["cpu"])
        rows += _training(f"mhc n=4, hourglass{suffix}", _mhc_steps(products), "hyper-connections")
        rows += _training(f"LayerNorm, GELU, n=1{suffix}", _plain_steps(products), "nanoGPT style")
        rows += _attention(products)
    for placement in ("ffn", "attention"):
        rows += _skipping(placement)
    return {"device": device_name(CPU), "versions": versions(), "rows": rows}


# ---- training ----------------------------------------------------------------------------------------------------


def _kromhc_steps(products: torch.dtype) -> dict[str, Callable[[], None]]:
    published = _model(SIZE | STREAMS | HOURGLASS | GATES)
    for index, sublayer in enumerate(published.stack.sublayers):
        sublayer.connection = PublishedKromHC((2, 2), SIZE["d_model"], index)
    return {
        "naive": _step(published, "reference", products),
        "reference": _step(_model(SIZE | STREAMS | HOURGLASS | GATES), "reference", products),
        "cpu": _step(_model(SIZE | STREAMS | HOURGLASS | GATES), "cpu", products),
        "cpu, n=1": _step(_model(SIZE | HOURGLASS | GATES), "cpu", products),
    }


def _mhc_steps(products: torch.dtype) -> dict[str, Callable[[], None]]:
    mhc = {"streams.n": 4, "streams.mixing": "mhc"}
    peer = _model(SIZE | HOURGLASS)
    peer.stack = PeerStack(peer.stack, 4, SIZE["d_model"])
    return {
        "hyper-connections": _step(peer, "reference", products),
        "reference": _step(_model(SIZE | HOURGLASS | mhc), "reference", products),
        "cpu": _step(_model(SIZE | HOURGLASS | mhc), "cpu", products),
        "cpu, kromhc": _step(_model(SIZE | HOURGLASS | STREAMS), "cpu", products),
    }


def _plain_steps(products: torch.dtype) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    plain = PlainTransformer(SIZE["depth"], SIZE["d_model"], SIZE["context"], SIZE["d_model"] // PLAIN["head_dim"])
    return {
        "nanoGPT style": _step(plain, "reference", products),
        "reference": _step(_model(SIZE | PLAIN), "reference", products),
        "cpu": _step(_model(SIZE | PLAIN), "cpu", products),
    }


def _model(settings: dict[str, Any]) -> Any:
    space = LanguageModels()
    torch.manual_seed(0)
    return space.build(space.from_json(settings))


def _step(model: nn.Module, backend: str, products: torch.dtype = torch.float32) -> Callable[[], None]:
    """One update on random bytes: what a training step costs does not depend on them."""
    recipe = Recipe(learning_rate=1e-3, batch_tokens=BATCH_TOKENS)
    optimizers = make_optimizers(model, recipe)
    shape = (BATCH_TOKENS // SIZE["context"], SIZE["context"])
    tokens, classes = torch.randint(256, (2, *shape), generator=torch.Generator().manual_seed(0))
    model.train()

    def step() -> None:
        with dispatch.use_backend(backend):
            train_step(model, optimizers, (tokens, classes), recipe, 50, 100, products=products)

    return step


def _training(name: str, steps: dict[str, Callable[[], None]], baseline: str) -> list[dict[str, Any]]:
    times = time_candidates(steps, CPU)
    return [
        {
            "name": f"train/{name}",
            "backend": backend,
            "value": round(BATCH_TOKENS / statistics.median(times[backend]) * 1e3),
            "unit": "tokens/s",
            "baseline": baseline,
            "ratio": round(median_ratio(times[baseline], times[backend]), 2),
        }
        for backend in steps
    ]


def _profile(name: str, step: Callable[[], None]) -> list[dict[str, Any]]:
    """What of a step's time PyTorch's own matrix products and attention take: no kernel of ours makes them faster."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(PROFILED):
            step()
    spent = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    shares = {
        "matrix products": sum(spent.get(f"aten::{product}", 0.0) for product in ("mm", "addmm", "bmm")),
        "attention": sum(time for key, time in spent.items() if "scaled_dot_product" in key),
    }
    return [
        {
            "name": f"train/{name}",
            "backend": f"cpu: {group}",
            "value": round(100 * time / sum(spent.values()), 1),
            "unit": "% of the step",
            "baseline": None,
            "ratio": None,
        }
        for group, time in shares.items()
    ]


def _attention(products: torch.dtype) -> list[dict[str, Any]]:
    """Causal attention, forward and backward, in every form it could take. Models have it as one operator, on a CPU in
    float32: `hypernas.search_spaces.layers.attention`."""
    generator = torch.Generator().manual_seed(0)
    *heads, cotangent = (torch.randn(ATTENTION, generator=generator).to(products) for _ in range(4))
    later = torch.ones(ATTENTION[-2], ATTENTION[-2], dtype=torch.bool).triu(1)

    def two_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.mT * query.shape[-1] ** -0.5
        return scores.masked_fill(later, -torch.inf).softmax(-1) @ value

    forms: dict[str, Callable[..., Tensor]] = {
        "one operator": partial(F.scaled_dot_product_attention, is_causal=True),
        "two products": two_products,
    }
    if products is torch.bfloat16:
        forms["one operator, in float32"] = partial(attention, is_causal=True)

    def step(form: Callable[..., Tensor]) -> Callable[[], None]:
        leaves = [tensor.clone().requires_grad_() for tensor in heads]

        def once() -> None:
            torch.autograd.grad(form(*leaves), leaves, cotangent)

        return once

    times = time_candidates({name: step(form) for name, form in forms.items()}, CPU)
    return [
        {
            "name": f"attention {'x'.join(map(str, ATTENTION))} {str(products).removeprefix('torch.')}",
            "backend": name,
            "value": round(statistics.median(times[name]), 2),
            "unit": "ms",
            "baseline": "one operator",
            "ratio": round(median_ratio(times["one operator"], times[name]), 2),
        }
        for name in forms
    ]


def _first_step() -> list[dict[str, Any]]:
    """What the first step of an architecture costs more than its second, in a process that trained another before."""
    _step(_model({"depth": 1, "d_model": 32, "context": SIZE["context"]}), "auto")()
    step = _step(_model(SIZE | STREAMS | HOURGLASS | GATES), "auto")
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    row = {"name": "first step - second step", "backend": "auto", "value": round(seconds[0] - seconds[1], 3)}
    return [row | {"unit": "s", "baseline": None, "ratio": None}]


# ---- skipping ----------------------------------------------------------------------------------------------------


def _skipping(placement: str) -> list[dict[str, Any]]:
    """How much of the FLOPs that gates save becomes time: 32k tokens forward, every second one executed."""
    space = LanguageModels()
    size = SIZE | {"context": 256}
    dense, gated = (space.from_json(size | {"gates.placement": name}) for name in ("none", placement))
    torch.manual_seed(0)
    models = {"every token": space.build(dense).eval(), "every second": space.build(gated).eval()}
    for gate in gates_of(models["every second"]):
        gate.__class__ = HalfOpen
    tokens = torch.randint(256, (SKIP_TOKENS // 256, 256), generator=torch.Generator().manual_seed(0))

    def forward(model: nn.Module) -> Callable[[], None]:
        def once() -> None:
            with torch.no_grad(), dispatch.use_backend("auto"):
                model(tokens)

        return once

    times = time_candidates({name: forward(model) for name, model in models.items()}, CPU)
    cost = space.cost(gated)
    before = space.cost(dense).flops_total
    saved = 1 - cost.flops_executed([0.5] * len(cost.gated_flops)) / before
    faster = 1 - 1 / median_ratio(times["every token"], times["every second"])
    name = f"skip/{placement}, half of 32k tokens"
    rows = [("FLOPs saved", saved, None), ("time saved", faster, round(faster / saved, 2))]
    return [
        {
            "name": name,
            "backend": what,
            "value": round(100 * value, 1),
            "unit": "%",
            "baseline": "FLOPs saved" if ratio else None,
            "ratio": ratio,
        }
        for what, value, ratio in rows
    ]
