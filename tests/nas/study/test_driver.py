"""The loop of a search, on engines whose events are made to order."""

import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from hypernas.config.study_config import StudyConfig
from hypernas.engines.inline import Inline
from hypernas.engines.protocol import Event, Lost
from hypernas.records import Failure, FailureKind, Job, Report, Result, State
from hypernas.show.status import verdict
from hypernas.show.views import Silent
from hypernas.store import Store, reader
from hypernas.store.store import MAX_LOST
from hypernas.strategy import optuna_study
from hypernas.study import driver as loop
from hypernas.study.driver import Outcome, run
from hypernas.study.replay import replay
from hypernas.study.search import Search, open_search, prepare
from hypernas.training.checkpoint_files import checkpoint_path, list_checkpoints, open_folder

TRIVIAL = "trivial"


def opened(store: Store, trials: int = 6, **config: object) -> Search:
    settings = StudyConfig(study="s", trials=trials, preset="quick", **config)  # type: ignore[arg-type]
    return open_search(store, prepare(settings), evaluate=TRIVIAL)


class Disturbed(Inline):
    """Inline, but what `disturb(job)` returns comes in place of a job's result."""

    def __init__(self, disturb: Callable[[Job], Event | None]) -> None:
        super().__init__()
        self._disturb = disturb
        self.jobs: list[Job] = []

    def submit(self, job: Job) -> None:
        self.jobs.append(job)
        super().submit(job)

    def wait(self, timeout: float) -> list[Event]:
        assert self._current is not None
        instead = self._disturb(self._current[0])
        if instead is None:
            return super().wait(timeout)
        self._current = None
        return [instead]


def failed(job: Job, kind: FailureKind) -> Result:
    return Result(job.trial, job.token, failure=Failure(kind, "no"))


def test_a_machine_that_goes_away_again_and_again_costs_its_trial_nothing(store: Store) -> None:
    engine = Disturbed(lambda job: Lost(job.trial, job.token, "gone", preempted=True) if job.token <= 8 else None)
    search = opened(store, trials=1)
    assert run(search, engine, Silent()).finished == 1
    trial = store.trial(search.row, 0)
    assert (trial.state, trial.attempts, trial.token) == (State.COMPLETE, 1, 9)


def test_a_trial_that_kills_its_worker_is_set_aside_after_three_and_tried_again_once_all_else_is_done(
    store: Store,
) -> None:
    engine = Disturbed(lambda job: Lost(job.trial, job.token, "died") if job.trial == 1 else None)
    search = opened(store)
    assert run(search, engine, Silent()).finished == 6
    trial = store.trial(search.row, 1)
    assert trial.state == State.FAILED and trial.failure and trial.failure.kind == FailureKind.WORKER_LOST
    assert [job.trial for job in engine.jobs] == [0, *[1] * MAX_LOST, 2, 3, 4, 5, *[1] * MAX_LOST]


def test_a_start_that_kills_workers_costs_the_baselines_nothing(store: Store) -> None:
    kills = [0, 0, 0, 1, 1, 1, 1]  # whom each of them hits
    engine = Disturbed(lambda job: Lost(kills.pop(0), job.token, "died") if kills[:1] == [job.trial] else None)
    search = opened(store)
    assert run(search, engine, Silent()).finished == 6
    assert store.states(search.row)[State.COMPLETE] == 6 and not kills
    assert "comparison" not in verdict(store, search.row)


def test_a_resumed_search_tries_again_what_lost_its_workers_and_compares_only_then(store: Store) -> None:
    search = opened(store)
    run(search, Disturbed(lambda job: Lost(job.trial, job.token, "died") if job.trial < 2 else None), Silent())
    said = verdict(store, search.row)
    assert "no comparison while a baseline is missing (trials 0, 1: lost its workers)" in said, said
    assert "nas search --study s --store" in said and "--resume" in said
    resumed = opened(store, resume=True)
    assert store.states(resumed.row)[State.WAITING] == 2
    assert run(resumed, Inline(), Silent()).finished == 6
    assert [trial.attempts for trial in store.trials(resumed.row)] == [1] * 6
    assert store.states(resumed.row)[State.COMPLETE] == 6
    assert "no comparison" not in verdict(store, resumed.row)


def test_what_a_trial_lost_under_an_earlier_driver_does_not_count(store: Store) -> None:
    search = opened(store, trials=1)
    driver = store.start_driver(search.row, 1)
    for _ in range(MAX_LOST - 1):
        trial = search.lease(driver)
        assert trial and store.release(search.row, 0, trial.token)
        search.refresh()
    store.stop_driver(driver)
    lost = iter(range(MAX_LOST - 1))
    engine = Disturbed(lambda job: None if next(lost, None) is None else Lost(job.trial, job.token, "died"))
    assert run(opened(store, trials=1, resume=True), engine, Silent()).finished == 1
    assert len(engine.jobs) == MAX_LOST and store.trial(search.row, 0).state == State.COMPLETE


def test_draws_after_a_lost_trial_came_back_are_replayed(tmp_path: Path) -> None:
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        search = opened(store, trials=7)
        run(search, Disturbed(lambda job: Lost(job.trial, job.token, "died") if job.trial == 4 else None), Silent())
        resumed = opened(store, trials=10, resume=True)
        assert run(resumed, Inline(), Silent()).finished == 10
        assert store.states(resumed.row)[State.COMPLETE] == 10
        assert [entry for entry in replay(store, resumed.row) if entry.stored != entry.drawn] == []


def test_running_out_of_memory_is_met_with_smaller_parts_of_the_batch(store: Store) -> None:
    engine = Disturbed(lambda job: failed(job, FailureKind.OUT_OF_MEMORY) if job.micro_batches < 4 else None)
    search = opened(store, trials=2)
    run(search, engine, Silent())
    assert [job.micro_batches for job in engine.jobs if job.trial == 0] == [1, 2, 4]
    assert store.trial(search.row, 0).state == State.COMPLETE
    assert store.trial(search.row, 0).attempts == 1


def test_memory_that_never_suffices_fails_the_trial(store: Store) -> None:
    engine = Disturbed(lambda job: failed(job, FailureKind.OUT_OF_MEMORY) if job.trial == 0 else None)
    search = opened(store, trials=3)
    assert run(search, engine, Silent()).finished == 3
    trial = store.trial(search.row, 0)
    assert trial.failure and trial.failure.kind == FailureKind.OUT_OF_MEMORY
    assert [job.micro_batches for job in engine.jobs if job.trial == 0] == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("kind", "taught"),
    [
        (FailureKind.DIVERGED, True),
        (FailureKind.TIMEOUT, True),
        (FailureKind.OVER_LIMIT, True),
        (FailureKind.ERROR, False),
    ],
)
def test_the_sampler_hears_of_failures_that_are_the_architectures_own(
    kind: FailureKind, taught: bool, store: Store
) -> None:
    search = opened(store, trials=4)
    told: list[optuna_study.Outcome | None] = []
    proposer = search.proposals._proposer
    tell = proposer.tell
    proposer.tell = lambda handle, outcome: (told.append(outcome), tell(handle, outcome))[1]  # type: ignore[method-assign]
    run(search, Disturbed(lambda job: failed(job, kind) if job.trial == 3 else None), Silent())
    reference = tuple(search.row.reference[name] for name in search.row.objectives)
    assert told == [optuna_study.Outcome(reference, unfinished=optuna_study.FAILED) if taught else None]


def test_a_driver_that_falls_silent_elsewhere_loses_its_trials_to_a_running_one(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "HEARTBEAT_SECONDS", 0.1)
    search = opened(store, trials=5)
    here = socket.gethostname
    with monkeypatch.context() as there:
        there.setattr(socket, "gethostname", lambda: "elsewhere")
        other = store.start_driver(search.row, 1)
    theirs = search.lease(other)
    assert theirs and socket.gethostname is here
    assert store.reclaim(search.row) == []  # its heart beat a moment ago
    monkeypatch.setattr(reader, "HEARTBEAT_LAPSE", timedelta(seconds=1))
    outcome = run(search, Inline(), Silent())  # takes the other four, then waits for the fifth
    assert outcome.finished == 5
    trial = store.trial(search.row, theirs.number)
    assert (trial.state, trial.token) == (State.COMPLETE, 2)
    late = Result(theirs.number, theirs.token, {"bits_per_byte": 0.0, "flops_per_token": 1.0})
    assert store.finish(search.row, late) is None  # it woke up: nobody listens


def test_a_driver_that_lost_its_lease_stops_the_job_and_goes_on(store: Store) -> None:
    search = opened(store, trials=3, settings={"train.tokens": "512"})
    stolen: list[int] = []

    def steal(job: Job) -> Event | None:
        if job.trial == 1 and not stolen:
            stolen.append(job.token)
            store.release(search.row, 1, job.token, fault=False)
        return None

    outcome = run(search, Disturbed(steal), Silent())
    assert outcome.finished == 3
    assert store.trial(search.row, 1).token == 2


def test_device_hours_end_a_search_and_more_of_them_continue_it(store: Store) -> None:
    def slow(job: Job) -> Event:
        values = {"bits_per_byte": 1.0, "flops_per_token": 10.0 + job.trial}
        return Result(job.trial, job.token, values, train_seconds=1800.0)

    search = opened(store)
    outcome = run(search, Disturbed(slow), Silent(), device_hours=1.0)
    assert outcome == Outcome(finished=2, asked=6, interrupted=False, exhausted=False, over_budget=True)
    assert run(search, Disturbed(slow), Silent(), device_hours=2.0).finished == 4
    assert run(search, Disturbed(slow), Silent()).finished == 6


def test_a_full_disk_for_weights_costs_the_weights_alone(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    said: list[str] = []
    monkeypatch.setattr(loop, "keep_weights", full)
    tiny = {"depth": "1", "d_model": "16", "head_dim": "8", "context": "32", "train.tokens": "512"}
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        config = StudyConfig(study="s", trials=2, preset="quick", settings=tiny | {"data.path": text})
        search = open_search(store, prepare(config))
        view = Silent()
        view.message = said.append  # type: ignore[method-assign]
        assert run(search, Inline(), view).finished == 2
        assert {trial.state for trial in store.trials(search.row)} == {State.COMPLETE}
    assert any("No space left" in line for line in said)


def test_a_folder_of_checkpoints_that_goes_away_ends_no_search(tmp_path: Path) -> None:
    def fail(_: Job) -> None:
        if folder.is_dir():
            folder.rename(folder.with_name("aside"))
            folder.write_text("no folder any more")

    with Store(str(tmp_path / "nas.db"), create=True) as store:
        search = opened(store, trials=3)
        folder = Path(search.checkpoints)
        assert run(search, Disturbed(fail), Silent()).finished == 3
        assert folder.is_file()


def test_checkpoints_of_trials_that_are_over_or_unknown_are_cleared_and_those_that_wait_kept(store: Store) -> None:
    search = opened(store, trials=3)
    driver = store.start_driver(search.row, 1)
    over, waits = (search.lease(driver) for _ in range(2))
    assert over and waits
    store.finish(search.row, failed(search.job(over), FailureKind.ERROR))
    store.stop_driver(driver)
    open_folder(search.checkpoints)
    for number in (over.number, waits.number, 7):  # 7: of a study whose store was deleted
        Path(checkpoint_path(search.checkpoints, number)).touch()
    seen: list[set[int]] = []
    engine = Disturbed(lambda job: seen.append(list_checkpoints(search.checkpoints)))
    assert run(search, engine, Silent()).finished == 3
    assert seen[0] == {waits.number}
    assert list_checkpoints(search.checkpoints) == set()


class TwoAtOnce(Inline):
    """Inline, but two rungs' reports come together with the result, as they may from Ray Tune."""

    def wait(self, timeout: float) -> list[Event]:
        assert self._current is not None
        number = self._current[0].trial
        reports = [Report(number, rung, rung + 1, 10, 1e9, 2.0, 0.1) for rung in range(2)]
        return [*reports, *super().wait(timeout)]


def test_what_arrives_together_with_the_report_that_stops_a_trial_is_dropped(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = opened(store, trials=3, halving=True)
    monkeypatch.setattr(search.proposals, "should_continue", lambda number, rung: number != 1)
    assert run(search, TwoAtOnce(), Silent()).finished == 3
    states = [trial.state for trial in store.trials(search.row)]
    assert states == [State.COMPLETE, State.STOPPED, State.COMPLETE]
    assert [report.rung for report in store.reports(search.row, [1])] == [0]
