"""Studies on their way to Optuna's database and back: what a kill leaves is said to be unfinished, or is not there."""

import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from hypernas.bench.store import fill_large
from hypernas.cli.main import main
from hypernas.errors import StudyError
from hypernas.integrations.optuna_db import OURS, UNFINISHED, export_study, import_study
from hypernas.store import Reader, Store
from hypernas.store import store as writing
from hypernas.store.liveness import this_process
from tests.nas.studies import new_study

TRIALS = 12
AT_TRIAL = 6


def killer(at: int = AT_TRIAL) -> Any:
    """Kills this process when it is called for the `at`-th trial."""
    called = iter(range(1, 1 + TRIALS))

    def kill() -> None:
        if next(called) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    return kill


def export(source: str, to: str, disturb: Any = lambda: None) -> int:
    def suggest(trial: Any) -> None:
        disturb()
        trial.suggest_int("depth", 1, 9)
        trial.suggest_int("width", 0, 9)

    with Reader(source) as store:
        return export_study(store, store.study("large"), to, suggest, lambda line: None)


def export_and_die(source: str, to: str) -> None:
    export(source, to, killer())


def import_and_die(source: str, to: str) -> None:
    report_row, kill = writing.report_row, killer()
    writing.report_row = lambda report, trial_id: (kill(), report_row(report, trial_id))[1]
    with Store(to, create=True) as store:
        import_study(store, source, None)


def killed(work: Callable[[str, str], None], source: str, to: str) -> None:
    """Has a process of its own do the work, which has to end by SIGKILL."""
    process = multiprocessing.get_context("fork").Process(target=work, args=(source, to))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def others_study(to: str) -> None:
    other = optuna.create_study(study_name="another", storage=f"sqlite:///{to}")
    other.add_trial(optuna.trial.create_trial(value=1.0))


def names_in(to: str) -> dict[str, int]:
    storage = f"sqlite:///{to}"
    return {
        name: len(optuna.load_study(study_name=name, storage=storage).trials)
        for name in optuna.get_all_study_names(storage)
    }


def imported(source: str, store: Path, *name: str) -> int:
    return main(["study", "import", *name, "--from", source, "--store", str(store)])


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = str(tmp_path / "nas.db")
    with Store(path, create=True) as store:
        fill_large(store, "large", TRIALS, 1)
    return path


def test_an_export_that_was_killed_says_so_and_its_second_run_writes_it_whole(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = str(tmp_path / "optuna.db")
    others_study(to)
    killed(export_and_die, source, to)
    assert names_in(to) == {"another": 1, "large": AT_TRIAL - 1}
    assert imported(to, tmp_path / "b.db", "large") == 2
    said = capsys.readouterr().err
    assert "'large'" in said and "is not whole" in said and said.count("\n") == 1
    assert export(source, to) == TRIALS
    assert names_in(to) == {"another": 1, "large": TRIALS}
    assert imported(to, tmp_path / "b.db", "large") == 0
    with Reader(source) as first, Reader(str(tmp_path / "b.db")) as second:
        assert first.hypervolumes(first.study("large")) == second.hypervolumes(second.study("large"))


def test_an_import_that_was_killed_left_nothing_and_its_second_run_succeeds(source: str, tmp_path: Path) -> None:
    to, store = str(tmp_path / "optuna.db"), tmp_path / "b.db"
    export(source, to)
    killed(import_and_die, to, str(store))
    with Store(str(store)) as opened:
        assert opened.studies() == []
    assert imported(to, store) == 0
    with Reader(str(store)) as opened:
        assert opened.finished(opened.study("large")) == TRIALS


def test_an_export_that_fails_leaves_nothing(source: str, tmp_path: Path) -> None:
    to = str(tmp_path / "optuna.db")
    others_study(to)
    calls = iter(range(AT_TRIAL))
    with pytest.raises(StopIteration):
        export(source, to, lambda: next(calls))
    assert names_in(to) == {"another": 1}


def test_an_export_killed_before_its_first_word_is_written_anew(source: str, tmp_path: Path) -> None:
    to = str(tmp_path / "optuna.db")
    optuna.create_study(study_name="large", storage=f"sqlite:///{to}")
    assert export(source, to) == TRIALS


@pytest.mark.parametrize("whose", ["a live process's", "Optuna's own", "a hostile one"])
def test_a_study_that_is_no_dead_exports_stays(whose: str, source: str, tmp_path: Path) -> None:
    to = str(tmp_path / "optuna.db")
    theirs = optuna.create_study(study_name="large", storage=f"sqlite:///{to}")
    if whose != "a live process's":
        theirs.add_trial(optuna.trial.create_trial(value=1.0))
        theirs.set_user_attr(OURS, {UNFINISHED: {"pid": "all"}} if whose == "a hostile one" else "not a mark")
    else:
        with subprocess.Popen(["sleep", "600"]) as other:
            ticks = float(Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[19])
            living = this_process() | {"pid": other.pid, "process_started": ticks}
            theirs.set_user_attr(OURS, {UNFINISHED: living | {"heartbeat": "2026-01-01T00:00:00+00:00"}})
            try:
                with pytest.raises(StudyError, match="right now"):
                    export(source, to)
            finally:
                other.kill()
        return
    with pytest.raises(StudyError, match="already"):
        export(source, to)
    assert names_in(to) == {"large": 1}


def test_trials_that_no_store_takes_leave_no_study(tmp_path: Path) -> None:
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        fill_large(store, "large", 2, 1)
        row = store.study("large")
        twice = [(trial, "same", ()) for trial in store.trials(row)]
        with pytest.raises(Exception, match="UNIQUE"):
            new_study(store, "other", trials=twice)
        assert [study["name"] for study in store.studies()] == ["large"]
