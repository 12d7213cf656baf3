"""A Ray cluster of several nodes on this machine: nodes that die, GPUs that are shared, workers yet to come."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hypernas.cli.main import main
from hypernas.config.study_config import StudyConfig
from hypernas.engines.cluster import set_environment
from hypernas.engines.make import make_executor
from hypernas.engines.protocol import Executor
from hypernas.errors import UserError
from hypernas.records import Job, Recipe, Report, Result, Seen, SpaceSpec, State, StudyRow, Trial
from hypernas.show.views import Silent
from hypernas.store import Store
from hypernas.study.driver import retrain, run
from hypernas.study.search import make_job, open_search, prepare

MEMORY = 80 << 20  # of a node's object store
TINY = {"depth": "1..2", "d_model": "16,32", "head_dim": "8", "context": "32", "train.batch_tokens": "256"}


@pytest.fixture(scope="module")
def head() -> Iterator[Any]:
    """A node without CPUs, which tests add theirs to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_health_check_period_ms", "500")
        patch.setenv("RAY_health_check_timeout_ms", "500")
        patch.setenv("RAY_health_check_failure_threshold", "4")
        set_environment(own_cluster=True)
        from ray.cluster_utils import Cluster

        made = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "object_store_memory": MEMORY, "include_dashboard": False},
        )
        yield made
        made.shutdown()


@pytest.fixture
def cluster(head: Any) -> Iterator[Any]:
    """A head without CPUs, and nodes to be added, which go with the test."""
    yield head
    for node in tuple(head.worker_nodes):
        head.remove_node(node)


MEETS = "tests.nas.evaluations:meets_others"


def pooled(
    cluster: Any, workers: int, engine: str = "ray", gpus: float | None = 0.0, evaluate: str = MEETS
) -> Executor:
    return make_executor(engine, workers, address=cluster.address, gpus_per_trial=gpus, timeout=None, evaluate=evaluate)


def job(trial: int, begun: Path, until: int) -> Job:
    """A job that ends once `until` jobs have begun, which leave a mark in the folder `begun`."""
    return Job("s", trial, 1, SpaceSpec("lm"), {}, Recipe(1.0, seed=until), str(begun), "", 0, evaluate=MEETS)


def ended(pool: Executor, count: int, seconds: float = 60.0) -> list[Result]:
    results: list[Result] = []
    deadline = time.monotonic() + seconds
    while len(results) < count and time.monotonic() < deadline:
        results += [event for event in pool.wait(0.5) if isinstance(event, Result)]
    assert len(results) == count and not any(result.failure for result in results), results
    return results


def free_within(pool: Executor, wanted: int, seconds: float = 60.0) -> int:
    """The free workers once there are as many as wanted, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while pool.free < wanted and time.monotonic() < deadline:
        pool.wait(0.5)
    return pool.free


class Killer(Silent):
    """Kills a node once two trials report, one on each node, and adds another when it is missed."""

    def __init__(self, cluster: Any, doomed: Any) -> None:
        self.cluster, self.doomed, self.replaced = cluster, doomed, False
        self.training: set[int] = set()
        self.said: list[str] = []

    def on_end(self, trial: int, result: Result | None) -> None:
        self.training.discard(trial)

    def on_report(self, event: Report) -> None:
        self.training.add(event.trial)
        if self.doomed is not None and len(self.training) == 2:
            self.cluster.remove_node(self.doomed, allow_graceful=False)
            self.doomed = None

    def message(self, text: str) -> None:
        self.said.append(text)
        if "machine is gone" in text and not self.replaced:
            self.replaced = True
            self.cluster.add_node(num_cpus=1, object_store_memory=MEMORY)


def test_a_node_that_dies_while_training_costs_a_rung_and_no_trial(cluster: Any, tmp_path: Path, text: str) -> None:
    cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
    doomed = cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
    settings = TINY | {"data.path": text, "train.tokens": "20000"}
    pool = pooled(cluster, 2, evaluate="training")
    view = Killer(cluster, doomed)
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        config = StudyConfig(study="s", trials=4, preset="quick", halving=False, settings=settings)
        search = open_search(store, prepare(config))
        try:
            outcome = run(search, pool, view)
        finally:
            pool.close()
        trials = store.trials(search.row)
        assert outcome.finished == 4
        assert {trial.state for trial in trials} == {State.COMPLETE}
        assert view.replaced, view.said
        moved = next(trial for trial in trials if trial.token > 1)
        assert moved.attempts == 1  # never counted against it
        assert_undisturbed(store, search.row, moved)


def assert_undisturbed(store: Store, row: StudyRow, trial: Trial) -> None:
    result = retrain(make_job(store, row, trial), Silent())
    assert dict(result.values) == dict(trial.values)


def test_a_gpu_is_shared_by_as_many_trials_as_fit(cluster: Any, tmp_path: Path) -> None:
    cluster.add_node(num_cpus=4, num_gpus=1, object_store_memory=MEMORY)
    pool = pooled(cluster, 2, gpus=0.5)
    try:
        for trial in (0, 1):
            pool.submit(job(trial, tmp_path, 2))
        results = ended(pool, 2, 90.0)
        assert [result.values["together"] for result in results] == [2, 2]
        assert {result.provenance["gpus"] for result in results} == {"0"}
    finally:
        pool.close()


def test_tune_knows_the_memory_of_a_share_of_a_gpu(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=MEMORY)
    monkeypatch.setattr("hypernas.engines.tune_pool._ready", lambda gpu: ("here", Seen("declared", "", 8e9)))
    pool = pooled(cluster, 2, engine="tune", gpus=0.25)
    try:
        assert pool.memory == 2e9
    finally:
        pool.close()


def test_more_gpus_than_any_node_has_is_one_message(cluster: Any) -> None:
    cluster.add_node(num_cpus=1, num_gpus=2, object_store_memory=MEMORY)
    cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=MEMORY)
    with pytest.raises(UserError, match="--gpus-per-trial 3: the largest node has 2 GPUs"):
        pooled(cluster, 1, gpus=3)


@pytest.mark.parametrize("engine", ["ray", pytest.param("tune", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("asked", "gpus", "workers", "visible"),
    [(None, 1, 2, {"0", "1"}), pytest.param(0, 0, 3, {""}, marks=pytest.mark.slow)],
)
def test_trials_take_the_gpus_of_a_cluster_unless_cpus_are_asked_for(
    engine: str, asked: float | None, gpus: float, workers: int, visible: set[str], cluster: Any, tmp_path: Path
) -> None:
    cluster.add_node(num_cpus=3, num_gpus=2, object_store_memory=MEMORY)
    pool = pooled(cluster, 0, engine, asked)
    try:
        assert (pool.gpus, pool.workers) == (gpus, workers)
        for trial in range(workers):
            pool.submit(job(trial, tmp_path, workers))
        assert {result.provenance["gpus"] for result in ended(pool, workers, 120.0)} == visible
    finally:
        pool.close()


TOLD = "1 worker with one GPU that torch does not see, so on CPU cores"
CPUS = "2 workers on CPU cores"


@pytest.fixture
def declared(cluster: Any, tmp_path: Path, text: str) -> tuple[list[str], list[str]]:
    """Flags of a store and of a cluster, of two CPUs and a GPU that is only declared; and those of a study."""
    cluster.add_node(num_cpus=2, num_gpus=1, object_store_memory=MEMORY)
    settings = TINY | {"data.path": text, "train.tokens": "1024"}
    keys = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    return ["--store", str(tmp_path / "nas.db"), "--address", cluster.address], ["--halving", "off", *keys]


def kept(store: str, study: str) -> tuple[float | None, str | None]:
    with Store(store) as opened:
        settings = opened.study(study).settings
    return settings.gpus_per_trial, settings.engine


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ray", "tune"])
def test_a_search_on_declared_gpus_says_so_and_is_resumed_on_what_it_ran_on(
    engine: str, declared: tuple[list[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    where, study = declared
    search = ["search", "--study", "s", *where, "--resume"]
    first, cpus = [*study, "--engine", engine], ["--gpus-per-trial", "0"]
    steps = [(first, TOLD, 1), ([], TOLD, 1), (cpus, CPUS, 0), ([], CPUS, 0)]
    for trials, (flags, said, gpus) in enumerate(steps if engine == "ray" else steps[:2], start=3):
        capsys.readouterr()
        assert main([*search, "--trials", str(trials), *flags]) == 0
        assert capsys.readouterr().err.startswith(said) and kept(where[1], "s") == (gpus, engine)


@pytest.mark.slow
def test_ladders_take_gpus_as_searches_do_and_go_on_on_what_they_ran_on(
    declared: tuple[list[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    where, study = declared
    assert main(["search", "--study", "s", *where[:2], *study, "--trials", "4", "--engine", "inline"]) == 0
    ladder = ["--trials", "3", "--ladder", "10k,16k,25k,40k", "--tokens-per-parameter", "0.1", "--seeds", "1"]
    scale = ["scale", "--study", "s", *where, *ladder]
    for flags, said, gpus in (([], TOLD, 1), (["--gpus-per-trial", "0"], CPUS, 0), ([], CPUS, 0)):
        capsys.readouterr()
        assert main([*scale, *flags]) == 0
        err = capsys.readouterr().err
        assert err.startswith(said) and f"trials are finished, {said}" in err  # the ladder's sweeps say it too
        assert kept(where[1], "s-scale") == (gpus, "ray")


@pytest.mark.slow
def test_a_table_is_recorded_on_gpus_too(
    declared: tuple[list[str], list[str]],
    tmp_path: Path,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = {"depth": "1", "d_model": "16", "streams.n": "1", "gates.placement": "none", "attention.ratio": "1"}
    few |= {"ffn.ratio": "2.0", "optim.lr": "0.001,0.003,0.009", "context": "32", "data.path": text, "head_dim": "8"}
    monkeypatch.setattr("hypernas.bench.table.GRID", few | {"train.tokens": "1024", "train.batch_tokens": "256"})
    where, _ = declared
    record = ["bench", "search", "--record", "--out", str(tmp_path / "table.json"), *where]
    for flags, said in (([], TOLD), (["--gpus-per-trial", "0"], CPUS)):
        capsys.readouterr()
        assert main([*record, *flags]) == 0
        assert said in capsys.readouterr().err
    assert (tmp_path / "table.json").exists()


def test_a_search_begins_on_the_workers_there_are_and_takes_up_those_that_come(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hypernas.engines.ray_pool.WARM_UP_SECONDS", 1.0)
    cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
    pool = pooled(cluster, 2)
    try:
        assert free_within(pool, 1) == 1  # the other asks the cluster for a CPU: an autoscaler sees it
        pool.submit(job(0, tmp_path, 1))
        first = ended(pool, 1)[0].provenance["node"]
        cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
        assert free_within(pool, 2) == 2
        for trial in (1, 2):
            pool.submit(job(trial, tmp_path, 3))
        nodes = {result.provenance["node"] for result in ended(pool, 2)}
        assert len(nodes) == 2 and first in nodes
    finally:
        pool.close()
