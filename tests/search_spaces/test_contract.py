"""What every space promises, checked by one body of tests over all of them."""

from functools import cache
from typing import Any
from unittest.mock import patch

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hypernas.kernels.dispatch import use_backend
from hypernas.search_spaces import load_space, transformer, vision
from hypernas.search_spaces.base import FixedTrial, SpaceError, arch_to_json
from hypernas.search_spaces.gates import execution_rates, gate_loss, gates_of, reset_rates
from hypernas.search_spaces.layers import Attention

BATCH = 3

TEXT = {"depth": "1,2,3", "d_model": "32,64,96", "context": "8,20", "tied_head": "true,false"}
LAYERS = {
    "head_dim": "8,16",
    "ffn.activation": "swiglu,gelu,relu",
    "ffn.blocks": "1,2,8",
    "norm.kind": "rmsnorm,layernorm",
    "streams.n": "1,2,3,4,8",
    "streams.mixing": "none,hc_static,hc,mhc,mhc_lite,kromhc",
    "gates.layers": "all,alternate,upper",
    "gates.consistency": "distance,perturbation",
}
POST = {"norm.position": "pre,post", "streams.n": "1", "streams.mixing": "none"}
SMALL_IMAGES = {"image.height": "12", "image.width": "9", "image.channels": "1,3", "image.classes": "5"}
CASES = {
    "lm": ("lm", {**TEXT, **LAYERS, "position": "rope,learned,sinusoidal"}),
    "lm post-norm": ("lm", {**TEXT, **LAYERS, **POST}),
    "lm lstm": ("lm", {**TEXT, "family": "lstm"}),
    "lm both families": ("lm", {**TEXT, "family": "transformer,lstm"}),
    "lm equal parameters": ("lm", {**TEXT, "d_model": "16..256", "match.parameters": "100000"}),
    "vision": ("vision", {**SMALL_IMAGES, "depth": "1,2", "width": "3,8", "stages": "1,2,3"}),
    "vision vit": ("vision", {**SMALL_IMAGES, **LAYERS, "family": "vit", "depth": "1,2", "d_model": "32,64",
                              "patch": "3,4", "position": "learned,sinusoidal"}),
    "vision both families": ("vision", {**SMALL_IMAGES, "family": "resnet,vit", "depth": "1,2", "d_model": "32"}),
    "example": ("docs/examples/mlp.py:Space", SMALL_IMAGES),
}  # fmt: skip
GATED = {
    "lm": {"gates.placement": "ffn,attention,both"},
    "lm post-norm": {"gates.placement": "ffn,attention,both"},
    "vision": {
        "gates.placement": "blocks",
        "gates.layers": "all,alternate,upper",
        "depth": "2",
        "gates.consistency": "distance,perturbation",
    },
    "vision vit": {"gates.placement": "ffn,attention,both"},
}

every_space = pytest.mark.parametrize("case", CASES)
drawn = settings(max_examples=10, derandomize=True)
built = settings(max_examples=5, derandomize=True)
counted = settings(max_examples=3, derandomize=True)  # counting every product of a run takes long


class DrawnTrial:
    """Answers `suggest` from hypothesis, and notes what it was asked."""

    def __init__(self, data: st.DataObject) -> None:
        self.data, self.params = data, {}

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self.params.setdefault(name, self.data.draw(st.sampled_from(list(choices)), label=name))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        return self.suggest_categorical(name, range(low, high + 1, step))


@cache  # spaces are frozen, and every example asks for one
def space_of(case: str, **more: str) -> Any:
    name, given_settings = CASES[case]
    return load_space(name, {**given_settings, **more})


whole_space = cache(load_space)


def inputs_of(space: Any, arch: Any) -> torch.Tensor:
    if space.task == "text":
        return torch.zeros(BATCH, arch.context, dtype=torch.long)
    return torch.zeros(BATCH, *arch.input_shape)


def units_of(space: Any, arch: Any) -> int:
    """Tokens or images that `inputs_of` holds."""
    return BATCH * (arch.context if space.task == "text" else 1)


def undecided(model: torch.nn.Module) -> torch.nn.Module:
    """The model in evaluation mode, its gates made to open for some inputs and not for others."""
    for gate in gates_of(model):
        gate.controller[-1].weight.data.normal_(std=3)
        gate.bias.data.fill_(-1 / gate.bias_gain)  # opens where CIR^ exceeds 1
    return model.eval()


@every_space
@given(data=st.data())
@drawn
def test_architectures_come_back_from_their_parameters_and_their_json(case, data):
    space, trial = space_of(case), DrawnTrial(data)
    arch = space.suggest(trial)
    params = space.params(arch)
    assert params.keys() == trial.params.keys()
    assert space.suggest(FixedTrial(params)) == arch
    flat = arch_to_json(arch)
    assert space.from_json(flat) == arch
    whole = whole_space(CASES[case][0])
    assert arch_to_json(whole.from_json({name: str(value) for name, value in flat.items()})) == flat
    assert set(flat) <= set(space.keys)
    assert hash(arch) == hash(space.from_json(flat))


@every_space
@given(data=st.data())
@drawn
def test_every_trial_is_asked_for_the_same_parameters_in_the_same_order(case, data):
    space, one, two = space_of(case), DrawnTrial(data), DrawnTrial(data)
    space.suggest(one)
    space.suggest(two)
    assert list(one.params) == list(two.params)


@every_space
@given(data=st.data())
@drawn
def test_architectures_of_one_hash_cost_the_same(case, data):
    space = space_of(case)
    one, two = (space.suggest(DrawnTrial(data)) for _ in range(2))
    assert space.arch_hash(one) == space.arch_hash(space.from_json(arch_to_json(one)))
    if space.arch_hash(one) == space.arch_hash(two):
        assert space.cost(one) == space.cost(two)


@every_space
@given(data=st.data())
@drawn
def test_counts_of_parameters_equal_the_built_modules(case, data):
    space = space_of(case)
    arch = space.suggest(DrawnTrial(data))
    with torch.device("meta"):
        model = space.build(arch)
    assert space.cost(arch).parameters_total == sum(parameter.numel() for parameter in model.parameters())


@every_space
@given(data=st.data())
@built
def test_matmul_flops_equal_the_counter_to_the_digit(case, data):
    # Which inputs a gate lets through depends on values, and meta tensors have none.
    space = space_of(case, **({} if case == "example" else {"gates.placement": "none"}))
    arch = space.suggest(DrawnTrial(data))
    with torch.device("meta"):
        model = space.build(arch).eval()
        with FlopCounterMode(display=False) as counter:
            model(inputs_of(space, arch))
    cost = space.cost(arch)
    assert counter.get_total_flops() == cost.matmul * units_of(space, arch)
    assert cost.matmul + cost.elementwise == cost.flops_total


def gated_matmuls(space: Any, arch: Any) -> list[int]:
    """Matrix-product FLOPs that each gate can save, a token or an image, written down apart from `cost`."""
    if isinstance(arch, vision.ResNetArch):
        return [
            2 * 9 * (shape.inputs + shape.outputs) * shape.outputs * shape.pixels
            for shape in vision.block_shapes(arch)
            if shape.gated
        ]
    tokens = arch.context if space.task == "text" else arch.tokens
    matrices = 3 if arch.ffn.activation == "swiglu" else 2
    query = 2 * 2 * arch.d_model * arch.attention_width + 2 * 2 * tokens * arch.attention_width
    weights = sum(c * h for c, h in zip(*transformer.ffn_blocks(arch), strict=True))
    ffn = (arch.ffn.sub_mlps or 1) * 2 * matrices * weights
    per_image = 1 if space.task == "text" else tokens
    return [per_image * flops for pair in arch.gated for on, flops in zip(pair, (query, ffn), strict=True) if on]


def every_key(self, query, key, value, positions):
    """`attend` without its shortcut: costs count the whole square of causal attention, selected queries or not."""
    seen = torch.arange(key.shape[-2]) <= positions.unsqueeze(-1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen.unsqueeze(1))


@pytest.mark.parametrize("case", GATED)
@given(data=st.data(), seed=st.integers(0, 2**20))
@counted
def test_gated_flops_equal_those_of_the_tokens_that_ran(case, data, seed):
    space = space_of(case, **GATED[case])
    arch = space.suggest(DrawnTrial(data))
    torch.manual_seed(seed)
    model = undecided(space.build(arch))
    inputs = inputs_of(space, arch)
    inputs = torch.randint(arch.vocab, inputs.shape) if space.task == "text" else torch.randn(inputs.shape)
    reset_rates(model)
    reference = use_backend("reference")  # the counter does not see into compiled ops
    square = patch.object(Attention, "attend", every_key)
    with reference, square, FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        for one in inputs.split(1):  # several at once are filled up to the number of queries of the fullest
            model(one)
    rates, cost, units = execution_rates(model), space.cost(arch), units_of(space, arch)
    saved = gated_matmuls(space, arch)
    assert len(saved) == len(rates) == len(cost.gated_flops)
    skipped = sum(flops * (1 - rate) for flops, rate in zip(saved, rates, strict=True))
    assert counter.get_total_flops() == pytest.approx((cost.matmul - skipped) * units, rel=1e-12)
    assert all(flops >= matmul for flops, matmul in zip(cost.gated_flops, saved, strict=True))
    assert cost.flops_executed([1.0] * len(rates)) == cost.flops_total


@every_space
@given(data=st.data())
@drawn
def test_no_architecture_costs_more_than_the_largest(case, data):
    space = space_of(case)
    largest = space.cost(space.largest()).flops_total
    # With equal budgets all cost nearly the same, and the largest by FLOPs is found greedily.
    slack = 1.1 if "equal" in case else 1.0
    assert space.cost(space.suggest(DrawnTrial(data))).flops_total <= slack * largest


@every_space
@given(data=st.data(), seed=st.integers(0, 2**20))
@built
def test_a_training_step_reaches_every_parameter(case, data, seed):
    space = space_of(case)
    arch = space.suggest(DrawnTrial(data))
    torch.manual_seed(seed)
    model = space.build(arch).train()
    inputs = inputs_of(space, arch)
    if inputs.is_floating_point():
        inputs = torch.randn(inputs.shape)
    logits = model(inputs)
    classes = arch.vocab if space.task == "text" else arch.image.classes
    assert logits.shape == (*(inputs.shape if space.task == "text" else inputs.shape[:1]), classes)
    assert logits.isfinite().all()
    (logits.square().mean() + gate_loss(model, 1.0)).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("case", [case for case, (name, _) in CASES.items() if name == "lm"])
@given(data=st.data(), seed=st.integers(0, 2**20))
@built
def test_no_future_token_changes_the_past(case, data, seed):
    space = space_of(case)
    arch = space.suggest(DrawnTrial(data))
    torch.manual_seed(seed)
    model = undecided(space.build(arch).double())
    tokens = torch.randint(arch.vocab, (2, arch.context))
    now = data.draw(st.integers(1, arch.context - 1))
    other = tokens.clone()
    other[:, now:] = torch.randint(arch.vocab, (2, arch.context - now))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[:, :now], model(other)[:, :now], rtol=1e-9, atol=1e-9)


@every_space
def test_the_baseline_is_an_architecture_of_the_space(case):
    name = CASES[case][0]
    space = load_space(name)
    assert space.from_json({}) == space.baseline()
    assert space.suggest(FixedTrial(space.params(space.baseline()))) == space.baseline()


@every_space
def test_presets_leave_a_space_to_search(case):
    space = load_space(CASES[case][0])
    for preset in space.presets.values():
        restricted = space.restrict(preset)
        assert restricted.cost(restricted.baseline()).flops_total <= restricted.cost(restricted.largest()).flops_total


@every_space
def test_a_misspelt_key_is_named_with_the_nearest_one(case):
    with pytest.raises(SpaceError, match="did you mean 'depth'"):
        space_of(case, dept="3")


def test_families_searched_together_bring_their_names():
    space = load_space("vision", {"family": "resnet,vit"})
    params = space.params(space.baseline())
    assert params["family"] == "resnet"
    assert {"resnet.depth", "vit.depth", "resnet.gates", "vit.streams"} <= set(params)
    assert not isinstance(space.baseline(), transformer.Stack)
