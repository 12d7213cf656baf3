"""An exported model taken apart: controls, blocks that were planted in it, and what removing the rest does."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from hypernas.cli.main import main
from hypernas.dashboards.blocks import corners, permute_evidence
from hypernas.data.tasks import TASKS
from hypernas.decompose import evidence as blocks
from hypernas.decompose.controls import load_or_train, train
from hypernas.decompose.curve import anneal, compare
from hypernas.decompose.nets import edges_of, equally_many, flops, in_blocks, mask_of, nets_of, strongest
from hypernas.decompose.report import read_evidence
from hypernas.export.card import CARD, digest, list_files
from hypernas.export.read import load
from hypernas.records import Recipe
from hypernas.search_spaces.lm import LanguageModels
from hypernas.store import Store
from hypernas.training.device import deterministic
from hypernas.training.model import seeded_build
from hypernas.training.run import Setting

ARCH = {"depth": 1, "d_model": 16, "head_dim": 8, "context": 32}
TRAINING = {"train.tokens": 4096, "train.batch_tokens": 256}


@pytest.fixture(scope="module")
def setting(text: str) -> Setting:
    deterministic()
    space = LanguageModels()
    recipe = Recipe(3e-3, tokens=TRAINING["train.tokens"], batch_tokens=TRAINING["train.batch_tokens"])
    return Setting(space, space.from_json(ARCH), TASKS["text"], TASKS["text"].load(text), recipe, data_seed=0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    root = tmp_path_factory.mktemp("exported")
    store, folder = str(root / "nas.db"), root / "model"
    flags = [
        part for name, value in {**ARCH, **TRAINING, "data.path": text}.items() for part in ("--set", f"{name}={value}")
    ]
    assert main(["search", "--study", "s", "--store", store, "--trials", "1", "--engine", "inline", *flags]) == 0
    assert main(["export", "--study", "s", "--store", store, "--trial", "0", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def planted(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export, as if its net had learned in two groups: even coordinates with even units, odd ones with odd ones."""
    folder = tmp_path_factory.mktemp("planted") / "model"
    shutil.copytree(exported, folder)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    name = "stack.sublayers.1.branch.layer"
    out, gate_up = weights[f"{name}.out.weight"], weights[f"{name}.gate_up.weight"]
    together = (torch.arange(out.shape[0])[:, None] - torch.arange(out.shape[1])) % 2 == 0  # (C, H)
    out += 0.5 * together * torch.randn(out.shape, generator=generator)
    gate_up += 0.5 * together.T.repeat(2, 1) * torch.randn(gate_up.shape, generator=generator)
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["sha256"]["model.safetensors"] = digest(folder / "model.safetensors")
    rewritten(folder, config)
    return folder


def rewritten(folder: Path, config: dict) -> None:
    """Makes an export of a folder whose files were changed."""
    (folder / "config.json").write_text(json.dumps(config))
    (folder / CARD).write_text(list_files(folder))


@pytest.fixture(scope="module")
def taken_apart(exported: Path, planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "blocks"
    more = ["--store", str(exported.parent / "nas.db"), "--figure", str(out.parent / "evidence.html")]
    assert main(["decompose", str(planted), "--out", str(out), *more]) == 0
    return out


def test_groups_planted_in_an_export_come_back_as_its_blocks(taken_apart: Path) -> None:
    report = json.loads((taken_apart / "decomposition.json").read_text())
    (net,) = report["nets"]
    assert [(block["coordinates"], block["units"]) for block in net["blocks"]] == [(8, net["units"] // 2)] * 2
    assert net["lone_coordinates"] == net["lone_units"] == 0
    for order in (net["coordinate_order"], net["unit_order"]):
        assert [index % 2 for index in order] in ([0] * (len(order) // 2) + [1] * (len(order) // 2),
                                                  [1] * (len(order) // 2) + [0] * (len(order) // 2))  # fmt: skip
    assert [control["blocks"] for control in net["controls"]] == [0, 0, 0]
    assert "in a control" in report["verdict"][0]


def test_every_step_of_the_removal_is_measured_against_the_original(taken_apart: Path) -> None:
    report = json.loads((taken_apart / "decomposition.json").read_text())
    steps = report["annealing"]
    assert [step["removed"] for step in steps] == [0, 0.25, 0.5, 0.75, 1]
    assert (steps[0]["kl"], steps[0]["agreement"]) == (0, 1)
    assert 0 < steps[1]["kl"] < steps[-1]["kl"] and steps[-1]["agreement"] < 1
    assert report["result"]["kl"] == pytest.approx(steps[-1]["kl"], rel=1e-3)  # the blocks compute what was left
    curve = report["curve"]
    assert {point["method"] for point in curve} == {"original", "blocks", "magnitude", "units", "random", "imposed"}
    blocked = [point["flops"] for point in curve if point["method"] in ("original", "blocks")]
    assert blocked == sorted(blocked, reverse=True)
    found = [point for point in curve[1:] if point["method"] != "imposed"]
    for share in {point["kept"] for point in found}:
        same = [point["flops"] for point in found if point["kept"] == share]
        assert max(same) < 1.05 * min(same)  # whole units and pointwise work are not divided exactly
        assert max(same) <= curve[0]["flops"]


def test_blocks_imposed_from_the_start_are_trained_as_the_model_was(taken_apart: Path) -> None:
    report = json.loads((taken_apart / "decomposition.json").read_text())
    points = [point for point in report["curve"] if point["method"] == "imposed"]
    assert [point["blocks"] for point in points] == [[2], [4], [8]]
    whole = report["curve"][0]
    ffn = report["nets"][0]["edges"] * 3
    assert [whole["parameters"] - point["parameters"] for point in points] == [ffn // 2, 3 * ffn // 4, 7 * ffn // 8]
    assert all(point["bits_per_byte"] < report["losses"]["untrained"] for point in points)


def test_the_evidence_of_every_edge_is_kept_and_drawn_in_its_blocks(taken_apart: Path) -> None:
    (net,) = json.loads((taken_apart / "decomposition.json").read_text())["nets"]
    surprise = read_evidence(str(taken_apart))[net["name"]]
    assert surprise.shape == (net["coordinates"], net["units"])
    shown = permute_evidence(surprise, net)
    inside = np.zeros(shown.shape, bool)
    for x0, y0, x1, y1 in corners(net):
        inside[y0:y1, x0:x1] = True
    assert shown[inside].min() > shown[~inside].max()
    assert net["name"] in (taken_apart.parent / "evidence.html").read_text()


def test_the_variants_join_the_front_of_the_models_study(
    exported: Path, taken_apart: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads((taken_apart / "decomposition.json").read_text())
    store = str(exported.parent / "nas.db")
    with Store(store) as opened:
        variants = opened.study("s").settings.variants["0"]
    blocks_of = [point for point in report["curve"] if point["method"] == "blocks"]
    assert [v["flops_per_token"] for v in variants] == [point["flops"] for point in blocks_of]
    assert [v["bits_per_byte"] for v in variants] == [point["bits_per_byte"] for point in blocks_of]
    assert main(["front", "--study", "s", "--store", store]) == 0
    assert (
        f"trial 0 in blocks: {len(variants)} of {len(variants)} variants are beyond the front"
        in capsys.readouterr().out
    )


def test_a_store_that_does_not_hold_the_model_is_refused_before_anything_is_trained(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = Path(shutil.copytree(exported, tmp_path / "longer"))
    config = json.loads((longer / "config.json").read_text())
    config["training"]["train.tokens"] *= 2
    rewritten(longer, config)
    for folder, store, message in (
        (exported, str(tmp_path / "none.db"), "none.db"),
        (longer, str(exported.parent / "nas.db"), "is not the model of"),
    ):
        assert main(["decompose", str(folder), "--out", str(tmp_path / "out"), "--store", store]) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["longer"]


def test_the_model_in_blocks_loads_and_scores_as_reported(
    taken_apart: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(taken_apart), "--data", text, "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    report = json.loads((taken_apart / "decomposition.json").read_text())
    assert scored["bits_per_byte"] == pytest.approx(report["result"]["bits_per_byte"], abs=1e-5)
    assert "BlockSwiGLU" in (taken_apart / "model.py").read_text()


def test_a_model_without_evidence_stays_as_it_was(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "blocks"
    assert main(["decompose", str(exported), "--out", str(out)]) == 0
    report = json.loads((out / "decomposition.json").read_text())
    assert report["nets"][0]["blocks"] == [] and report["result"]["kl"] == 0
    assert (out / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    assert not (tmp_path / "blocks.controls").exists()


def damaged(folder: Path, into: Path, file: str) -> Path:
    shutil.copytree(folder, into)
    data = bytearray((into / file).read_bytes())
    data[len(data) // 2] ^= 1
    (into / file).write_bytes(bytes(data))
    return into


@pytest.mark.parametrize("file", ["model.safetensors", "model.py", "config.json"])
def test_a_tampered_export_is_refused(
    exported: Path, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = damaged(exported, tmp_path / "export", file)
    assert main(["decompose", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_input_is_refused_before_anything_is_trained(
    exported: Path, taken_apart: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("something else\n" * 500)
    out = ["--out", str(tmp_path / "out")]
    for command, message in (
        ([str(tmp_path), *out], "not an exported model"),
        ([str(taken_apart), *out], "taken apart already"),
        ([str(exported), "--out", str(exported)], "exists"),
        ([str(exported), *out, "--controls", "2"], "at least 3"),
        ([str(exported), *out, "--data", str(other)], "hash"),
    ):
        assert main(["decompose", *command]) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.txt"]


def test_a_control_that_is_kept_is_not_trained_again(setting: Setting, tmp_path: Path) -> None:
    said: list[str] = []
    first = load_or_train(setting, "control 1", tmp_path, said.append, shuffled_by=1)
    assert said
    said.clear()
    again = load_or_train(setting, "control 1", tmp_path, said.append, shuffled_by=1)
    assert not said
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def without_signal(setting: Setting, number: int) -> torch.nn.Module:
    return train(setting, "control", lambda text: None, shuffled_by=number)


def test_controls_differ_from_each_other_and_start_where_the_model_did(setting: Setting) -> None:
    still = replace(setting, recipe=replace(setting.recipe, learning_rate=0.0))
    initial = seeded_build(setting.space, setting.arch, setting.recipe.seed)
    unmoved = without_signal(still, 1)
    assert all(torch.equal(a, b) for a, b in zip(initial.parameters(), unmoved.parameters(), strict=True))
    one, two = (nets_of(without_signal(setting, number)) for number in (1, 2))
    assert all(np.abs(edges_of(one[name]) - edges_of(two[name])).max() > 1e-4 for name in one)


@pytest.mark.slow
def test_models_trained_without_signal_have_a_block_in_at_most_one_of_twenty_seeds(setting: Setting) -> None:
    found = 0
    for seed in range(20):
        seeded = replace(setting, recipe=replace(setting.recipe, seed=seed))
        initial = nets_of(seeded_build(setting.space, setting.arch, seed))
        trained = [nets_of(without_signal(seeded, number)) for number in range(4)]
        for name, net in initial.items():
            before, final = edges_of(net), [edges_of(nets[name]) for nets in trained]
            factor = blocks.shrinkage(final[1:], before)
            model, *controls = (blocks.learned_change(weights, before, factor) for weights in final)
            found += bool(strongest(blocks.weigh(model, controls), 1.0).blocks)
    assert found <= 1


def halves(setting: Setting, model: torch.nn.Module) -> dict[str, blocks.Structure]:
    """Two blocks in every net, the last coordinates and units in none."""
    out = {}
    for name, net in nets_of(model).items():
        edges = np.zeros((net.d_model, net.d_hidden), bool)
        edges[:6, :20] = edges[6:14, 20:37] = True
        out[name] = blocks.take_apart(edges, edges)
    return out


def test_the_blocks_compute_what_the_annealed_net_does(setting: Setting) -> None:
    original = seeded_build(setting.space, setting.arch, 0).eval()
    model = seeded_build(setting.space, setting.arch, 0)
    structures = halves(setting, original)
    masks = {name: mask_of(structure, 3) for name, structure in structures.items()}
    assert list(anneal(setting, model, masks, 4, 0)) == [0.25, 0.5, 0.75, 1.0]
    tokens = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(in_blocks(original, structures)(tokens), model(tokens))
    for name, net in nets_of(model).items():
        assert np.array_equal(edges_of(net) != 0, masks[name])


def test_short_training_between_the_steps_helps_and_brings_nothing_back(setting: Setting) -> None:
    original = without_signal(setting, 0)
    masks = {name: mask_of(structure, 3) for name, structure in halves(setting, original).items()}
    losses = {}
    for retrain in (0, 4096):
        model = without_signal(setting, 0)
        assert len(list(anneal(setting, model, masks, 2, retrain))) == 2
        assert all(not edges_of(net)[~masks[name]].any() for name, net in nets_of(model).items())
        losses[retrain] = compare(setting, original, model)["bits_per_byte"]
    assert losses[4096] < losses[0]


def test_the_flops_of_blocks_are_those_that_are_counted(setting: Setting) -> None:
    model = seeded_build(setting.space, setting.arch, 0).eval()
    structures = halves(setting, model)
    masks = {name: mask_of(structure, 3) for name, structure in structures.items()}
    tokens = torch.zeros(1, 32, dtype=torch.long)
    counted = []
    for each in (model, in_blocks(model, structures)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            each(tokens)
        counted.append(counter.get_total_flops() / 32)
    whole = {name: np.ones_like(mask) for name, mask in masks.items()}
    pointwise = 5 * (nets_of(model)["stack.sublayers.1.branch.layer"].d_hidden - 37)  # of the units in no block
    assert flops(setting, model, whole) - flops(setting, model, masks) == counted[0] - counted[1] + pointwise


@pytest.mark.parametrize("method", ["magnitude", "units", "random"])
def test_other_ways_to_remove_keep_as_many_weights(method: str) -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((3, 8, 12))
    mask = np.zeros((3, 8, 12), bool)
    mask[:, :4, :6] = mask[:, 4:, 6:] = True
    chosen = equally_many(method, weights, mask, 0)
    assert chosen.sum() == mask.sum()
    if method == "magnitude":
        assert np.abs(weights[chosen]).min() >= np.abs(weights[~chosen]).max()
    if method == "units":
        assert (chosen == chosen[:1, :1]).all()
    if method == "random":
        assert (np.sort(chosen.sum((0, 1))) == np.sort(mask.sum((0, 1)))).all() and (chosen != mask).any()


def test_less_of_the_evidence_gives_fewer_flops(planted: Path, setting: Setting) -> None:
    model = load(planted)
    (net,) = nets_of(model).values()
    initial = edges_of(*nets_of(seeded_build(setting.space, setting.arch, 0)).values())
    rng = np.random.default_rng(0)
    noise = [0.01 * rng.standard_normal(initial.shape) for _ in range(3)]
    evidence = blocks.weigh(edges_of(net) - initial, noise)
    kept = [sum(block.edges for block in strongest(evidence, share).blocks) for share in (1.0, 0.5, 0.1)]
    assert kept == sorted(kept, reverse=True) and kept[2] < kept[0]
