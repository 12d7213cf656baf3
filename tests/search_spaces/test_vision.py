import pytest
import torch

from hypernas.search_spaces import load_space
from hypernas.search_spaces.gates import execution_rates, gate_loss, gates_of, reset_rates
from hypernas.search_spaces.nets.vision import BLOCK_GATES, BlockGate, GatedBlock, Patches, SameShape, TwoConvolutions
from hypernas.search_spaces.vision import BLOCK_CONTROLLER

VISION = load_space("vision")


def build(seed: int = 0, **keys):
    """A model; `__` stands for the dot of a key."""
    torch.manual_seed(seed)
    return VISION.build(VISION.from_json({name.replace("__", "."): str(value) for name, value in keys.items()}))


def test_cosinegates_own_net_counts_as_in_its_original_form():
    arch = VISION.from_json({"base": "cosinegate"})
    parameters = VISION.cost(arch).parameters
    assert sum(parameters.values()) - parameters["gates"] == 2_797_610
    gates = len(VISION.cost(arch).gated_flops)
    # The original has one learned scalar a gate, ours a bias beside it: the honest decision needs a threshold.
    assert gates == 8
    assert parameters["gates"] - gates == 64_528


def test_resnet_20_and_32_count_as_published_plus_their_projections():
    projections = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)  # He et al. pad with zeros there
    for depth, published in ((3, 269_722), (5, 464_154)):
        arch = VISION.from_json({"base": "resnet-20", "depth": depth})
        assert VISION.cost(arch).parameters_total == published + projections


# ---- gates ---------------------------------------------------------------------------------------------------


def gated_block(stride: int, outputs: int) -> GatedBlock:
    torch.manual_seed(0)
    from hypernas.search_spaces.nets.vision import Projection

    shortcut = SameShape() if (stride, outputs) == (1, 4) else Projection(4, outputs, stride)
    block = GatedBlock(shortcut, TwoConvolutions(4, outputs, stride), BlockGate(4, 0.5, 1.0))
    block.gate.controller[-1].weight.data.normal_(std=3)
    block.gate.bias.data.fill_(-1 / block.gate.bias_gain)  # opens where CIR^ exceeds 1
    return block


@pytest.mark.parametrize("stride, outputs", [(1, 4), (2, 8)])
def test_images_that_are_skipped_are_never_fed_to_the_branch(stride, outputs):
    block = gated_block(stride, outputs).eval()
    fed = []
    block.branch.register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0]))
    x = 3 * torch.randn(64, 4, 6, 5)
    given = x.clone()
    reset_rates(block)
    out = block(x)
    runs = block.gate.decide(x.mean((-2, -1)))
    assert 0 < runs.sum() < 64
    assert len(fed) == 1
    torch.testing.assert_close(fed[0], x[runs])
    torch.testing.assert_close(out[~runs], block.shortcut(x)[~runs])
    torch.testing.assert_close(out[runs], (block.shortcut(x) + block.branch(x))[runs])
    torch.testing.assert_close(x, given)  # not written to, although it is its own shortcut
    assert execution_rates(block) == [runs.sum().item() / 64]


def test_a_block_that_every_image_skips_still_works():
    block = gated_block(1, 4).eval()
    block.gate.bias.data.fill_(-100.0)
    x = torch.randn(3, 4, 6, 5)
    torch.testing.assert_close(block(x), x)


def test_in_training_a_gate_learns_what_the_branch_would_have_changed():
    block = gated_block(1, 4).train()
    x = torch.randn(16, 4, 6, 5)
    block(x)
    branch = block.branch(x)
    cir = 1 - torch.cosine_similarity(x.flatten(1), branch.flatten(1), dim=-1)
    predicted = block.gate.predict(x.mean((-2, -1)))
    torch.testing.assert_close(block.gate.terms[0], (predicted - cir).square().mean())


def test_the_penalty_moves_every_gate_towards_its_rate():
    model = build(gates__placement="blocks", gates__rate=0.5, image__height=8, image__width=8, depth=1, width=4)
    model.train()(torch.randn(8, 1, 8, 8))
    gate_loss(model, 1.0).backward()
    assert all(gate.bias.grad > 0 for gate in gates_of(model))  # all blocks run at first: fewer should


def test_a_mask_places_the_gates():
    model = build(gates__placement="blocks", gates__layers="010010", depth=2, stages=3)
    assert [isinstance(block, GatedBlock) for block in model.blocks] == [False, True, False, False, True, False]


# ---- shapes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(28, 28), (30, 45), (5, 3), (1, 1)])
@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_images_of_any_size_fit(family, height, width):
    keys = {"image__height": height, "image__width": width, "image__channels": 3, "image__classes": 7}
    assert build(family=family, **keys).eval()(torch.randn(2, 3, height, width)).shape == (2, 7)


def test_patches_are_cut_row_by_row_and_filled_with_zeros():
    patches = Patches(1, 1, 2)
    patches.conv.weight.data.fill_(1.0)
    image = torch.arange(6.0).view(1, 1, 2, 3)
    assert patches(image).flatten().tolist() == [0 + 1 + 3 + 4, 2 + 5]


def test_a_patch_sees_those_after_it():
    keys = {"family": "vit", "depth": 1, "image__height": 8, "image__width": 8}
    attention = build(**keys).eval().stack.sublayers[0]
    x = torch.randn(1, 4, 64)
    other = x.clone()
    other[:, -1] += 1
    assert (attention(x)[:, 0] - attention(other)[:, 0]).abs().max() > 1e-4


def test_a_skipped_query_of_an_image_changes_no_other():
    torch.manual_seed(0)
    model = build(family="vit", depth=1, image__height=8, image__width=8)
    attention = model.stack.sublayers[0].branch
    x, mask = torch.randn(2, 4, 64), torch.rand(2, 4) < 0.5
    torch.testing.assert_close(attention.selected(x, mask), attention(x) * mask.unsqueeze(-1))


def test_a_resnets_budget_is_met_by_its_width():
    arch = VISION.from_json({"match.parameters": 270_000})
    assert VISION.cost(arch).parameters_total == pytest.approx(270_000, rel=0.05)


def test_the_space_prices_the_controller_that_is_built():
    assert {gate.hidden for gate in BLOCK_GATES.values()} == {BLOCK_CONTROLLER}
