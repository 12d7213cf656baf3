"""What the engine `tune` tells Ray Tune; that it runs jobs as the others do is in test_contract.py."""

import threading

import pytest
from ray.tune.search import Searcher

from hypernas.engines import tune_pool
from hypernas.records import Job, Recipe, SpaceSpec


@pytest.fixture
def job() -> Job:
    return Job("study", 0, 1, SpaceSpec("lm", {}), {}, Recipe(learning_rate=1e-3), None, "hash", 0)


def test_with_nothing_running_a_job_is_waited_for_however_long(job: Job) -> None:
    offers = tune_pool._Offers(2)
    threading.Timer(3 * tune_pool.PATIENCE_SECONDS, offers.append, [job]).start()
    assert offers.suggest("one") == {"job": job}


def test_a_free_worker_waits_for_its_next_job_and_busy_ones_do_not(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_pool, "PATIENCE_SECONDS", 60.0)
    offers = tune_pool._Offers(2)
    offers.append(job)
    assert offers.suggest("one") == {"job": job}
    threading.Timer(0.1, offers.append, [job]).start()
    assert offers.suggest("two") == {"job": job}
    later = threading.Timer(2.0, offers.append, [job])
    later.start()
    assert offers.suggest("three") is None  # both are busy
    later.join()
    offers.on_trial_complete("one")
    assert offers.suggest("three") == {"job": job}


def test_a_job_taken_back_is_not_handed_out_and_a_closed_pool_ends_the_wait(job: Job) -> None:
    offers = tune_pool._Offers(2)
    offers.append(job)
    assert offers.remove(job) and not offers.remove(job)
    threading.Timer(0.1, offers.close).start()
    assert offers.suggest("one") == Searcher.FINISHED
