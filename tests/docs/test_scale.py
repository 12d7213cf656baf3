"""The study of scale: its families can be built at every size, its ladder spans what it says, its tables say which
gains are extrapolated."""

import csv
import importlib.util
import math
from pathlib import Path

import pytest

from hypernas.scaling.analysis import analyse
from hypernas.scaling.contenders import TOGETHER, Contender
from hypernas.scaling.fit import Measurement
from hypernas.scaling.ladder import Climbed
from hypernas.search_spaces import load_space
from hypernas.search_spaces.base import arch_to_json
from hypernas.yardstick import Law

FILE = Path(__file__).parents[2] / "docs" / "studies" / "scale.py"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("scale_study", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_family_is_near_every_size_and_the_ladder_spans_a_decade_and_a_half(study):
    space, spent = load_space("lm"), {}
    for name, (settings, _) in study.FAMILIES.items():
        for size in study.LADDER.sizes:
            cost = space.cost(space.scaled(space.from_json(settings), size))
            assert cost.parameters_total == pytest.approx(size, rel=0.12), name
            spent[name, size] = cost.flops_total * study.LADDER.tokens(size, study.LADDER.tokens_per_parameter[0])
    for name in study.FAMILIES:
        own = [flops for (family, _), flops in spent.items() if family == name]
        assert math.log10(own[-1] / own[0]) >= 1.5
    assert [len(study.LADDER.seeds_of(size)) for size in study.LADDER.sizes] == [3, 3, 3, 1, 1]


def analysed(laws, sizes):
    runs = [
        Measurement(family, N, 20 * N, 120.0 * N * N, float(law.loss(120.0 * N * N)))
        for family, law in laws.items()
        for N in sizes
    ]
    rates = {family: dict.fromkeys(sizes, 3e-3) for family in laws}
    return analyse(Climbed(tuple(runs), rates, (), ()), [Contender(name, {}) for name in laws], seed=0)


def test_what_is_written_says_which_gains_are_extrapolated_and_what_each_component_gains(study, tmp_path):
    laws = {"LSTM": Law(1.0, 60.0, 0.13), "modern Transformer": Law(1.0, 55.0, 0.13)}
    steps = {name: Law(1.0, 60.0 * 0.99**k, 0.13) for k, name in enumerate([study.OLD, *study.COMPONENTS], 1)}
    parts = analysed({**steps, TOGETHER: Law(1.0, 50.0, 0.13)}, study.ABLATION.sizes)
    study.write(analysed(laws, study.LADDER.sizes), parts, tmp_path)
    written = (tmp_path / "scale.md").read_text()
    rows = [line for line in written.splitlines() if line.startswith("| modern Transformer")]
    assert [row.rsplit("| ", 1)[-1] for row in rows] == ["measured |"] * 5 + ["extrapolated |"] * 3
    assert "over LSTM, at equal loss" in written
    (norm,) = (line for line in written.splitlines() if line.startswith("| pre-norm"))
    assert float(norm.split("|")[2]) == pytest.approx((1 / 0.99) ** (1 / 0.13), rel=0.05) and norm.endswith("| 1.87 |")
    (together,) = (line for line in written.splitlines() if line.startswith("| all together"))
    assert float(together.split("|")[2]) == pytest.approx((60 * 0.99 / 50) ** (1 / 0.13), rel=0.05)
    runs = list(csv.DictReader((tmp_path / "scale.csv").open()))
    assert [run["study"] for run in runs] == ["families"] * 10 + ["components"] * 28


def test_with_every_component_the_transformer_of_2017_is_the_modern_one_but_for_the_width_of_its_feed_forward_net(
    study,
):
    old, *_, together = study.components()
    modern = load_space("lm").from_json(study.FAMILIES["modern Transformer"][0])
    assert {name for name in old.arch if old.arch[name] != together.arch[name]} == {
        *("norm.position", "norm.kind", "position", "ffn.activation"),
    }
    assert together.training["optim.schedule"] == "cosine"
    for name in ("norm.position", "norm.kind", "position", "ffn.activation"):
        assert together.arch[name] == arch_to_json(modern)[name]
