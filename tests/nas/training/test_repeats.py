"""A trial of several seeds: means, spreads, and what a lost worker costs."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypernas.cli.main import main
from hypernas.records import FailureKind, Job, Notice, Progress, Recipe, Report, Result, SpaceSpec, State
from hypernas.store import Store
from hypernas.training import worker
from hypernas.training.checkpoint_files import checkpoint_path, discard, list_checkpoints, seeds_path
from hypernas.training.repeats import of_first_seed, seeds, spread

TINY = {"depth": "1..2", "d_model": "16", "head_dim": "8", "context": "16", "train.tokens": "1024"}
TINY |= {"train.batch_tokens": "128", "optim.lr": "0.003"}


def job(folder: Path, evaluate: str = "tests.nas.evaluations:scores_its_seed", repeats: int = 3) -> Job:
    path = checkpoint_path(str(folder), 5)
    recipe = Recipe(1.0, seed=4)
    return Job("s", 5, 1, SpaceSpec("lm"), {}, recipe, None, "", 0, repeats=repeats, checkpoint=path, evaluate=evaluate)


def test_progress_runs_once_from_start_to_end(tmp_path: Path) -> None:
    shares = [event.share for event in worker.run(job(tmp_path)) if isinstance(event, Progress)]
    assert shares == pytest.approx([0.5 / 3, 1.5 / 3, 2.5 / 3])


def test_a_lost_worker_costs_no_seed_that_was_done(tmp_path: Path) -> None:
    lost = worker.run(job(tmp_path))
    started = 0
    for event in lost:
        started += isinstance(event, Progress)
        if started == 3:
            break
    lost.close()
    assert list_checkpoints(str(tmp_path)) == {5}
    events = list(worker.run(job(tmp_path)))
    assert [type(event) for event in events] == [Progress, Result]
    (whole,) = (event for event in worker.run(job(tmp_path / "elsewhere")) if isinstance(event, Result))
    result = events[-1]
    assert isinstance(result, Result)
    assert (result.values, result.diagnostics, result.train_seconds) == (whole.values, whole.diagnostics, 9.0)
    discard(str(tmp_path), 5)
    assert list_checkpoints(str(tmp_path)) == set()


@pytest.mark.parametrize("content", ["", json.dumps({"identity": "other", "ended": [{"values": {"x": 1.0}}]})])
def test_a_note_that_is_damaged_or_of_other_training_is_not_used(content: str, tmp_path: Path) -> None:
    seeds_path(checkpoint_path(str(tmp_path), 5)).write_text(content)
    events = list(worker.run(job(tmp_path)))
    assert sum(isinstance(event, Progress) for event in events) == 3
    assert sum(isinstance(event, Notice) for event in events) == (content == "")


def test_a_seed_that_fails_fails_the_trial_and_is_named(tmp_path: Path) -> None:
    *_, result = worker.run(job(tmp_path, "tests.nas.evaluations:raises"))
    assert isinstance(result, Result) and result.failure is not None
    assert result.failure.kind == FailureKind.OUT_OF_MEMORY
    assert "with seed 4, of [4, 5, 6]" in result.failure.traceback


def test_a_trial_stopped_at_a_rung_trains_no_other_seed(tmp_path: Path) -> None:
    events = worker.run(job(tmp_path))
    assert isinstance(next(event for event in events if not isinstance(event, Progress)), Report)
    events.close()
    assert not seeds_path(checkpoint_path(str(tmp_path), 5)).exists()


@pytest.fixture
def searched(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> Iterator[str]:
    """A store with a study of four trials of two seeds, the last two trained after a resume."""
    store = str(tmp_path / "nas.db")
    settings = [part for name, value in (TINY | {"data.path": text}).items() for part in ("--set", f"{name}={value}")]
    command = ["search", "--study", "s", "--store", store, "--engine", "inline", "--kernels", "reference", *settings]
    assert main([*command, "--repeats", "2", "--trials", "2"]) == 0
    assert main([*command, "--resume", "--trials", "4"]) == 0
    assert main([*command, "--resume", "--repeats", "3"]) == 2
    assert "was created with repeats 2, not 3" in capsys.readouterr().err
    yield store


def test_the_front_shows_means_seeds_and_spread(searched: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Store(searched) as store:
        row = store.study("s")
        trials = store.trials(row)
        assert {trial.state for trial in trials} == {State.COMPLETE}
        for trial in trials:
            first, second = trial.diagnostics["by_seed"]["bits_per_byte"]
            assert first != second
            assert trial.values["bits_per_byte"] == pytest.approx((first + second) / 2)
            assert spread(trial, row.objectives) == {"bits_per_byte": pytest.approx(abs(first - second) / 2**0.5)}
            assert of_first_seed(trial).values["bits_per_byte"] == first
            assert seeds(trial) == [0, 1]
    assert main(["front", "--study", "s", "--store", searched, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert all(entry["seeds"] == [0, 1] and entry["spread"]["bits_per_byte"] > 0 for entry in listed)
    assert main(["front", "--study", "s", "--store", searched]) == 0
    assert "±" in capsys.readouterr().out
    assert main(["status", "--study", "s", "--store", searched]) == 0
    assert "spread of bits_per_byte over seeds" in capsys.readouterr().out


def test_an_export_is_the_first_seeds_model_and_says_what_that_scores(searched: str, tmp_path: Path) -> None:
    with Store(searched) as store:
        row = store.study("s")
        trial = store.front(row)[0]
        store.drop_artifact(row, trial.number, "weights")  # then it is trained again, and must give its values
    out = tmp_path / "out"
    assert main(["export", "--study", "s", "--store", searched, "--trial", str(trial.number), "--out", str(out)]) == 0
    values = json.loads((out / "config.json").read_text())["values"]
    assert values["bits_per_byte"] == trial.diagnostics["by_seed"]["bits_per_byte"][0]


def test_a_number_of_seeds_below_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "--study", "s", "--repeats", "0"]) == 2
    assert "--repeats 0: wanted 1 to 100" in capsys.readouterr().err
