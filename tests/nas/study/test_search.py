"""Whole searches, small but real: real text, real training, a real Ray cluster, a real store."""

import ipaddress
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from hypernas import pareto
from hypernas.cli.main import main
from hypernas.config.study_config import StudyConfig
from hypernas.engines.inline import Inline
from hypernas.engines.protocol import Executor
from hypernas.engines.ray_pool import RayPool
from hypernas.errors import UserError
from hypernas.records import State, StudyRow, Trial
from hypernas.show.status import status_of
from hypernas.show.views import Silent
from hypernas.store import Store
from hypernas.study.driver import Outcome, retrain, run
from hypernas.study.replay import replay
from hypernas.study.search import make_job, open_search, prepare

# A search of seconds: one narrow layer or two, on a few thousand bytes.
TINY = {
    "depth": "1..2",
    "d_model": "16,32",
    "head_dim": "8",
    "context": "32",
    "train.tokens": "4096",
    "train.batch_tokens": "256",
}


def flags(text: str, **changed: str) -> list[str]:
    settings = TINY | {"data.path": text} | changed
    return ["--halving", "off", *(part for name, value in settings.items() for part in ("--set", f"{name}={value}"))]


def search(store: Path, text: str, *extra: str, **changed: str) -> int:
    return main(["search", "--study", "s", "--store", str(store), *flags(text, **changed), *extra])


def assert_sound(store: Path, asked: int, study: str = "s") -> list[Trial]:
    """The asked number of finished trials, numbered 0 to asked - 1, none running, the front as raw rows give it."""
    with Store(str(store)) as opened:
        row = opened.study(study)
        trials = opened.trials(row)
        assert [trial.number for trial in trials] == list(range(asked))
        assert {trial.state for trial in trials} <= {State.COMPLETE, State.STOPPED, State.FAILED}
        complete = [trial for trial in trials if trial.state == State.COMPLETE]
        points = [pareto.costs(row.objectives, trial.values) for trial in complete]
        front = [pareto.costs(row.objectives, trial.values) for trial in opened.front(row)]
        assert front == [points[i] for i in pareto.front(points)]
        assert len({trial.arch_hash + str(trial.recipe) for trial in trials}) == len(trials)
        return trials


def assert_retrains(store: Path, trial: Trial) -> None:
    """Training the row again, outside the study, gives its values bit for bit."""
    with Store(str(store)) as opened:
        result = retrain(make_job(opened, opened.study("s"), trial), Silent())
    assert result.failure is None
    assert dict(result.values) == dict(trial.values)


@pytest.fixture(scope="module")
def pool() -> Executor:
    executor = RayPool(2)
    yield executor
    executor.close()


def searched(store: Store, text: str, executor: Executor, **config: object) -> tuple[StudyRow, Outcome]:
    settings = TINY | {"data.path": text} | dict(config.pop("settings", {}))  # type: ignore[call-overload]
    config = {"halving": False, **config}
    prepared = prepare(StudyConfig(study="s", preset="quick", settings=settings, **config))  # type: ignore[arg-type]
    found = open_search(store, prepared)
    return found.row, run(found, executor, Silent())


@pytest.mark.parametrize("engine", ["inline", "ray"])
def test_a_search_fills_the_store_and_starts_with_the_baseline_at_three_rates(
    engine: str, tmp_path: Path, text: str, pool: Executor
) -> None:
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        _, outcome = searched(store, text, pool if engine == "ray" else Inline(), trials=8)
    assert (outcome.finished, outcome.interrupted) == (8, False)
    trials = assert_sound(tmp_path / "nas.db", 8)
    assert all(trial.state == State.COMPLETE for trial in trials)
    assert [trial.origin for trial in trials[:4]] == ["baseline"] * 3 + ["sampler"]
    first, second, third = (trial.recipe.learning_rate for trial in trials[:3])
    assert (second / first, first / third) == pytest.approx((3, 3))
    assert len({trial.arch_hash for trial in trials[:3]}) == 1
    with Store(str(tmp_path / "nas.db")) as store:
        reports = store.reports(store.study("s"), [0])
        assert [report.rung for report in reports] == [0, 1, 2, 3]
        assert reports[-1].loss == trials[0].values["bits_per_byte"]
        assert reports[-1].loss < reports[0].loss


def test_a_trial_trained_again_from_its_row_gives_the_same_numbers_bit_for_bit(
    tmp_path: Path, text: str, pool: Executor
) -> None:
    settings = {"gates.placement": "both", "streams.n": "4"}  # the two places with randomness or unusual algebra
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        row, _ = searched(store, text, pool, trials=4, settings=settings)
        trials = store.trials(row)
    for trial in trials:
        assert_retrains(tmp_path / "nas.db", trial)


def test_an_exhausted_space_ends_the_search(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    one = {"depth": "1", "d_model": "16", "attention.ratio": "1", "ffn.shape": "conventional", "ffn.ratio": "2"}
    one |= {"streams.n": "1", "gates.placement": "none", "train.tokens": "512"}
    assert search(tmp_path / "nas.db", text, "--engine", "inline", "--trials", "30", **one) == 0
    assert len(assert_sound(tmp_path / "nas.db", 4)) == 4  # one architecture, four learning rates
    assert "nothing new" in capsys.readouterr().err


def test_a_finished_study_can_be_extended_and_repeats_nothing(tmp_path: Path, text: str) -> None:
    store = tmp_path / "nas.db"
    assert search(store, text, "--engine", "inline", "--trials", "4", "--preset", "quick") == 0
    first = assert_sound(store, 4)
    assert (
        main(["search", "--study", "s", "--store", str(store), "--resume", "--trials", "7", "--engine", "inline"]) == 0
    )
    assert assert_sound(store, 7)[:4] == first


def test_another_sampler_seed_draws_other_architectures_and_the_same_seed_the_same(tmp_path: Path, text: str) -> None:
    drawn = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        with Store(str(tmp_path / f"{name}.db"), create=True) as store:
            row, _ = searched(store, text, Inline(), trials=6, seed=seed, settings={"train.tokens": "512"})
            drawn.append([trial.arch_hash for trial in store.trials(row)])
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_asynchronous_search_replays_to_its_proposals(tmp_path: Path, text: str, pool: Executor) -> None:
    settings = {"train.tokens": "1024", "train.batch_tokens": "128"}
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        row, _ = searched(store, text, pool, trials=20, sampler="evolution", halving=True, settings=settings)
        entries = list(replay(store, row))
    assert len(entries) == 17  # three are the baselines
    assert [entry.drawn for entry in entries] == [entry.stored for entry in entries]


def test_latency_and_memory_are_measured_where_they_are_objectives(tmp_path: Path, text: str) -> None:
    objectives = ("bits_per_byte", "latency_ms", "peak_bytes")
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        row, outcome = searched(store, text, Inline(), trials=4, objectives=objectives)
        trials = store.trials(row)
        assert outcome.finished == 4 and store.front(row)
    for trial in trials:
        assert trial.values["latency_ms"] > 0
        assert trial.values["peak_bytes"] > 16 * trial.parameters  # type: ignore[operator]  # weights, gradients, two moments
        assert "latency_ms_quartiles" in trial.diagnostics
    assert all(row.reference[name] > 0 for name in ("latency_ms", "peak_bytes"))


PLAIN = {"gates.placement": "none", "streams.n": "1", "d_model": "16", "optim.lr": "0.003"}


@pytest.mark.parametrize(("tokens", "rungs"), [("256", [3]), ("512", [2, 3])])
def test_a_training_of_fewer_steps_than_rungs_has_fewer_rungs(
    tokens: str, rungs: list[int], tmp_path: Path, text: str
) -> None:
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        row, _ = searched(store, text, Inline(), trials=3, halving=True, settings=PLAIN | {"train.tokens": tokens})
        seen = [[report.rung for report in store.reports(row, [trial.number])] for trial in store.trials(row)]
    assert seen[0] == rungs  # the first at a rung goes on
    assert all(reached and reached == rungs[: len(reached)] for reached in seen)


SLOW = f"{Path(__file__).parents[1] / 'faulty_space.py'}:Slow"


def test_a_net_over_the_latency_limit_is_not_trained_and_the_others_train_as_without_a_limit(
    tmp_path: Path, text: str
) -> None:
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        settings = PLAIN | {"max.latency_ms": "40"}
        row, _ = searched(store, text, Inline(), trials=5, space=SLOW, settings=settings)
        trials = store.trials(row)
        reported = {report.trial for report in store.reports(row)}
        failures = status_of(store, row)["failures"]
    over = [trial for trial in trials if trial.arch["depth"] == 2]
    assert 0 < len(over) < 5 and failures == {"over_limit": len(over)}
    for trial in over:
        assert trial.state == State.FAILED and trial.failure and trial.number not in reported
        assert trial.failure.message == f"latency {trial.diagnostics['latency_ms']:.4g} ms, over max.latency_ms=40"
    for trial in trials:
        if trial.arch["depth"] == 1:
            assert trial.state == State.COMPLETE and 0 < trial.values["latency_ms"] < 40
            with Store(str(tmp_path / "nas.db")) as store:
                result = retrain(make_job(store, row, trial), Silent())
            assert {**result.values, "latency_ms": trial.values["latency_ms"]} == trial.values


def test_a_gated_net_is_held_against_the_latency_limit_after_its_training(tmp_path: Path, text: str) -> None:
    gated = PLAIN | {"gates.placement": "ffn", "gates.layers": "all", "gates.rate": "0.5", "depth": "1"}
    for limit, state in (("1e-9", State.FAILED), ("1e9", State.COMPLETE)):
        with Store(str(tmp_path / f"{limit}.db"), create=True) as store:
            row, _ = searched(store, text, Inline(), trials=2, settings=gated | {"max.latency_ms": limit})
            *_, trial = store.trials(row)  # the first is the baseline, without gates
            assert trial.arch["gates.placement"] == "ffn" and trial.state == state
            assert [report.rung for report in store.reports(row, [trial.number])] == [0, 1, 2, 3]
            assert trial.train_seconds > 0  # type: ignore[operator]


def test_a_search_whose_latency_limit_nothing_meets_ends_and_says_why(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = {"max.latency_ms": "1e-9"}
    assert search(tmp_path / "nas.db", text, "--engine", "inline", "--trials", "4", **(PLAIN | limit)) == 0
    out, err = capsys.readouterr()
    assert "finished 4 of 4 trials" in out
    assert "no trial came to its end; failed: 4 over_limit" in err


# ---- killed and interrupted ------------------------------------------------------------------------------------


def start(store: Path, text: str, *extra: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hypernas", "search", "--study", "s", "--store", str(store), *flags(text)]
    return subprocess.Popen(
        [*command, *extra], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for(store: Path, done: int, process: subprocess.Popen[str], state: State = State.COMPLETE) -> None:
    """Until `done` trials are in `state`."""
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(UserError), Store(str(store)) as opened:  # the store or the study is not there yet
            if opened.states(opened.study("s"))[state] >= done:
                return
        time.sleep(0.2)  # each look opens the store: it takes time from the search
    assert process.poll() is None, process.communicate()[1]
    raise AssertionError(f"fewer than {done} trials {state} after 150 seconds")


@pytest.mark.parametrize(
    ("engine", "kills"), [("inline", (2, 5)), pytest.param("ray", (1, 3, 6), marks=pytest.mark.slow)]
)
def test_a_search_killed_at_random_points_ends_with_the_asked_number_of_trials(
    engine: str, kills: tuple[int, ...], tmp_path: Path, text: str
) -> None:
    store, rng = tmp_path / "nas.db", random.Random(time.time_ns())
    seed = rng.randrange(10**6)
    print(f"seed {seed}")
    rng.seed(seed)
    resume: tuple[str, ...] = ("--trials", "10", "--preset", "quick", "--engine", engine)
    for done in kills:
        process = start(store, text, *resume)
        try:
            wait_for(store, done, process)
            time.sleep(rng.random() * 0.5)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        resume = ("--trials", "10", "--resume")
    process = start(store, text, *resume)
    wait_for(store, 7, process)
    cluster = psutil.Process(process.pid).children(recursive=True)
    assert process.wait(timeout=120) == 0, process.communicate()[1]
    assert psutil.wait_procs(cluster, timeout=15)[1] == []
    trials = assert_sound(store, 10)
    for trial in random.Random(seed).sample(trials, 2):
        assert_retrains(store, trial)


def test_one_interrupt_finishes_running_trials_and_says_how_to_resume(tmp_path: Path, text: str) -> None:
    store = tmp_path / "nas.db"
    process = start(store, text, "--trials", "500", "--preset", "quick", "--engine", "inline")
    wait_for(store, 2, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "--resume" in errors
    assert "Traceback" not in errors
    with Store(str(store)) as opened:
        states = opened.states(opened.study("s"))
    assert states["RUNNING"] == states["WAITING"] == 0


def test_a_search_on_ray_listens_on_loopback_alone_and_two_signals_to_its_group_hand_its_trials_back(
    tmp_path: Path, text: str
) -> None:
    store = tmp_path / "nas.db"
    extra = ("--trials", "20", "--preset", "quick", "--workers", "1", "--set", "train.tokens=5000000")
    process = start(store, text, *extra)
    wait_for(store, 1, process, State.RUNNING)
    cluster = psutil.Process(process.pid).children(recursive=True)
    listening = [
        connection.laddr.ip
        for member in cluster
        for connection in member.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert {ipaddress.ip_address(ip.removeprefix("::ffff:")).is_loopback for ip in listening} == {True}
    os.killpg(process.pid, signal.SIGTERM)  # as `timeout` and supervisors do
    time.sleep(1.5)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in errors, errors
    with Store(str(store)) as opened:
        row = opened.study("s")
        assert opened.states(row) == {"WAITING": 1, "RUNNING": 0, "COMPLETE": 0, "STOPPED": 0, "FAILED": 0}
        assert opened.trial(row, 0).attempts == 0  # its next lease is its first attempt
    _, alive = psutil.wait_procs(cluster, timeout=15)
    assert alive == []


def test_the_time_limit_ends_a_search_that_can_be_resumed(tmp_path: Path, text: str) -> None:
    store = tmp_path / "nas.db"
    assert search(store, text, "--engine", "inline", "--trials", "500", "--time", "2") == 1
    with Store(str(store)) as opened:
        done = opened.finished(opened.study("s"))
    assert 0 < done < 500
    assert_sound(store, done)
