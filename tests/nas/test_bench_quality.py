"""The recorded table is whole, and searches of it spend what they say."""

import json
from pathlib import Path

import pytest

from nas.bench_quality import Ours, Stock, replay, rows
from nas.errors import UserError
from nas.table import TABLE, Table, configurations, load_table


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
        row["backend"]: row["value"] for row in rows(table, curves, 20) if row["name"].endswith("at 20 trainings")
    }
    assert at_end["default"] > max(value for name, value in at_end.items() if name != "default")
