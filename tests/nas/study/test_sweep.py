"""Fixed lists of configurations: what they train, what they do not train again, what they refuse."""

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from hypernas.config.study_config import StudyConfig
from hypernas.engines.inline import Inline
from hypernas.engines.protocol import Event, Executor, Lost
from hypernas.engines.ray_pool import RayPool
from hypernas.errors import StudyError, UserError
from hypernas.records import Proposal, Result, State
from hypernas.search_spaces.base import SpaceError
from hypernas.show.views import Silent
from hypernas.store import Store
from hypernas.strategy.proposals import config_hash
from hypernas.study.driver import retrain
from hypernas.study.search import make_job
from hypernas.study.sweep import sweep

COMMON = {"depth": "1", "d_model": "16", "head_dim": "8", "context": "32", "train.tokens": "512"}
COMMON |= {"train.batch_tokens": "256"}
RATES = [{"optim.lr": rate, "train.seed": seed} for rate in (1e-3, 3e-3) for seed in (0, 1)]


def config(text: str, study: str = "list", **more: object) -> StudyConfig:
    return StudyConfig(study=study, settings={**COMMON, "data.path": text}, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["inline", pytest.param("ray", marks=pytest.mark.slow)])
def test_every_configuration_gets_its_trial_in_order_and_equal_ones_share_it(
    engine: str, tmp_path: Path, text: str
) -> None:
    two, same = {"streams.n": 2, "streams.mixing": "kromhc"}, {"streams.n": 2, "streams.mixing": "mhc_lite"}
    runs = [*RATES, two, RATES[1], same]
    executor: Executor = Inline() if engine == "inline" else RayPool(2)
    try:
        with Store(str(tmp_path / "nas.db"), create=True) as store:
            trials = sweep(store, executor, config(text), runs)
            row = store.study("list")
            assert len(store.trials(row)) == 5
            again = retrain(make_job(store, row, trials[4]), Silent())
    finally:
        executor.close()
    assert [(t.recipe.learning_rate, t.recipe.seed) for t in trials[:4]] == [(1e-3, 0), (1e-3, 1), (3e-3, 0), (3e-3, 1)]
    assert (trials[5].number, trials[6].number) == (trials[1].number, trials[4].number)
    assert {(trial.origin, trial.state) for trial in trials} == {("sweep", State.COMPLETE)}
    assert {trial.recipe.tokens for trial in trials} == {512}
    assert dict(again.values) == dict(trials[4].values)


class Kills(Inline):
    """Inline, but the workers of trial 0 die."""

    def wait(self, timeout: float) -> list[Event]:
        assert self._current is not None
        job = self._current[0]
        if job.trial:
            return super().wait(timeout)
        self._current = None
        return [Lost(job.trial, job.token, "died")]


def test_nothing_is_concluded_from_a_list_whose_trials_lost_their_workers(tmp_path: Path, text: str) -> None:
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        with pytest.raises(StudyError, match="trial 0 of study 'list' lost"):
            sweep(store, Kills(), config(text), RATES[:2])
        assert [trial.state for trial in sweep(store, Inline(), config(text), RATES[:2])] == [State.COMPLETE] * 2


def test_a_list_run_again_trains_what_is_missing_and_nothing_twice(tmp_path: Path, text: str) -> None:
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        first = sweep(store, Inline(), config(text), RATES[:2])
        assert store.study("list").settings.trials == 2
        second = sweep(store, Inline(), config(text), RATES)
        assert second[:2] == first
        assert store.study("list").settings.trials == len(store.trials(store.study("list"))) == 4
        assert sweep(store, Inline(), config(text), RATES[::-1]) == second[::-1]


class Interrupting(Inline):
    """Presses Ctrl-C while the second trial runs."""

    def wait(self, timeout: float) -> list[Event]:
        job = self._current[0] if self._current else None
        if job is not None and job.trial == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return super().wait(timeout)


def test_an_interrupted_list_goes_on_where_it_was(tmp_path: Path, text: str) -> None:
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        with pytest.raises(KeyboardInterrupt):
            sweep(store, Interrupting(), config(text), RATES)
        states = store.states(store.study("list"))
        assert states["RUNNING"] == 0 and 0 < states["COMPLETE"] < 4
        assert [trial.state for trial in sweep(store, Inline(), config(text), RATES)] == [State.COMPLETE] * 4


def test_a_trial_that_another_process_is_training_is_waited_for(tmp_path: Path, text: str) -> None:
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        (first,) = sweep(store, Inline(), config(text), RATES[:1])
        row = store.study("list")
        driver = store.start_driver(row, 1)  # of this process, so alive
        recipe = replace(first.recipe, seed=7)
        key = config_hash(first.arch_hash, recipe)
        proposal = Proposal({}, first.arch, first.arch_hash, key, recipe, "sweep", {})
        leased = store.lease_new(row, driver, proposal, 10)
        assert leased
        ends = threading.Timer(1.0, store.finish, (row, Result(1, leased.token, {**first.values, "parameters": 7.0})))
        ends.start()
        _, second = sweep(store, Inline(), config(text), [*RATES[:1], {**RATES[0], "train.seed": 7}])
        assert second.values["parameters"] == 7.0


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([], "list of configurations is empty"),
        ([{"depth": "1,2"}], "depth=1,2: wanted one value"),
        ([{"optim.lr": "1e-3,3e-3"}], "optim.lr=1e-3,3e-3: wanted a number"),
        ([{"dept": 1}], "did you mean 'depth'"),
        ([{"data.path": "elsewhere.txt"}], "one sweep has one set of data"),
        ([RATES[0], {"head_dim": 7}], "head_dim=7"),
    ],
)
def test_a_list_that_cannot_be_trained_is_refused_before_anything_is_written(
    runs: list, said: str, tmp_path: Path, text: str
) -> None:
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        with pytest.raises((UserError, SpaceError), match=said):
            sweep(store, Inline(), config(text), runs)
        assert store.studies() == []


def test_a_list_for_other_data_is_refused(tmp_path: Path, text: str) -> None:
    other = tmp_path / "other.txt"
    other.write_text(Path(text).read_text()[::-1])
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        sweep(store, Inline(), config(text), RATES[:1])
        with pytest.raises(StudyError, match="losses would not compare"):
            sweep(store, Inline(), config(str(other)), RATES[:1])
