"""A grown network computes what its parent computed, to the last digits, and what cannot grow says why."""

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hypernas.kernels.dispatch import use_backend
from hypernas.search_spaces import load_space
from hypernas.search_spaces.growth import layer_places
from hypernas.search_spaces.lm import LanguageModels

SMALL = {"depth": 2, "d_model": 16, "head_dim": 4, "context": 16, "ffn.ratio": 2}
VIT = {"family": "vit", "depth": 2, "d_model": 16, "head_dim": 4}
VIT |= {f"image.{name}": size for name, size in (("height", 8), ("width", 8), ("channels", 1), ("classes", 5))}
STREAMS = (
    {},
    {"streams.n": 2, "streams.mixing": "kromhc", "streams.factors": "2"},
    {"streams.n": 6, "streams.mixing": "kromhc", "streams.factors": "2x3"},
    {"streams.n": 3, "streams.mixing": "mhc"},
    {"streams.n": 3, "streams.mixing": "mhc_lite"},
    {"streams.n": 2, "streams.mixing": "hc_static"},
    {"streams.n": 1, "streams.mixing": "hc"},
    {"streams.n": 4, "streams.mixing": "hc"},
)
NETS = (
    {},
    {"ffn.activation": "gelu", "position": "learned", "tied_head": False},
    {"ffn.shape": "hourglass", "ffn.ratio": 0.5, "ffn.sub_mlps": 2},
    {"gates.placement": "ffn", "gates.layers": "upper"},
)
CHANGES = {  # each for itself; the widths are no multiples of the old ones
    "recipe": {},
    "layers": {"depth": 3},
    "channels": {"d_model": 28},
    "twice the channels": {"d_model": 32},
    "hidden units": {"ffn.ratio": 3.5},
    "heads": {"attention.ratio": 1.5},
    "sub-MLPs": {"ffn.sub_mlps": 3},
    "gates": {"gates.placement": "both", "gates.layers": "all"},
    "rate": {"gates.rate": 0.9},
    "everything": {"depth": 3, "d_model": 24, "attention.ratio": 2, "gates.placement": "both", "gates.layers": "all"},
}


def trained(space: Any, arch: Any, seed: int) -> torch.nn.Module:
    """A network with every weight away from where it was drawn."""
    torch.manual_seed(seed)
    model: torch.nn.Module = space.build(arch)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight) * (weight.std() if weight.numel() > 1 else 1.0))
    return model


def born(parent: dict[str, Any], child: dict[str, Any], seed: int, dtype: torch.dtype) -> tuple[torch.nn.Module, ...]:
    """The trained parent and the child at birth. Fails where the child may not inherit."""
    space = load_space("vision" if "image.width" in parent else "lm")
    old, new = space.from_json(parent), space.from_json(child)
    assert space.obstacle(old, new) is None
    model = trained(space, old, seed).to(dtype).eval()
    grown: torch.nn.Module = space.build(new).to(dtype).eval()
    grown.load_state_dict(space.grown(old, model.state_dict(), new, grown.state_dict()))
    return model, grown


@torch.no_grad()
def difference(before: torch.nn.Module, after: torch.nn.Module, inputs: torch.Tensor) -> float:
    with use_backend("reference"):
        return float((before(inputs) - after(inputs)).abs().max())


TOKENS = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("streams", STREAMS, ids=str)
def test_a_child_computes_at_birth_what_its_parent_computes(streams: dict[str, Any], change: str) -> None:
    tried = 0
    for seed, net in enumerate(NETS):
        hourglass = "ffn.shape" in net
        if (change == "sub-MLPs") != hourglass and change in ("sub-MLPs", "hidden units"):
            continue
        if change == "rate" and "gates.placement" not in net:
            continue
        parent = SMALL | streams | net
        model, grown = born(parent, parent | CHANGES[change], seed, torch.float64)
        assert difference(model, grown, TOKENS) < 1e-13
        tried += 1
    assert tried


@pytest.mark.parametrize("mixing", ["none", "hc_static", "hc"])
def test_a_new_layer_stands_between_old_ones_where_their_gates_ask_for_it(mixing: str) -> None:
    parent = SMALL | {"streams.mixing": mixing, "gates.placement": "ffn", "gates.layers": "upper"}
    space = LanguageModels()
    assert layer_places(space.from_json(parent), space.from_json(parent | {"depth": 4})) == (0, 2)
    model, grown = born(parent, parent | {"depth": 4}, 0, torch.float64)
    assert difference(model, grown, TOKENS) < 1e-13


@settings(max_examples=25)
@given(data=st.data())
def test_drawn_pairs_agree_in_float32(data: st.DataObject) -> None:
    draw = data.draw
    parent = SMALL | draw(st.sampled_from(STREAMS)) | draw(st.sampled_from(NETS))
    grows = {"depth": draw(st.integers(2, 5)), "d_model": draw(st.sampled_from([16, 20, 48]))}
    grows |= {"gates.placement": draw(st.sampled_from([parent.get("gates.placement", "none"), "both"]))}
    if grows["gates.placement"] != "none":
        grows |= {"gates.layers": "all"}
    model, grown = born(parent, parent | grows, draw(st.integers(0, 1000)), torch.float32)
    assert difference(model, grown, TOKENS) < 1e-5


@pytest.mark.parametrize("change", [{"depth": 3}, {"d_model": 24}, {"ffn.ratio": 4}, {"gates.placement": "both"}])
def test_a_vision_transformer_grows_too(change: dict[str, Any]) -> None:
    model, grown = born(VIT, VIT | change, 0, torch.float64)
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    assert difference(model, grown, images) < 1e-13


def test_everything_that_is_new_learns() -> None:
    parent = SMALL | STREAMS[1] | {"gates.placement": "ffn", "gates.layers": "all"}
    change = {"depth": 3, "d_model": 24, "attention.ratio": 1.5, "gates.placement": "both"}
    _, grown = born(parent, parent | change, 0, torch.float64)
    grown.train()
    before = {name: weight.detach().clone() for name, weight in grown.named_parameters()}
    steps = torch.optim.SGD(grown.parameters(), lr=0.1)
    with use_backend("reference"):
        for _ in range(4):  # what writes learns first, then what reads it, then what mixes streams for it
            logits = grown(TOKENS)
            steps.zero_grad()
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS.roll(-1, 1).flatten()).backward()
            steps.step()
    asleep = {
        name: weight
        for name, weight in grown.named_parameters()
        if (weight == before[name]).all() and ".gate." not in name  # which learns from a loss of its own
    }
    assert not asleep
    wide = grown.get_parameter("embedding.weight")[:, 16:]
    assert torch.linalg.matrix_rank(wide.detach()) > 4  # new channels are no copies of each other


def test_post_norm_nets_widen() -> None:
    parent = SMALL | {"norm.position": "post"}
    model, grown = born(parent, parent | {"d_model": 20, "ffn.ratio": 4}, 0, torch.float64)
    assert difference(model, grown, TOKENS) < 1e-13


def test_nets_in_blocks_get_more_units() -> None:
    parent = SMALL | {"ffn.blocks": 2}
    model, grown = born(parent, parent | {"ffn.ratio": 4, "depth": 3}, 0, torch.float64)
    assert difference(model, grown, TOKENS) < 1e-13


@pytest.mark.parametrize(
    "parent, change, reason",
    [
        ({}, {"depth": 1}, "depth 2 -> 1 takes part of the function away"),
        ({}, {"d_model": 12}, "d_model 16 -> 12 takes"),
        ({}, {"ffn.ratio": 1}, "hidden units 32 -> 16 takes"),
        ({}, {"attention.ratio": 0.5}, "attention width 16 -> 8 takes"),
        ({}, {"ffn.shape": "hourglass", "ffn.ratio": 0.5}, "ffn.shape conventional -> hourglass is another function"),
        ({}, {"head_dim": 8}, "head_dim 4 -> 8 is"),
        ({}, STREAMS[1], "streams.n 1 -> 2 is"),
        ({}, {"family": "lstm"}, "family transformer -> lstm is"),
        ({"norm.kind": "layernorm"}, {"d_model": 32}, "layernorm takes the mean over channels"),
        ({"position": "sinusoidal"}, {"d_model": 32}, "sinusoidal positions of its own"),
        ({"ffn.blocks": 2}, {"d_model": 32}, "blocks divide its coordinates otherwise"),
        ({"norm.position": "post"}, {"depth": 3}, "still normalises"),
        ({"gates.placement": "both"}, {"gates.placement": "ffn"}, "a gate of the parent has no place in the child"),
        (
            STREAMS[1] | {"depth": 3, "gates.placement": "ffn", "gates.layers": "upper"},
            {"depth": 4},
            "kromhc would mix the streams",
        ),
    ],
)
def test_what_cannot_grow_says_why(parent: dict[str, Any], change: dict[str, Any], reason: str) -> None:
    space = LanguageModels()
    old = space.from_json(SMALL | parent)
    kept = {} if "family" in change else SMALL | parent
    said = space.obstacle(old, space.from_json({**kept, **change}))
    assert said is not None and reason in said


def test_only_the_same_architecture_inherits_where_a_family_does_not_grow() -> None:
    space = LanguageModels()
    small, large = (space.from_json({"family": "lstm", "d_model": width}) for width in (16, 32))
    assert space.obstacle(small, large) == "nothing is known of growing a lstm"
    assert space.obstacle(small, small) is None
    weights = trained(space, small, 0).state_dict()
    assert space.grown(small, weights, small, space.build(small).state_dict()) is weights


@pytest.mark.parametrize("depth, deeper", product((1, 2, 3), (3, 4, 5)))
def test_every_layer_finds_a_place_that_has_its_gates_in_the_old_order(depth: int, deeper: int) -> None:
    space = LanguageModels()
    gates = {"gates.placement": "ffn", "gates.layers": "upper"}
    parent = space.from_json(SMALL | gates | {"depth": depth})
    child = space.from_json(SMALL | gates | {"depth": deeper})
    places = layer_places(parent, child)
    assert places is not None and list(places) == sorted(set(places))
    assert all(child.gated[place] >= parent.gated[layer] for layer, place in enumerate(places))
