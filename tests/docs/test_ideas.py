"""The study of the four ideas, with a tenth of a second's training an arm: its arms can be built, its tables say what
its trials came to, and a second run trains nothing."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from hypernas.search_spaces import load_space
from hypernas.search_spaces.gates import execution_rates, gate_loss, gates_of, reset_rates, start_step

FILE = Path(__file__).parents[2] / "docs" / "studies" / "ideas.py"


@pytest.fixture(scope="module")
def ideas():
    spec = importlib.util.spec_from_file_location("ideas", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["ideas"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_arm_can_be_built_and_those_of_one_budget_are_near_it(ideas):
    lm, vision = load_space("lm"), load_space("vision")
    common = {name: value for name, value in ideas.TEXT.items() if not name.startswith("train.")}
    for arms in (ideas.FFN, ideas.STREAMS):
        spent = {}
        for name, arm in arms.items():
            spent[name] = lm.cost(lm.from_json({**common, **arm})).parameters_total
        assert max(spent.values()) / min(spent.values()) < 1.07, spent  # widths go in steps of 4
    for arm in {**ideas.PLAIN, **ideas.GATES, **ideas.STEADY}.values():
        lm.from_json({**common, **arm})
    for arm in {**ideas.IMAGE_PLAIN, **ideas.IMAGE_GATES}.values():
        vision.from_json({"depth": ideas.IMAGES["depth"], **arm})


@pytest.mark.parametrize(
    ("values", "control", "said"),
    [
        ((1.00, 1.01, 0.99), (1.20, 1.21, 1.19), "lower"),
        ((1.20, 1.21, 1.19), (1.00, 1.01, 0.99), "higher"),
        ((1.00, 1.10, 0.90), (1.02, 1.12, 0.92), "no difference"),
    ],
)
def test_a_difference_counts_where_it_is_larger_than_chance(ideas, values, control, said):
    assert ideas.verdict(values, control) == said


def test_the_difference_of_means_comes_with_welchs_error(ideas):
    assert ideas.difference((1.0, 2.0, 3.0), (5.0, 5.0, 8.0)) == pytest.approx((-4.0, (1 / 3 + 3 / 3) ** 0.5))


@pytest.mark.slow
def test_the_gates_part_trains_its_controls_at_what_the_gates_came_to_and_nothing_twice(
    ideas, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(ideas, "TEXT", {**ideas.TEXT, "context": 32, "depth": 2})
    monkeypatch.setattr(ideas, "GATED", {**ideas.GATED, "d_model": 32})
    monkeypatch.setattr(ideas, "PLAIN", {"no gates": {"d_model": 32}})
    monkeypatch.setattr(ideas, "GATES", {"cosine": {**ideas.GATED, "gates.rate": 0.5}})
    monkeypatch.setattr(
        ideas, "STEADY", {"steady": {**ideas.GATED, "gates.rate": 0.5, "gates.consistency": "perturbation"}}
    )
    for name, value in {"RATES": (3e-3,), "SEEDS": (0, 1), "REPEATS": 2}.items():
        monkeypatch.setattr(ideas, name, value)
    command = ["--store", str(tmp_path / "ideas.db"), "--out", str(tmp_path), "--part", "gates", "--tokens", "2048"]
    assert ideas.main([*command, "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    written = (tmp_path / "ideas.md").read_text()
    assert printed.strip() == written.strip()
    rows = list(csv.DictReader((tmp_path / "ideas.csv").open()))
    assert {row["state"] for row in rows} == {"COMPLETE"}
    arms = {row["arm"]: row for row in rows if row["for"] == "result"}
    cosine, narrow = arms["cosine"], arms["no gates, FLOPs of cosine"]
    assert float(narrow["flops_per_token"]) == pytest.approx(float(cosine["flops_per_token"]), rel=0.15)
    (random,) = [name for name in arms if name.startswith("random")]
    assert len(rows) == len(arms) * 3  # one rate tried, two seeds
    assert all(f"| {name} |" in written for name in arms) and random in written
    assert written.count("| cosine |") == 2  # what it came to, and how long a forward takes
    assert ideas.main([*command, "--workers", "1"]) == 0
    assert list(csv.DictReader((tmp_path / "ideas.csv").open())) == rows


# ---- the control ---------------------------------------------------------------------------------------------


def random_model(rate: float):
    space = load_space(f"{FILE.with_name('random_gates.py')}:Space")
    arch = space.from_json({"depth": 2, "d_model": 32, "context": 64, "gates.placement": "ffn", "gates.rate": rate})
    torch.manual_seed(0)
    return space, arch, space.build(arch)


def test_random_gates_let_their_share_of_tokens_through_and_decide_alike_every_time():
    _, _, model = random_model(0.3)
    tokens = torch.randint(256, (64, 64))
    model.eval()
    reset_rates(model)
    first = model(tokens)
    assert execution_rates(model) == pytest.approx([0.3, 0.3], abs=0.03)
    assert torch.equal(model(tokens), first)


def test_random_gates_train_on_new_tokens_each_step_and_have_nothing_to_learn():
    space, arch, model = random_model(0.5)
    model.train()
    h = torch.ones(4, 64, 32)
    masks = []
    for step in (0, 1, 1):
        start_step(model, 0, step, 0.5)
        masks.append([gate(h, h)[..., 0] for gate in gates_of(model)])
    assert torch.equal(masks[1][0], masks[2][0]) and not torch.equal(masks[0][0], masks[1][0])
    assert not torch.equal(masks[0][0], masks[0][1])
    logits = model(torch.randint(256, (4, 64)))
    (logits.square().mean() + gate_loss(model, 1.0)).backward()
    assert all(parameter.grad is None for gate in gates_of(model) for parameter in gate.parameters())
    assert space.cost(arch) == load_space("lm").cost(load_space("lm").from_json(
        {"depth": 2, "d_model": 32, "context": 64, "gates.placement": "ffn", "gates.rate": 0.5}
    ))  # fmt: skip
