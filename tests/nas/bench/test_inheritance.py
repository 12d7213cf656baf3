"""`nas bench search --part inheritance`: its pairs are evolution's own, and its numbers those of real trainings."""

from itertools import islice

import pytest

from hypernas.bench import inheritance
from hypernas.bench.inheritance import Trained, chosen_pairs, measure, mutations, pair_rows, shares
from hypernas.config.plan import Plan, make_plan
from hypernas.config.study_config import StudyConfig

TINY = {"depth": "1..2", "d_model": "16", "head_dim": "8", "context": "16", "train.tokens": "512", "streams.n": "1"}
TINY |= {"train.batch_tokens": "128", "ffn.ratio": "2", "attention.ratio": "1", "gates.placement": "none"}


@pytest.fixture
def plan(text: str) -> Plan:
    return make_plan(StudyConfig(settings=TINY | {"data.path": text}))


def test_a_step_changes_one_parameter_and_all_that_can_inherit_are_counted(plan: Plan) -> None:
    steps = list(islice(mutations(plan, 0), 300))
    assert {step.kind for step in steps} == {"depth", "optim.lr"}
    for step in steps:
        before, after = plan.params(*step.parent), plan.params(*step.child)
        assert [name for name in before if before[name] != after[name]] == [step.kind]
    found = shares(plan, steps)
    deeper = [step.child[0].depth > step.parent[0].depth for step in steps if step.kind == "depth"]
    assert (found["optim.lr"], found["depth"]) == (1.0, sum(deeper) / len(deeper))
    assert found["all"] == (300 - len(deeper) + sum(deeper)) / 300


def test_pairs_are_different_and_the_same_for_a_seed(plan: Plan) -> None:
    pairs = [chosen_pairs(plan, list(islice(mutations(plan, seed), 200)), 3) for seed in (0, 0, 1)]
    assert pairs[0] == pairs[1] != pairs[2]
    assert [pair.kind for pair in pairs[0]] == 3 * ["depth", "optim.lr"]
    assert len(set(pairs[0])) == 6


def test_the_same_seed_measures_the_same(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inheritance, "DRAWN", 100)
    first, again = (measure(seed=0, pairs=2, plan=plan)["rows"] for _ in range(2))
    assert first == again
    gains = {(row["name"], row["backend"]): row["value"] for row in first}
    assert gains["gain", "depth"] != gains["gain over twice the tokens", "depth"]


def test_gains_are_medians_and_the_correlation_is_of_ranks() -> None:
    losses = [(3.0, 2.9, 2.5), (2.0, 2.0, 1.0), (4.0, 3.5, 2.0), (5.0, 4.0, 3.0)]
    gain, over, rho, longer = pair_rows("all", "bits_per_byte", [Trained("depth", *three) for three in losses])
    assert (gain["value"], gain["quartiles"]) == (1.5, [0.875, 2.0])
    assert over["value"] == 1.0
    assert rho["value"] == pytest.approx(0.8)  # 1 - 6 (1 + 1) / (4 * 15)
    assert longer["value"] == 1.0
