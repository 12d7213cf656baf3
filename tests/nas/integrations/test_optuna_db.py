"""Studies in Optuna's own schema, there and back."""

from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy import create_engine, inspect

from hypernas.cli.main import main
from hypernas.config.plan import make_plan
from hypernas.config.study_config import StudyConfig
from hypernas.engines.inline import Inline
from hypernas.errors import StoreError, StudyError
from hypernas.integrations.optuna_db import best_params, export_study, import_study
from hypernas.records import Failure, FailureKind, Proposal, Report, Result, State
from hypernas.show.views import Silent
from hypernas.store import Store
from hypernas.study.driver import run
from hypernas.study.search import Search, open_search, prepare

CONFIG = StudyConfig(study="s", trials=12, preset="quick", settings={"max.latency_ms": "10"})


def searched(store: Store) -> Search:
    """A study with trials in every state."""
    search = open_search(store, prepare(CONFIG), evaluate="trivial")
    run(search, Inline(), Silent())
    row = search.row
    driver = store.start_driver(row, 1)
    last = store.trial(row, 11)
    for number in range(12, 15):
        attrs = {"constraints:memory": 1.5, "generation": 3}
        recipe = replace(last.recipe, seed=number)
        proposal = Proposal(last.params, last.arch, last.arch_hash, f"c{number}", recipe, "sampler", attrs)
        leased = store.lease_new(row, driver, proposal, 20)
        assert leased and leased.number == number
    store.report(row, Report(12, 0, 5, 640, 1e9, 2.5, 0.1), 1)
    failure = Failure(FailureKind.OVER_LIMIT, "latency 15 ms, over max.latency_ms=10", "trace")
    store.finish(row, Result(12, 1, diagnostics={"latency_ms": 15.0}, failure=failure))
    store.release(row, 13, 1, fault=False)
    store.stop_driver(driver)
    return search


def test_a_study_comes_back_as_it_went(tmp_path: Path) -> None:
    url = str(tmp_path / "optuna.db")
    with Store(str(tmp_path / "a.db"), create=True) as first, Store(str(tmp_path / "b.db"), create=True) as second:
        search = searched(first)
        assert export_study(first, search.row, url, make_plan(CONFIG).suggest, print) == 15
        row, count = import_study(second, url, None)
        assert (count, row.name) == (15, "s")
        assert replace(row, id=0, created=search.row.created) == replace(search.row, id=0)
        for old, new in zip(first.trials(search.row), second.trials(row), strict=True):
            if old.number == 14:  # it ran; its driver is not here
                assert (old.state, new.state) == (State.RUNNING, State.WAITING)
                continue
            assert replace(new, seq=0, driver=None) == replace(old, seq=0, driver=None, sampler_attrs=new.sampler_attrs)
        assert [t.number for t in second.front(row)] == [t.number for t in first.front(search.row)]
        assert second.hypervolumes(row) == first.hypervolumes(search.row)
        assert second.reports(row) == first.reports(search.row)
        with pytest.raises(StudyError, match="already"):
            export_study(first, search.row, url, make_plan(CONFIG).suggest, print)
    assert main(["search", "--study", "s", "--store", str(tmp_path / "b.db"), "--resume", "--engine", "inline"]) in (
        0,
        1,
    )


def test_stock_optuna_reads_the_export(tmp_path: Path) -> None:
    with Store(str(tmp_path / "a.db"), create=True) as store:
        search = searched(store)
        export_study(store, search.row, str(tmp_path / "optuna.db"), make_plan(CONFIG).suggest, print)
        front = {tuple(trial.values[name] for name in search.row.objectives) for trial in store.front(search.row)}
        trials = store.trials(search.row)
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path / 'optuna.db'}")
    assert study.metric_names == ["bits_per_byte", "flops_per_token"]
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.COMPLETE] * 12 + [TrialState.FAIL, TrialState.WAITING, TrialState.RUNNING]
    for ours, theirs in zip(trials, study.trials, strict=True):
        assert theirs.params == ours.params
        if ours.state == State.COMPLETE:
            assert theirs.values == [ours.values[name] for name in ("bits_per_byte", "flops_per_token")]
    assert {tuple(trial.values) for trial in study.best_trials} == front
    constrained = study.trials[12]
    assert constrained.constraints["memory"] == 1.5  # Optuna 5 reads the keys
    assert constrained.constraints["latency_ms"] == 0.5
    assert constrained.system_attrs["constraints"] == [1.5, 0.5]  # optuna-dashboard reads the list
    assert all(trial.constraints["latency_ms"] == 0 for trial in study.trials[:12])  # these were not measured
    assert study.trials[12].intermediate_values == {0: 2.5}


def test_a_study_of_optunas_own_can_be_looked_at_and_maximised_values_keep_their_order(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'optuna.db'}"
    study = optuna.create_study(study_name="theirs", storage=url, directions=["maximize", "minimize"])
    study.set_metric_names(["reward", "cost"])
    for x in (0.0, 0.5, 1.0):
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        study.tell(trial, [x, 1 - x] if x else [-1.0, 2.0])
    study.tell(study.ask(), state=TrialState.FAIL)
    with Store(str(tmp_path / "b.db"), create=True) as store:
        row, count = import_study(store, url, "theirs")
        assert (count, row.objectives) == (4, ("-reward", "cost"))
        trials = store.trials(row)
        assert [dict(trial.values) for trial in trials[:3]] == [
            {"-reward": 1.0, "cost": 2.0},
            {"-reward": -0.5, "cost": 0.5},
            {"-reward": -1.0, "cost": 0.0},
        ]
        assert [trial.params for trial in trials] == [trial.params for trial in study.trials]
        assert trials[3].state == State.FAILED
        assert [trial.number for trial in store.front(row)] == [2]
    assert main(["front", "--study", "theirs", "--store", str(tmp_path / "b.db")]) == 0
    assert main(["status", "--study", "theirs", "--store", str(tmp_path / "b.db")]) == 0


def test_bad_databases_and_names_are_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Store(str(tmp_path / "b.db"), create=True) as store:
        with pytest.raises(StoreError, match="no such file"):
            import_study(store, str(tmp_path / "none.db"), None)
        with pytest.raises(StoreError, match="Optuna cannot open") as error:
            import_study(store, "postgresql://user:secret@127.0.0.1:1/none", None)
        assert "secret" not in str(error.value)
        optuna.create_study(study_name="a", storage=f"sqlite:///{tmp_path / 'o.db'}")
        with pytest.raises(StudyError, match="it has: a"):
            import_study(store, str(tmp_path / "o.db"), "b")
        before = inspect(create_engine(f"sqlite:///{tmp_path / 'b.db'}")).get_table_names()
        with pytest.raises(StoreError, match="Optuna cannot open"):
            best_params(str(tmp_path / "b.db"), "s")  # our own store is not Optuna's, and does not become it
        assert inspect(create_engine(f"sqlite:///{tmp_path / 'b.db'}")).get_table_names() == before
    assert main(["study", "import", "--store", str(tmp_path / "b.db"), "--from", str(tmp_path / "none.db")]) == 2
    assert "no such file" in capsys.readouterr().err
