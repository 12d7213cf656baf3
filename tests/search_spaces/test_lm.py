from random import Random

import numpy as np
import pytest
import torch
from torch import nn

from hypernas.search_spaces import load_space, lstm
from hypernas.search_spaces.base import SpaceError, Uniform, arch_to_json
from hypernas.search_spaces.blocks import BlockNet
from hypernas.search_spaces.connections import PostNormResidual
from hypernas.search_spaces.nets.lstm import LSTM

LM = load_space("lm")


def parts(**keys) -> dict[str, int]:
    return dict(LM.cost(arch(**keys)).parameters)


def arch(**keys):
    """An architecture; `__` stands for the dot of a key."""
    return LM.from_json({name.replace("__", "."): str(value) for name, value in keys.items()})


@pytest.mark.parametrize(
    "width, layers, n, mixing, factors, wanted",
    [
        (768, 12, 4, "kromhc", "2x2", 958_824),
        (768, 12, 4, "mhc", None, 1_843_848),
        (768, 12, 4, "mhc_lite", None, 2_433_864),
        (768, 12, 8, "kromhc", "2x2x2", 3_392_088),
        (768, 12, 8, "mhc", None, 11_945_928),
        (768, 12, 16, "kromhc", "2x2x2x2", 12_092_424),
        (768, 12, 16, "mhc", None, 85_236_552),
        (384, 6, 4, "kromhc", "2x2", 239_796),
        (384, 6, 4, "mhc", None, 461_124),
        (384, 6, 4, "mhc_lite", None, 608_676),
    ],
)
def test_connection_parameters_are_the_papers(width, layers, n, mixing, factors, wanted):
    keys = {"streams.factors": factors} if factors else {}
    found = LM.from_json({"d_model": width, "depth": layers, "streams.n": n, "streams.mixing": mixing, **keys})
    assert LM.cost(found).parameters["connections"] == wanted


def test_an_hourglass_of_four_narrow_nets_counts_as_in_the_paper():
    assert parts(d_model=256, depth=1, ffn__shape="hourglass", ffn__sub_mlps=4, ffn__ratio=0.5)["ffn"] == 393_216


# ---- equal functions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "one, other",
    [
        ({"streams.n": 4, "streams.mixing": "kromhc", "streams.factors": "4"},
         {"streams.n": 4, "streams.mixing": "mhc_lite"}),
        ({"streams.n": 2, "streams.mixing": "kromhc"}, {"streams.n": 2, "streams.mixing": "mhc_lite"}),
        ({"streams.n": 8, "streams.factors": "2x4"}, {"streams.n": 8, "streams.factors": "4x2"}),
        ({"gates.placement": "ffn", "gates.layers": "upper"}, {"gates.placement": "ffn", "gates.layers": "0011"}),
        ({"gates.placement": "ffn", "gates.layers": "0000"}, {"gates.placement": "none"}),
        ({"ffn.ratio": 2.667}, {"ffn.ratio": 8 / 3}),
        ({"gates.placement": "ffn"}, {"gates.placement": "ffn", "gates.consistency": "distance"}),
    ],
)  # fmt: skip
def test_equal_functions_share_a_hash(one, other):
    assert LM.arch_hash(LM.from_json(one)) == LM.arch_hash(LM.from_json(other))


@pytest.mark.parametrize(
    "keys",
    [{"depth": 5}, {"streams.n": 4}, {"norm.position": "post"}, {"gates.placement": "ffn"}, {"family": "lstm"}],
)
def test_different_functions_have_different_hashes(keys):
    assert LM.arch_hash(LM.from_json(keys)) != LM.arch_hash(LM.baseline())


def test_the_form_of_consistency_changes_the_hash_only_where_it_is_not_the_usual_one():
    assert LM.arch_hash(arch(gates__placement="ffn")) == "e873d6cd515b47f5"  # as before there was a choice
    assert LM.arch_hash(arch(gates__placement="ffn", gates__consistency="perturbation")) != "e873d6cd515b47f5"


# ---- hyper-connections at first ------------------------------------------------------------------------------


def into_the_head(model, tokens):
    """What the norm before the head is given."""
    seen = []
    handle = model.norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("mixing, n", [("hc_static", 2), ("hc_static", 4), ("hc", 1), ("hc", 4), ("hc", 8)])
@pytest.mark.parametrize("gates", ["none", "both"])
def test_a_hyper_connected_net_is_at_first_n_times_the_plain_net_of_its_weights(mixing, n, gates):
    shape = {"depth": 3, "d_model": 32, "context": 12, "gates__placement": gates}
    torch.manual_seed(0)
    plain = LM.build(arch(**shape)).double().eval()
    model = LM.build(arch(**shape, streams__n=n, streams__mixing=mixing)).double().eval()
    unknown = model.load_state_dict(plain.state_dict(), strict=False)
    assert unknown.unexpected_keys == [] and all(".connection." in name for name in unknown.missing_keys)
    tokens = torch.randint(256, (2, 12))
    torch.testing.assert_close(into_the_head(model, tokens), n * into_the_head(plain, tokens), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mixing, scale", [("hc", 2.0), ("hc_static", 2.0), ("kromhc", 1.0), ("mhc", 1.0)])
def test_hyper_connections_alone_scale_the_first_output_weights_by_the_root_of_n(mixing, scale):
    built = []
    for streams in ({}, {"streams__n": 4, "streams__mixing": mixing}):
        torch.manual_seed(0)
        built.append(dict(LM.build(arch(depth=2, d_model=32, **streams)).named_parameters()))
    plain, mixed = built
    assert sum(name.endswith("out.weight") for name in plain) == 4
    for name, weight in plain.items():
        want = weight / scale if name.endswith("out.weight") else weight
        torch.testing.assert_close(mixed[name], want, rtol=1e-6, atol=0)


# ---- what cannot be built ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"streams.n": 4, "streams.mixing": "kromhc", "streams.factors": "2x4"}, "product is 8, not 4"),
        ({"streams.n": 8, "streams.mixing": "kromhc", "streams.factors": "8"}, "factors go from 2 to 4"),
        ({"streams.n": 4, "streams.factors": "2x3"}, "streams.factors=2x3: the product is 6, not 4"),
        ({"streams.n": 8, "streams.mixing": "mhc_lite"}, "streams.n=8.*wanted n = 2, 3 or 4"),
        ({"streams.n": 4, "streams.mixing": "none"}, "wanted n = 1"),
        ({"streams.n": 5}, "streams.n=5: wanted one of 1, 2, 3"),
        ({"head_dim": 48}, "head_dim=48 does not divide the attention width 128.*legal: 2, 4, 8"),
        ({"head_dim": 7}, "head_dim=7: wanted an even number"),
        ({"ffn.shape": "hourglass", "ffn.ratio": 2}, "no legal ffn.ratio among 2.*below 1 for hourglass"),
        ({"gates.placement": "ffn", "gates.layers": "010"}, "mask of 4 digits"),
        ({"norm.position": "post", "streams.n": 2}, "norm.position=post with streams.n=2.*wanted streams.n=1"),
        ({"depth": "2,4"}, "depth=2,4: wanted one value"),
        ({"depth": "0"}, "depth=0: wanted a whole number at least 1"),
        ({"match.parameters": 1000}, "match.parameters=1000: wanted 6472 to 206173700096"),
        ({"match.parameters": 10**6, "match.flops": 10**6}, "match.parameters and match.flops: wanted one of them"),
        ({"match.parameters": 10**6, "depth": 4, "d_model": 64}, "d_model=64 and depth=4 are given; leave one out"),
        ({"base": "resnet-20"}, "base=resnet-20"),
        ({"base": "gpt2-lke"}, "base=gpt2-lke"),
    ],
)  # fmt: skip
def test_impossible_keys_are_named_with_what_is_legal(keys, message):
    with pytest.raises(SpaceError, match=message):
        LM.from_json(keys)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"depth": "2,4", "gates.placement": "ffn", "gates.layers": "0110"}, "mask of 2 digits"),
        ({"d_model": "64,72"}, "head_dim=16 does not divide the attention width"),
        ({"norm.position": "pre,post"}, "norm.position=post with streams.n=2"),
        ({"match.parameters": "20000"}, "wanted [0-9]+ to [0-9]+, what every architecture of this search can have"),
    ],
)
def test_combinations_that_cannot_be_built_are_found_before_the_search(settings, message):
    with pytest.raises(SpaceError, match=message):
        LM.restrict(settings)


# ---- equal budgets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [250_000, 1_000_000, 30_000_000])
@pytest.mark.parametrize("keys", [{}, {"ffn.shape": "hourglass"}, {"streams.n": 4}, {"attention.ratio": 0.5},
                                  {"family": "lstm"}])  # fmt: skip
def test_a_parameter_budget_is_met_by_the_width(keys, budget):
    found = LM.from_json({"match.parameters": budget, **keys})
    assert LM.cost(found).parameters_total == pytest.approx(budget, rel=0.06)
    assert found.d_model % 4 == 0
    assert arch_to_json(LM.from_json(arch_to_json(found))) == arch_to_json(found)


def test_a_budget_is_met_by_the_depth_when_the_width_is_given():
    found = LM.from_json({"match.flops": 20_000_000, "d_model": 128})
    assert found.d_model == 128
    step = LM.cost(arch(depth=11)).flops_total - LM.cost(arch(depth=10)).flops_total
    assert abs(LM.cost(found).flops_total - 20_000_000) <= step / 2


def test_no_neighbouring_width_meets_a_budget_better():
    def distance(d_model):
        flops = LM.cost(arch(d_model=d_model, attention__ratio=1, head_dim=4)).flops_total
        return abs(flops - 3_000_000)

    found = LM.from_json({"match.flops": 3_000_000, "head_dim": 4}).d_model
    assert distance(found) <= min(distance(found - 4), distance(found + 4))


class RandomTrial:
    """Answers `suggest` at random."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)

    def suggest_categorical(self, name, choices):
        return self.random.choice(list(choices))

    def suggest_int(self, name, low, high, *, step=1, log=False):
        return self.random.choice(range(low, high + 1, step))


def test_random_architectures_of_one_budget_are_as_close_as_docs_space_md_says():
    space = LM.restrict({"match.parameters": "1000000"})
    found = [space.cost(space.suggest(RandomTrial(seed))).parameters_total for seed in range(300)]
    off = sorted(abs(parameters / 1_000_000 - 1) for parameters in found)
    assert (round(off[150], 3), round(off[270], 3)) == (0.013, 0.043)


# ---- restricting ---------------------------------------------------------------------------------------------


def test_a_log_range_is_its_doublings():
    space = LM.restrict({"d_model": "64..1000:log", "attention.ratio": "1", "head_dim": "8"})
    assert {space.restrict({"d_model": str(d)}).baseline().d_model for d in (64, 128, 256, 512, 1000)}
    with pytest.raises(SpaceError, match="64, 128, 256, 512, 1000"):
        space.params(space.from_json({"d_model": 200}))


def test_an_hourglass_asked_for_alone_gets_its_usual_ratio():
    found = arch(ffn__shape="hourglass")
    assert (found.ffn.ratio, found.ffn.sub_mlps) == (0.5, 4)


def test_a_net_in_one_block_is_the_dense_one_and_more_blocks_divide_its_weights():
    assert arch(ffn__blocks=1) == arch() and "ffn.blocks" not in arch_to_json(arch())
    dense, quartered = (LM.cost(arch(d_model=128, ffn__ratio=4, ffn__blocks=k)).parameters["ffn"] for k in (1, 4))
    assert dense == 4 * quartered
    (net,) = (module for module in LM.build(arch(depth=1, ffn__blocks=4)).modules() if isinstance(module, BlockNet))
    x = torch.zeros(1, net.d_model)
    x[:, : net.inputs[0]] = 1  # what the first block reads, only the first block writes
    assert net(x)[:, : net.inputs[0]].all() and not net(x)[:, net.inputs[0] :].any()


def test_a_net_in_blocks_starts_at_the_size_of_the_dense_one():
    torch.manual_seed(0)
    dense, blocked = (LM.build(arch(depth=1, d_model=256, ffn__blocks=k)) for k in (1, 4))
    x = torch.randn(64, 256)
    sizes = [model.stack.sublayers[1].branch.layer(x).std().item() for model in (dense, blocked)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


def test_streams_asked_for_alone_mix_by_kromhc():
    assert arch_to_json(arch(streams__n=4))["streams.factors"] == "2x2"


# ---- post-norm -----------------------------------------------------------------------------------------------


def test_post_norm_sublayers_leave_a_normalised_stream():
    torch.manual_seed(0)
    found = arch(norm__position="post", depth=1, d_model=32, context=8, position="learned")
    model = LM.build(found)
    following = model.stack.sublayers[1].connection
    assert isinstance(following, PostNormResidual)
    x, y = torch.randn(2, 8, 32), torch.randn(2, 8, 32)
    streams, h, _ = following.advance(x, y, ())
    torch.testing.assert_close(streams.square().mean(-1), torch.ones(2, 8), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(streams, following.norm(x + y))
    assert torch.equal(h, streams)


def test_post_norm_adds_the_branch_before_it_normalises():
    torch.manual_seed(0)
    model = LM.build(arch(norm__position="post", depth=1, d_model=32, context=8))
    attention, ffn = model.stack.sublayers
    tokens = torch.randint(256, (2, 8))
    x = model.embedding(tokens)
    x = ffn.connection.norm(x + attention.branch(x))
    x = model.norm(x + ffn.branch(x))
    torch.testing.assert_close(model(tokens), model.head(x, model.embedding.weight))


# ---- LSTM ----------------------------------------------------------------------------------------------------


def test_an_lstm_layer_is_torchs_cell_at_every_token():
    torch.manual_seed(0)
    ours, cell = LSTM(12).double(), nn.LSTMCell(12, 12).double()
    cell.weight_ih.data, cell.weight_hh.data = ours.input.weight.data, ours.recurrent.weight.data
    cell.bias_ih.data = ours.input.bias.data
    cell.bias_hh.data.zero_()
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    h = c = torch.zeros(3, 12, dtype=torch.float64)
    for t in range(5):
        h, c = cell(x[:, t], (h, c))
        torch.testing.assert_close(ours(x)[:, t], h, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("d_model, published", [(64, 3_299_729), (256, 13_441_361)])
def test_an_lstm_counts_as_the_published_baseline_but_for_its_vocabulary(d_model, published):
    # Published with a tied embedding of 50,257 tokens, and a bias for each in the output.
    assert lstm.layer_cost(d_model).parameters == published - 50_257 * d_model - 50_257


def test_an_lstms_json_holds_no_key_of_transformers():
    assert set(arch_to_json(arch(family="lstm", head_dim=32))) == {
        "family", "depth", "d_model", "vocab", "context", "tied_head"
    }  # fmt: skip


def test_forget_gates_start_open():
    model = LM.build(arch(family="lstm", d_model=16))
    assert all((layer.input.bias[16:32] == 1).all() for layer in model.recurrent)


def test_generating_continues_a_prompt():
    torch.manual_seed(0)
    for family in ("transformer", "lstm"):
        model = LM.build(arch(family=family, context=8, d_model=16))
        prompt = torch.randint(256, (2, 6))
        text = model.generate(prompt, 5, 1.0, torch.Generator().manual_seed(0))
        assert text.shape == (2, 11)
        assert (text[:, :6] == prompt).all()


# ---- the same shape at other sizes ---------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["transformer-2017", "lstm-2", "hourglass-113m"])
def test_a_scaled_architecture_has_the_size_asked_for_and_keeps_its_shape(base):
    space = load_space("lm")
    arch = space.from_json({"base": base, "head_dim": "8"} if base != "lstm-2" else {"base": base})
    shape = {"depth", "d_model", "attention.ratio"}
    kept = {name: value for name, value in arch_to_json(arch).items() if name not in shape}
    for size in (30_000, 100_000, 1_000_000):
        scaled = space.scaled(arch, size)
        assert space.cost(scaled).parameters_total == pytest.approx(size, rel=0.15)
        assert {name: value for name, value in arch_to_json(scaled).items() if name not in shape} == kept


def test_depth_grows_in_proportion_to_width_and_a_mask_of_gates_is_stretched_over_it():
    space = load_space("lm")
    arch = space.from_json({"depth": 4, "d_model": 64, "gates.placement": "ffn", "gates.layers": "0110"})
    big = space.scaled(arch, 8 * space.cost(arch).parameters_total)
    assert big.depth == 8 and big.d_model == pytest.approx(128, rel=0.1)
    assert big.gates.layers == "00111100"


def test_a_recurrent_net_grows_in_width_alone():
    space = load_space("lm")
    assert space.scaled(space.from_json({"family": "lstm", "depth": 2}), 5_000_000).depth == 2


@pytest.mark.parametrize("settings", [{}, {"family": "transformer,lstm"}, {"match.parameters": "3000000"}])
def test_an_architecture_whose_keys_are_all_there_is_read_as_one_that_leaves_some_to_the_space(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    space = load_space("lm").restrict(settings)
    whole = [arch_to_json(space.suggest(Uniform(np.random.default_rng(seed)))) for seed in range(5)]
    partial = [{name: value for name, value in arch.items() if name != "depth"} for arch in whole]
    quickly = [space.from_json(arch) for arch in (*whole, *partial)]
    assert all(space._of_complete({name: str(value) for name, value in arch.items()}) for arch in whole)
    monkeypatch.setattr(type(space), "_of_complete", lambda *_: None)
    assert quickly == [space.from_json(arch) for arch in (*whole, *partial)]
