"""Searches whose workers, drivers, Ray servers, databases and disks fail at random moments, again and again."""

import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from hypernas import pareto
from hypernas.bench.postgres import Postgres
from hypernas.records import State
from hypernas.show.views import Silent
from hypernas.store import Store
from hypernas.study.driver import retrain
from hypernas.study.search import make_job
from tests.faults.searches import (
    Search,
    Values,
    fill_disk,
    kill_driver,
    kill_gcs,
    kill_raylet,
    kill_worker,
    measured,
    rounds,
)

# After a driver or its node, ten seconds go by until there is a search again to hit.
HITS = (*[kill_worker] * 4, *[fill_disk] * 4, kill_driver, kill_raylet, kill_gcs)


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("number", rounds(5))
@pytest.mark.parametrize("engine", ["ray", "tune"])
def test_whatever_dies_at_whatever_moment_the_numbers_are_the_undisturbed_ones(
    engine: str,
    number: int,
    text: str,
    tmp_path: Path,
    undisturbed: Values,
    faults: Counter[str],
) -> None:
    url = str(tmp_path / "nas.db")
    with Search(url, text, tmp_path / "files", number, "--engine", engine) as search:
        search.run(lambda s: s.rng.choice(HITS)(s))
    faults.update(search.faults)
    assert measured(url) == undisturbed
    assert faults.total() >= 5


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", rounds(3))
def test_with_a_sampler_and_halving_on_the_number_is_exact_and_every_row_trains_again(
    number: int, text: str, tmp_path: Path, faults: Counter[str]
) -> None:
    """What is proposed follows from what ended when: no two such searches are alike, and each is sound in itself."""
    url, asked = str(tmp_path / "nas.db"), 20  # of 24 that there are
    free = ("--sampler", "evolution", "--halving", "on", "--trials", str(asked), "--set", "optim.lr=0.001..0.01")
    with Search(url, text, tmp_path / "files", number, *free) as search:
        search.run(lambda s: s.rng.choice(HITS)(s))
    faults.update(search.faults)
    with Store(url) as store:
        row = store.study("s")
        trials = store.trials(row)
        assert [trial.number for trial in trials] == list(range(asked))
        assert {trial.state for trial in trials} <= {State.COMPLETE, State.STOPPED}
        complete = [trial for trial in trials if trial.state == State.COMPLETE]
        points = [pareto.costs(row.objectives, trial.values) for trial in complete]
        found = [pareto.costs(row.objectives, trial.values) for trial in store.front(row)]
        assert found == [points[i] for i in pareto.front(points)]
        for trial in complete:
            assert dict(retrain(make_job(store, row, trial), Silent()).values) == dict(trial.values)
    assert faults.total() >= 5


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("number", rounds(5))
def test_a_database_that_crashes_or_cuts_its_connections_costs_nothing(
    number: int,
    text: str,
    tmp_path: Path,
    server: Postgres,
    served: str,
    undisturbed: Values,
    faults: Counter[str],
) -> None:
    import psycopg

    def cut(search: Search) -> str | None:
        with suppress(psycopg.Error), psycopg.connect(server.url, autocommit=True) as connection:
            query = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
            connection.execute(f"{query} AND backend_type = 'client backend'")
            return "connections cut"
        return None

    def crash(search: Search) -> str:
        server.kill()
        restart = threading.Timer(10.0, server.start)
        restart.start()
        restart.join()
        return "database server killed"

    with Search(served, text, tmp_path, number) as search:
        search.run(lambda s: (crash if s.rng.random() < 0.06 else cut)(s))
    faults.update(search.faults)
    assert measured(served) == undisturbed
    assert faults.total() >= 5
