"""What is said of a study beside its baselines: nothing while one of them is missing."""

import json
from pathlib import Path

import pytest

from hypernas.cli.main import main
from hypernas.dashboards.report import render
from hypernas.records import Failure, FailureKind, Proposal, Recipe, Result, StudyRow
from hypernas.show.status import status_of, verdict
from hypernas.store import Store
from hypernas.store.store import MAX_LOST
from tests.nas.studies import new_study

LOST = "no comparison while a baseline is missing (trial 1: lost its workers); nas search --study s --store "


def leased(store: Store, row: StudyRow, driver: int) -> None:
    """Three baselines and one of the sampler's, all RUNNING."""
    for number in range(4):
        origin = "baseline" if number < 3 else "sampler"
        proposal = Proposal({}, {"family": "lstm"}, f"a{number}", f"c{number}", Recipe(1e-3), origin, {})
        assert store.lease_new(row, driver, proposal, 9)


def ended(store: Store, row: StudyRow, number: int, loss: float, token: int = 1) -> None:
    values = {"bits_per_byte": loss, "flops_per_token": 1e6 - number}
    assert store.finish(row, Result(number, token, values, parameters=10))


def test_nothing_is_compared_while_a_baseline_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "nas.db")
    with Store(path, create=True) as store:
        row = new_study(store)
        driver = store.start_driver(row, 1)
        leased(store, row, driver)
        for number, loss in ((0, 4.0), (3, 3.0)):
            ended(store, row, number, loss)
        assert verdict(store, row).endswith("(trials 1, 2: not trained yet); a search is at work on it")
        ended(store, row, 2, 3.5)
        token = 1
        for attempt in range(MAX_LOST):
            assert store.release(row, 1, token + attempt)
            store.lease_waiting(row, driver)
        store.stop_driver(driver)
        assert verdict(store, row).startswith(LOST) and "--resume" in verdict(store, row)
        assert status_of(store, row)["baselines_missing"] == [1]
        assert f"N{LOST[1:60]}" in render(store, row) and "beats the best" not in render(store, row)
    for form, parsed in (("--json", json.loads), ("--format=csv", str.splitlines)):
        assert main(["front", "--study", "s", "--store", path, form]) == 0
        said = capsys.readouterr()
        assert said.err.startswith(LOST) and parsed(said.out)
    assert main(["status", "--study", "s", "--store", path]) == 0
    assert "baseline missing: trial 1\n" in capsys.readouterr().out


def test_a_baseline_that_failed_for_what_it_is_does_not_stand_in_the_way_and_is_named(store: Store) -> None:
    row = new_study(store)
    driver = store.start_driver(row, 1)
    leased(store, row, driver)
    for number, loss in ((0, 4.0), (2, 3.5), (3, 3.0)):
        ended(store, row, number, loss)
    store.finish(row, Result(1, 1, failure=Failure(FailureKind.DIVERGED, "the loss is not finite")))
    store.stop_driver(driver)
    said = "trial 3 beats the best baseline (trial 2: bits_per_byte 3.5000; trial 1 failed) by 0.5000 (14.29 %)"
    assert verdict(store, row).startswith(said)
    assert "baselines_missing" not in status_of(store, row)
