"""One contract, on every engine."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from hypernas.engines.inline import Inline
from hypernas.engines.make import make_executor
from hypernas.engines.protocol import Event, Executor, Lost
from hypernas.errors import UserError
from hypernas.kernels.processor import cpu_flags
from hypernas.records import FailureKind, Job, Progress, Recipe, Report, Result, SpaceSpec, State
from hypernas.store import Store


@pytest.fixture(scope="module", params=["inline", "ray", "tune"])
def opened(request: pytest.FixtureRequest) -> Iterator[Executor]:
    executor = make_executor(
        request.param, 2, address=None, gpus_per_trial=0.0, timeout=None, evaluate="tests.nas.evaluations:finishes"
    )
    yield executor
    executor.close()


@pytest.fixture
def engine(opened: Executor) -> Iterator[Executor]:
    yield opened
    opened.abandon()


@pytest.fixture
def pool(engine: Executor) -> Executor:
    """An engine with processes of its own, two workers."""
    if isinstance(engine, Inline):
        pytest.skip("inline has no process to kill")
    return engine


def job(trial: int, what: str = "finishes", token: int = 1) -> Job:
    evaluate = f"tests.nas.evaluations:{what}"
    return Job("s", trial, token, SpaceSpec("lm"), {}, Recipe(1.0), None, "", 0, evaluate=evaluate)


def until(engine: Executor, wanted: type | tuple[type, ...], trial: int, seconds: float = 180.0) -> list[Event]:
    """Events up to the first of the wanted kind of the trial, it included."""
    seen: list[Event] = []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        seen += engine.wait(0.5)
        if any(isinstance(event, wanted) and event.trial == trial for event in seen):
            return seen
    raise AssertionError(f"no {wanted} of trial {trial} within {seconds} s, but {seen[:3]} ... {seen[-3:]}")


def test_a_job_of_three_seeds_has_one_curve_and_the_means_of_its_results(engine: Executor) -> None:
    engine.submit(replace(job(8, "scores_its_seed"), repeats=3))
    events = until(engine, Result, 8)
    result = events[-1]
    assert isinstance(result, Result)
    assert [type(event) for event in events if not isinstance(event, Progress)] == [Report, Result]
    assert result.values == {"bits_per_byte": 3.0, "flops_per_token": 100.0, "training_flops": 21.0}
    assert result.diagnostics["by_seed"]["seed"] == [0, 1, 2]
    assert result.weights == b"of seed 0"


def test_a_job_reports_and_then_ends_with_its_result(engine: Executor) -> None:
    engine.submit(job(7, token=3))
    assert engine.running == 1
    report, result = until(engine, Result, 7)
    assert isinstance(report, Report) and isinstance(result, Result)
    assert (result.trial, result.token, result.failure) == (7, 3, None)
    assert result.provenance == {"trial": 7}
    assert engine.running == 0
    assert engine.wait(0.0) == []


def test_every_engine_knows_how_much_memory_a_trial_has(engine: Executor) -> None:
    assert engine.memory and 1e7 < engine.memory < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.skipif("amx_bf16" in cpu_flags().split(), reason="only torch knows whether matrix units may be used")
def test_a_worker_whose_evaluation_needs_no_torch_does_without(pool: Executor) -> None:
    pool.submit(job(1, "names_its_imports"))
    result = until(pool, Result, 1)[-1]
    assert isinstance(result, Result) and result.failure is None
    assert "tests.nas.evaluations" in result.provenance["modules"] and "torch" not in result.provenance["modules"]


def test_a_job_that_raises_ends_with_a_typed_failure(engine: Executor) -> None:
    engine.submit(job(1, "raises"))
    result = until(engine, Result, 1)[-1]
    assert isinstance(result, Result) and result.failure
    assert result.failure.kind == FailureKind.OUT_OF_MEMORY
    assert engine.running == 0


def test_a_stopped_job_sends_nothing_more_and_its_worker_takes_the_next_at_once(engine: Executor) -> None:
    for trial in range(engine.workers):
        engine.submit(job(trial, "goes_on"))
    for trial in range(engine.workers):
        until(engine, Progress, trial)
    engine.stop(0)
    assert engine.running == engine.workers - 1
    engine.submit(job(10))
    start = time.monotonic()
    seen = until(engine, Result, 10)
    assert time.monotonic() - start < 8
    assert all(event.trial != 0 for event in seen)
    for trial in range(engine.workers):  # the first has ended: nothing to do
        engine.stop(trial)


def test_stopping_a_trial_again_taken_up_stops_its_new_lease_alone(engine: Executor) -> None:
    engine.submit(job(3, "goes_on", token=1))
    until(engine, Progress, 3)
    engine.stop(3)
    engine.submit(job(3, token=2))
    result = until(engine, Result, 3)[-1]
    assert isinstance(result, Result) and result.token == 2


@pytest.mark.parametrize("end", [True, False], ids=["ended", "stopped"])
def test_what_a_job_holds_is_given_back_before_there_is_a_next(engine: Executor, end: bool, tmp_path: Path) -> None:
    held = tmp_path / "held"
    engine.submit(replace(job(6, "marks_what_it_holds"), data_path=str(held), recipe=Recipe(1.0, seed=int(end))))
    until(engine, Result if end else Progress, 6)
    engine.stop(6)
    deadline = time.monotonic() + 30
    while held.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not held.exists()
    engine.submit(job(7))
    until(engine, Result, 7)


def test_abandoned_jobs_send_nothing(engine: Executor) -> None:
    engine.submit(job(4, "goes_on"))
    until(engine, Progress, 4)
    engine.abandon()
    assert engine.running == 0
    engine.submit(job(5))
    assert {event.trial for event in until(engine, Result, 5)} == {5}


def test_a_stopped_job_that_hangs_is_killed_and_makes_room(pool: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[type(pool).__module__], "STOP_SECONDS", 1.0)
    for trial, what in ((0, "goes_on"), (1, "hangs_after_a_report")):
        pool.submit(job(trial, what))
    reported = 0
    while reported < 2:
        reported += sum(isinstance(event, Report) for event in pool.wait(60.0))
    pool.stop(1)
    pool.submit(job(2))
    seen = until(pool, Result, 2)
    assert {event.trial for event in seen} <= {0, 2}
    pool.stop(0)


def test_a_worker_that_dies_is_lost_and_replaced(pool: Executor) -> None:
    pool.submit(job(0, "kills_its_process", token=5))
    lost = until(pool, Lost, 0)[-1]
    assert isinstance(lost, Lost) and lost.token == 5
    for trial in (1, 2):
        pool.submit(job(trial))
    ended = 0
    while ended < 2:
        ended += sum(isinstance(event, Result) for event in pool.wait(60.0))


@pytest.mark.slow
@pytest.mark.parametrize("opened", ["tune"], indirect=True)
def test_tunes_workers_that_die_while_they_are_free_cost_the_next_jobs_nothing(pool: Executor) -> None:
    for trial in (12, 13):
        pool.submit(job(trial))
        result = until(pool, Result, trial)[-1]
        assert isinstance(result, Result)
        os.kill(int(result.values["pid"]), signal.SIGKILL)
    for trial in (14, 15):
        pool.submit(job(trial))
        assert isinstance(until(pool, (Result, Lost), trial)[-1], Result)


def test_a_worker_with_other_code_than_the_search_ends_it(pool: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.submit(job(0, "kills_its_process"))
    until(pool, Lost, 0)
    monkeypatch.setattr(pool, "_code", "other")
    pool.submit(job(1, "goes_on"))
    pool.submit(job(2, "goes_on"))  # one of them in the new process
    with pytest.raises(UserError, match="run other code of hypernas"):
        until(pool, Result, 1)
    for trial in (1, 2):
        pool.stop(trial)


def test_a_job_over_its_time_is_killed(pool: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_timeout", 1.0)
    pool.submit(job(0, "hangs_after_a_report"))
    result = until(pool, Result, 0)[-1]
    assert isinstance(result, Result) and result.failure and result.failure.kind == FailureKind.TIMEOUT


@pytest.mark.slow
@pytest.mark.parametrize("server", ["raylet", "gcs_server"])
@pytest.mark.parametrize("engine", ["ray", "tune"])
def test_a_search_whose_own_ray_node_dies_ends_says_how_to_go_on_and_leaves_no_process(
    engine: str, server: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "hypernas", "search", "--store", str(tmp_path / "nas.db"), "--engine", engine]
    command += ["--preset", "quick", "--workers", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as search:
        assert search.stderr is not None
        for line in search.stderr:
            if "starts" in line:
                break
        children = psutil.Process(search.pid).children(recursive=True)
        next(child for child in children if child.name() == server).kill()
        said = search.stderr.read()
        assert search.wait(60) == 2 and "nothing is lost. Continue with: nas search" in said, said
        assert "Traceback" not in said
    assert psutil.wait_procs(children, timeout=20)[1] == []
    with Store(str(tmp_path / "nas.db")) as store:
        assert {trial.state for trial in store.trials(store.study("default"))} == {State.WAITING}
