"""One contract, on SQLite and on PostgreSQL."""

import random
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text as sql
from sqlalchemy.exc import OperationalError, ProgrammingError

from hypernas import pareto
from hypernas.errors import StoreError, StudyError, UserError
from hypernas.integrations.optuna_db import best_params, import_study
from hypernas.records import (
    Failure,
    FailureKind,
    Proposal,
    Recipe,
    Report,
    Result,
    SpaceSpec,
    State,
    StudyRow,
    StudySettings,
)
from hypernas.show.status import status_of
from hypernas.store import Reader, Store
from hypernas.store.models import SCHEMA
from tests.nas.studies import new_study as empty_study

OBJECTIVES = ("bits_per_byte", "flops_per_token")


def new_study(store: Store, name: str = "s") -> StudyRow:
    return empty_study(store, name, space=SpaceSpec("lm", {"depth": "2"}))


def proposal(i: int) -> Proposal:
    return Proposal({"depth": i}, {"depth": i}, f"arch{i}", f"config{i}", Recipe(1e-3), "sampler", {"generation": i})


def result(number: int, loss: float = 1.0, flops: float = 1e6, token: int = 1) -> Result:
    return Result(number, token, {"bits_per_byte": loss, "flops_per_token": flops}, parameters=5, train_seconds=1.0)


def test_a_trial_comes_back_as_it_was_written(store: Store) -> None:
    study = new_study(store)
    driver = store.start_driver(study, 2)
    leased = store.lease_new(study, driver, proposal(3), 10)
    assert leased is not None
    assert store.trial(study, 0) == leased
    store.report(study, Report(0, 0, 5, 640, 1e9, 2.5, 0.1), leased.token)
    assert store.finish(study, result(0, 2.0, 3e6))
    trial = store.trial(study, 0)
    assert (trial.state, trial.values, trial.parameters) == (
        State.COMPLETE,
        {"bits_per_byte": 2.0, "flops_per_token": 3e6},
        5,
    )
    assert trial.sampler_attrs == {"generation": 3}
    assert store.reports(study) == [Report(0, 0, 5, 640, 1e9, 2.5, 0.1)]


def test_numbers_are_consecutive_and_stop_at_the_limit(store: Store) -> None:
    study = new_study(store)
    driver = store.start_driver(study, 1)
    leased = [store.lease_new(study, driver, proposal(i), 3) for i in range(5)]
    assert [trial.number for trial in leased if trial] == [0, 1, 2]
    assert leased[3:] == [None, None]


def test_the_same_configuration_is_leased_once(store: Store) -> None:
    study = new_study(store)
    driver = store.start_driver(study, 1)
    assert store.lease_new(study, driver, proposal(1), 10)
    assert store.lease_new(study, driver, proposal(1), 10) is None
    again = store.lease_new(study, driver, proposal(2), 10)
    assert again and again.number == 1  # the refused lease took no number


def test_a_result_under_an_old_token_changes_nothing(store: Store) -> None:
    study = new_study(store)
    driver = store.start_driver(study, 1)
    first = store.lease_new(study, driver, proposal(1), 10)
    assert first and store.release(study, 0, first.token)
    second = store.lease_waiting(study, driver)
    assert second and second.token == first.token + 1
    assert not store.finish(study, result(0, 0.1, token=first.token))
    assert not store.report(study, Report(0, 0, 1, 1, 1.0, 0.1, 1.0), first.token)
    assert store.trial(study, 0).state == State.RUNNING
    assert store.finish(study, result(0, 2.0, token=second.token))
    assert not store.finish(study, result(0, 0.1, token=second.token))  # finished rows never change
    assert store.trial(study, 0).values["bits_per_byte"] == 2.0


def test_a_trial_that_keeps_losing_its_worker_is_set_aside(store: Store) -> None:
    study = new_study(store)
    driver = store.start_driver(study, 1)
    trial = store.lease_new(study, driver, proposal(1), 10)
    while trial is not None:
        store.release(study, 0, trial.token)
        trial = store.lease_waiting(study, driver)
    failed = store.trial(study, 0)
    assert failed.state == State.FAILED
    assert failed.failure and failed.failure.kind == FailureKind.WORKER_LOST


def test_a_driver_that_dies_again_and_again_costs_its_trial_nothing(store: Store) -> None:
    study = new_study(store)
    gone = store.start_driver(study, 1)
    store.lease_new(study, gone, proposal(0), 10)
    for _ in range(5):
        store.stop_driver(gone)
        assert store.reclaim(study) == [0]
        gone = store.start_driver(study, 1)
        assert store.lease_waiting(study, gone)
    assert store.trial(study, 0).state == State.RUNNING


def test_a_study_being_searched_cannot_be_deleted(store: Store) -> None:
    study = new_study(store)
    driver = store.start_driver(study, 1)
    with pytest.raises(StudyError, match="right now"):
        store.delete_study("s")
    store.stop_driver(driver)
    store.delete_study("s")


def test_giving_a_trial_up_by_choice_never_counts_against_it(store: Store) -> None:
    study = new_study(store)
    driver = store.start_driver(study, 1)
    trial = store.lease_new(study, driver, proposal(1), 10)
    for _ in range(5):
        assert trial and store.release(study, 0, trial.token, fault=False)
        trial = store.lease_waiting(study, driver)
    assert trial and trial.attempts == 1


def test_trials_of_a_driver_that_died_wait_again_and_those_of_a_living_one_do_not(store: Store) -> None:
    study = new_study(store)
    mine = store.start_driver(study, 1)
    assert store.lease_new(study, mine, proposal(0), 10)
    script = (
        "import sys; from hypernas.store import Store; from hypernas.records import Proposal, Recipe\n"
        "store = Store(sys.argv[1]); study = store.study('s'); driver = store.start_driver(study, 1)\n"
        "store.lease_new(study, driver, Proposal({}, {}, 'a', 'b', Recipe(1.0), 'sampler', {}), 10)"
    )
    url = store.url.render_as_string(hide_password=False)
    subprocess.run([sys.executable, "-c", script, url], check=True)  # ends without stopping its driver
    assert store.reclaim(study) == [1]
    assert [trial.state for trial in store.trials(study)] == [State.RUNNING, State.WAITING]


@pytest.mark.parametrize("drivers", [1, 2])
def test_front_view_and_hypervolume_equal_those_computed_from_raw_rows(store: Store, drivers: int) -> None:
    study = new_study(store)
    driver = store.start_driver(study, 1)
    rng = random.Random(1)
    others = [Store(store.url.render_as_string(hide_password=False)) for _ in range(1, drivers)]
    measured: list[tuple[float, float]] = []
    for i in range(40):
        one = rng.choice([store, *others])
        leased = one.lease_new(study, driver, proposal(i), 100)
        assert leased
        loss, flops = rng.choice([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), 10.0 ** rng.choice([3, 4, 5, 6, 7, 8])
        if i % 7 == 3:
            one.finish(study, Result(i, 1, failure=Failure(FailureKind.ERROR, "no", "trace")))
            continue
        one.finish(study, result(i, loss, flops))
        measured.append(pareto.costs(OBJECTIVES, {"bits_per_byte": loss, "flops_per_token": flops}))  # type: ignore[arg-type]
        volume = store.hypervolumes(study)[-1][2]
        assert abs(volume - pareto.hypervolume(measured, (8.0, 9.0))) < 1e-9
    got = [pareto.costs(OBJECTIVES, trial.values) for trial in store.front(study)]
    assert got == [measured[i] for i in pareto.front(measured)]
    with store._engine.connect() as connection:
        rows = connection.execute(sql("SELECT DISTINCT trial FROM pareto_front WHERE study = 's'")).scalars()
        assert sorted(rows) == sorted(trial.number for trial in store.front(study))
    for other in others:
        other.close()


def test_values_put_right_later_are_those_the_front_goes_on_with(store: Store) -> None:
    study = new_study(store)
    driver = store.start_driver(study, 1)
    for i, loss in enumerate((2.0, 4.0, 6.0)):
        store.lease_new(study, driver, proposal(i), 10)
        store.finish(study, result(i, loss, 10.0 ** (6 - i)))
        store.add_values(study, i, {"bits_per_byte": loss + 1})
    reference = (8.0, 9.0)
    store.lease_new(study, driver, proposal(3), 10)
    store.finish(study, result(3, 0.5, 1e7))
    assert store.hypervolumes(study)[-1][2] == pytest.approx(
        pareto.hypervolume([(3.0, 6.0), (5.0, 5.0), (7.0, 4.0), (0.5, 7.0)], reference)
    )


def test_readers_are_told_only_what_changed(store: Store) -> None:
    study = new_study(store)
    driver = store.start_driver(study, 1)
    for i in range(3):
        store.lease_new(study, driver, proposal(i), 10)
    seen = max(trial.seq for trial in store.trials(study))
    assert store.trials(study, after=seen) == []
    store.finish(study, result(1))
    assert [trial.number for trial in store.trials(study, after=seen)] == [1]


def test_deleting_a_study_leaves_the_others(store: Store) -> None:
    for name in ("a", "b"):
        study = new_study(store, name)
        driver = store.start_driver(study, 1)
        store.lease_new(study, driver, proposal(0), 10)
        store.stop_driver(driver)
    store.delete_study("a")
    assert [row["name"] for row in store.studies()] == ["b"]
    assert len(store.trials(store.study("b"))) == 1


def test_an_unknown_study_names_those_there_are(store: Store) -> None:
    new_study(store, "cifar10")
    with pytest.raises(StudyError, match="it has: cifar10"):
        store.study("cifr10")
    with pytest.raises(StudyError, match="exists"):
        new_study(store, "cifar10")


def test_the_newest_migration_is_the_schema_in_code_and_gives_the_same_tables(store: Store) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    from hypernas import store as package
    from hypernas.store.models import Base

    scripts = ScriptDirectory(str(Path(package.__file__).parent / "migrations"))
    assert scripts.get_current_head() == SCHEMA
    with store._engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database" * 100)
    with pytest.raises(StoreError, match="cannot be opened"):
        Store(str(path))


def test_a_database_of_another_program_is_refused_and_untouched(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE notes (id INTEGER)")
    with pytest.raises(StoreError, match="another program"):
        Store(str(path), create=True)


@pytest.mark.parametrize("where", ["user:secret@127.0.0.1:1/none", "user@127.0.0.1:1/none?password=secret"])
def test_passwords_are_never_shown(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypernas.store.patience.RESTART_SECONDS", 0.0)
    url = f"postgresql://{where}"
    with pytest.raises(StoreError, match=r"127\.0\.0\.1") as opened:
        Store(url)
    with pytest.raises(UserError, match=r"127\.0\.0\.1") as started:
        best_params(url, "s")
    with pytest.raises(StoreError, match=r"127\.0\.0\.1") as imported:
        import_study(None, url, None)  # type: ignore[arg-type]
    assert "secret" not in f"{opened.value} {started.value} {imported.value}"


# ---- faults ----------------------------------------------------------------------------------------------------


class CutsAfterCommit:
    """Every second write is committed, and then looks to its writer as if the connection had broken."""

    def __init__(self, store: Store) -> None:
        self.patiently, self.store, self.count = store._patiently, store, 0

    def __call__(self, work: Any, *, writes: bool) -> Any:
        def cut(connection: Any) -> Any:
            got = work(connection)
            self.count += writes
            if writes and self.count % 2:
                connection.commit()
                raise OperationalError("", {}, Exception("database is locked"))  # passes, on both kinds
            return got

        return self.patiently(cut, writes=writes)


def test_what_was_committed_as_the_connection_broke_is_not_done_twice(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = new_study(store)
    driver = store.start_driver(study, 1)
    cut = CutsAfterCommit(store)
    monkeypatch.setattr(store, "_patiently", cut)
    for i in range(4):
        leased = store.lease_new(study, driver, proposal(i), 10)
        assert leased and leased.number == i
        assert store.report(study, Report(i, 0, 5, 640, 1e9, 2.5, 0.1), leased.token)
        cut.count = 0
        # Its first try did it: nothing is left to hand back.
        assert store.release(study, i, leased.token, fault=False) is False
        cut.count = 0
        again = store.lease_waiting(study, driver)
        assert again and (again.number, again.token) == (i, 2)
        cut.count = 0
        assert store.finish(study, result(i, 4.0 - i, 10.0 ** (i + 3), token=2))
    assert store.states(study)["COMPLETE"] == 4
    assert len(store.reports(study)) == 4
    assert [trial.number for trial in store.front(study)] == [3, 2, 1, 0]


def test_connections_cut_at_any_moment_lose_nothing(postgres: str) -> None:
    with Store(postgres, create=True) as store, Store(postgres) as other:
        study = new_study(store, "cut")
        driver = store.start_driver(study, 1)
        over = threading.Event()
        rng, cuts = random.Random(0), 0

        def cut() -> None:
            nonlocal cuts
            query = sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
            )
            while not over.wait(rng.uniform(0.05, 0.4)):
                with other._engine.begin() as connection:
                    cuts += len(connection.execute(query).all())

        thread = threading.Thread(target=cut)
        thread.start()
        try:
            i = 0
            while cuts < 5:
                leased = store.lease_new(study, driver, proposal(i), 10**6)
                assert leased and leased.number == i
                assert store.report(study, Report(i, 0, 5, 640, 1e9, 2.5, 0.1), leased.token)
                assert store.finish(study, result(i, 1.0 + 1.0 / (i + 1)))
                i += 1
        finally:
            over.set()
            thread.join()
        states = store.states(study)
        assert (states["COMPLETE"], states["RUNNING"]) == (i, 0)
        assert len(store.hypervolumes(study)) == len(store.reports(study)) == i
        store.stop_driver(driver)
        store.delete_study("cut")


def test_a_user_who_may_only_read_can_look_at_everything(postgres: str) -> None:
    with Store(postgres, create=True) as store:
        study = new_study(store, "look")
        driver = store.start_driver(study, 1)
        store.lease_new(study, driver, proposal(0), 10)
        store.finish(study, result(0))
        with store._engine.begin() as connection:
            connection.execute(sql("CREATE ROLE looker LOGIN"))
            connection.execute(sql("GRANT SELECT ON ALL TABLES IN SCHEMA public TO looker"))
        try:
            url = postgres.replace("postgres@", "looker@", 1)
            with Reader(url) as reader:
                row = reader.study("look")
                assert status_of(reader, row)["states"]["COMPLETE"] == 1
                assert reader.front(row) == store.front(study)
                assert reader.trials(row) and reader.hypervolumes(row) and reader.studies()
            with Store(url) as other, pytest.raises(ProgrammingError, match="permission denied"):
                other.heartbeat(driver)
        finally:
            with store._engine.begin() as connection:
                connection.execute(sql("REVOKE ALL ON ALL TABLES IN SCHEMA public FROM looker"))
                connection.execute(sql("DROP ROLE looker"))
            store.stop_driver(driver)
            store.delete_study("look")


def test_a_store_that_stays_away_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypernas.store.patience.LOCKED_SECONDS", 0.0)
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        new_study(store)
        with sqlite3.connect(tmp_path / "nas.db", isolation_level=None) as holder:
            holder.execute("BEGIN IMMEDIATE")
            with store._engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA busy_timeout = 1")
            with pytest.raises(StoreError, match=r"not reachable .*--resume"):
                store.update_settings(store.study("s"), StudySettings())
            holder.execute("ROLLBACK")
