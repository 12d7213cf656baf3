"""A search whose trials fail in every way there is."""

from pathlib import Path

import pytest

from hypernas import pareto
from hypernas.config.study_config import StudyConfig
from hypernas.engines.ray_pool import RayPool
from hypernas.records import FailureKind, State
from hypernas.show.status import status_of
from hypernas.show.views import Silent
from hypernas.store import Store
from hypernas.store import store as writing
from hypernas.study.driver import run
from hypernas.study.search import open_search, prepare

FAULTY = f"{Path(__file__).parents[1] / 'faulty_space.py'}:Space"
WANTED = {
    2: FailureKind.ERROR,
    3: FailureKind.OUT_OF_MEMORY,
    4: FailureKind.DIVERGED,
    5: FailureKind.WORKER_LOST,
    6: FailureKind.TIMEOUT,
}
SETTINGS = {
    "depth": "1..6",
    "d_model": "16",
    "head_dim": "8",
    "context": "32",
    "attention.ratio": "1",
    "ffn.shape": "conventional",
    "gates.placement": "none",
    "train.tokens": "512",
    "train.batch_tokens": "256",
}


def test_every_way_to_fail_is_told_apart_and_the_search_goes_on(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "MAX_LOST", 1)  # each worker takes seconds to be replaced
    config = StudyConfig(
        study="s",
        space=FAULTY,
        preset="quick",
        trials=10,
        sampler="random",
        seed=5,  # of each depth one at least, and of the two that cost a worker one each
        halving=False,
        settings=SETTINGS | {"data.path": text},
    )
    pool = RayPool(2, timeout=10)
    try:
        with Store(str(tmp_path / "nas.db"), create=True) as store:
            search = open_search(store, prepare(config))
            outcome = run(search, pool, Silent())
            row, trials = search.row, store.trials(search.row)
            status, front = status_of(store, row), store.front(row)
    finally:
        pool.close()
    assert outcome.finished == 10
    for trial in trials:
        depth = trial.arch["depth"]
        if depth == 1:
            assert trial.state == State.COMPLETE
            continue
        assert trial.state == State.FAILED and trial.failure
        assert trial.failure.kind == WANTED[depth], trial.failure
        assert trial.failure.message
        in_python = trial.failure.kind not in (FailureKind.WORKER_LOST, FailureKind.TIMEOUT)
        assert ("Traceback" in trial.failure.traceback) == in_python
    assert {trial.arch["depth"] for trial in trials} == set(range(1, 7))
    assert sum(status["failures"].values()) == sum(trial.state == State.FAILED for trial in trials)
    complete = [pareto.costs(row.objectives, t.values) for t in trials if t.state == State.COMPLETE]
    assert [pareto.costs(row.objectives, t.values) for t in front] == [complete[i] for i in pareto.front(complete)]
