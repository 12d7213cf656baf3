"""The long run's looks see what a driver holds and leaves, and its slopes are those of the looks."""

import tempfile
from pathlib import Path

import pytest

from hypernas.bench.long_run import UNITS, drive, rows_of
from hypernas.store import Reader


def test_a_long_run_is_looked_at_to_its_end_and_keeps_the_fronts_weights_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    looks = drive(str(tmp_path), 70, "inline")
    assert [count for count, _ in looks] == list(range(2, 71, 2))
    last = looks[-1][1]
    assert last["driver_memory"] > 50 and last["driver_descriptors"] > 3 and last["write_ahead_log"] > 0
    assert last["files"] == 3  # the store, its log and the log's index
    with Reader(str(tmp_path / "nas.db")) as store:
        front = store.front(store.study("long"))
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(front)
    assert not list(tmp_path.rglob("*.checkpoint*"))


def test_the_growth_of_a_long_run_is_that_of_its_looks_by_thousand_trials() -> None:
    looks = [(100 * n, dict.fromkeys(UNITS, 50.0 + 0.2 * n)) for n in range(1, 31)]
    looks[0] = (100, dict.fromkeys(UNITS, 0.0))  # the start, which is left out
    rows = {(row["name"], row["backend"]): row["value"] for row in rows_of(looks)}
    assert rows["files", "at the end"] == 56.0
    assert rows["files", "growth"] == pytest.approx(2.0)
