"""The loop that trains: lease, submit, store what comes back, tell the sampler. The only writer of trials.

Whatever kills it, the store is consistent: every event is one transaction, and a new driver takes over.
"""

import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from math import inf, isfinite
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

from hypernas.engines.protocol import Event, Executor, Lost
from hypernas.files import remove_halves
from hypernas.records import (
    POLICIES,
    Failure,
    FailureKind,
    Job,
    Notice,
    Policy,
    Progress,
    Report,
    Result,
    State,
    StudyRow,
    Trial,
    name_trials,
)
from hypernas.store import Store
from hypernas.store.weights import drop_strays, keep_weights, should_keep_weights
from hypernas.study.search import check_device, devices_and_precisions
from hypernas.training import worker
from hypernas.training.checkpoint_files import discard, list_checkpoints, open_folder

T = TypeVar("T")

HEARTBEAT_SECONDS = 10.0
TICK_SECONDS = 0.5


class View(Protocol):
    """Who watches a search: the terminal, or nobody."""

    def on_start(self, trial: Trial) -> None: ...
    def on_progress(self, event: Progress) -> None: ...
    def on_report(self, event: Report) -> None: ...
    def on_stop(self, event: Report) -> None: ...
    def on_end(self, trial: int, result: Result | None) -> None: ...
    def message(self, text: str) -> None: ...
    def tick(self) -> None: ...


class Work(Protocol):
    """What there is to train, and in which study: a search (search.py) or a fixed list (sweep.py)."""

    store: Store
    row: StudyRow
    exhausted: bool  # nothing new can come any more
    checkpoints: str  # the folder of half-trained trials

    @property
    def asked(self) -> int:
        """Finished trials in the study when all is done."""
        ...

    def prefetch(self, count: int) -> None:
        """Prepares up to `count` trials, so that no worker waits for one."""
        ...

    def lease(self, driver: int) -> Trial | None:
        """The next trial to train, RUNNING under this driver's lease; None when there is none now."""
        ...

    def job(self, trial: Trial) -> Job: ...

    def refresh(self) -> None:
        """Takes in what changed in the store."""
        ...

    def observe_report(self, trial: Trial, report: Report, seq: int) -> bool:
        """Takes in a report of ours, stored as change `seq`; whether the trial goes on after it."""
        ...

    def observe_stop(self, trial: Trial, report: Report, seq: int | None) -> None:
        """Takes in that the trial was stopped where the report was made."""
        ...

    def observe_end(self, trial: Trial, result: Result, seq: int | None) -> None:
        """Takes in a result of ours, stored as change `seq` (None: our lease was lost, and nothing was stored)."""
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the loop ended."""

    finished: int
    asked: int
    interrupted: bool
    exhausted: bool
    over_budget: bool  # of time or of device-hours


class Interrupt:
    """Counts Ctrl-C and SIGTERM: the first lets running trials finish, the second hands them back."""

    def __init__(self) -> None:
        self.count = 0
        self._at_once = False

    def at_once(self, work: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """What `work` returns; a signal meanwhile raises KeyboardInterrupt, as nothing runs yet that could finish."""
        self._at_once = True
        try:
            return work(*arguments, **named)
        finally:
            self._at_once = False

    @contextmanager
    def caught(self) -> Iterator["Interrupt"]:
        if threading.current_thread() is not threading.main_thread():
            yield self  # signals only reach the main thread
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self._at_once:
            raise KeyboardInterrupt


class Heart:
    """Beats in a thread of its own: a driver that is busy for long, as with one job in its own process, is not dead."""

    def __init__(self, store: Store, driver: int, seconds: float) -> None:
        self._stopped = threading.Event()
        self._fault: Exception | None = None
        self._thread = threading.Thread(target=self._beat, args=(store, driver, seconds), daemon=True)
        self._thread.start()

    def _beat(self, store: Store, driver: int, seconds: float) -> None:
        while not self._stopped.wait(seconds):
            try:
                store.heartbeat(driver)
            except Exception as error:  # noqa: BLE001 - whatever it is, `check` raises it where it is heard
                self._fault = error
                return

    def check(self) -> None:
        """Raises what kept the heart from beating, StoreError as a rule."""
        if self._fault is not None:
            raise self._fault

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(5.0)


MAX_MICRO_BATCHES = 8


class Used:
    """Device-seconds of the study's finished trials. To ask the store takes longer in a longer study, so what ends here
    is added, and others' trials are asked for once in a while."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._seconds, self._due = 0.0, 0.0

    def look(self) -> float:
        if time.monotonic() >= self._due:
            self._seconds = self._work.store.device_seconds(self._work.row)
            self._due = time.monotonic() + HEARTBEAT_SECONDS
        return self._seconds

    def add(self, seconds: float) -> None:
        self._seconds += seconds


@dataclass(frozen=True, slots=True)
class _Session:
    """A driver at work: what it trains, on what, who watches, and the trials it has leased, by number."""

    work: Work
    executor: Executor
    view: View
    driver: int
    heart: Heart
    used: Used
    leased: dict[int, Trial] = field(default_factory=dict)


def run(
    work: Work,
    executor: Executor,
    view: View,
    *,
    seconds: float | None = None,
    device_hours: float | None = None,
    other_device: bool = False,
    interrupt: "Interrupt | None" = None,
) -> Outcome:
    """Trains until the work is done, a budget is used up or the user interrupts.

    `seconds` counts from here; `device_hours` all that the study's trials have trained and evaluated. `interrupt`
    catches signals already, for longer than this call. Raises UserError when checkpoints cannot be written, and, but
    for `other_device`, before a worker is given a trial that would train in another precision or on another kind of
    device than the study's trials were.
    """
    store, row = work.store, work.row
    before = set() if other_device else devices_and_precisions(store, row)
    open_folder(work.checkpoints)
    _discard_old_checkpoints(work)
    drop_strays(store, row)
    driver = store.start_driver(row, executor.workers)
    session = _Session(work, executor, view, driver, Heart(store, driver, HEARTBEAT_SECONDS), Used(work))
    catching: AbstractContextManager[Interrupt] = Interrupt().caught() if interrupt is None else nullcontext(interrupt)
    deadline = inf if seconds is None else time.monotonic() + seconds

    def is_spent() -> bool:
        if time.monotonic() > deadline:
            return True
        return device_hours is not None and session.used.look() >= 3600 * device_hours

    with catching as interrupt:
        try:
            _take_over(work, view)
            spent = _train(session, before, interrupt, is_spent)
        finally:
            _hand_back(session)
    return Outcome(
        finished=store.finished(row),
        asked=work.asked,
        interrupted=interrupt.count > 0,
        exhausted=work.exhausted,
        over_budget=spent,
    )


def _train(
    session: _Session, before: Collection[tuple[str, str]], interrupt: Interrupt, is_spent: Callable[[], bool]
) -> bool:
    """The loop itself; whether a budget was used up at its end. `before`: how the study's trials were trained."""
    work, executor, view, leased = session.work, session.executor, session.view, session.leased
    looked = time.monotonic()
    told, waits, retried = 0, False, False
    while True:
        session.heart.check()
        work.store.check_held()
        spent = is_spent()
        stopping = interrupt.count > 0 or spent
        if interrupt.count > told:
            told = interrupt.count
            if leased and told == 1:
                view.message(f"finishing {len(leased)} running trials; once more hands them back unfinished")
        check_device(work.row, before, executor.seen)  # workers may have come since
        if not stopping:
            _fill(session)
        done = not leased and (stopping or (executor.free and _is_settled(work)))
        if done and not (stopping or retried) and _retry_lost(work, view):
            retried = True
            continue
        if done or interrupt.count > 1:
            return spent
        if leased or not executor.free:
            work.prefetch(0 if stopping else executor.workers)
            for event in executor.wait(TICK_SECONDS):
                if event.trial in leased:  # otherwise an earlier event of the same call ended it for us
                    _handle(session, event)
        else:  # others have the last trials, and may die over them
            if not waits:
                view.message("nothing is left to start: waiting for the trials of other drivers")
            waits = True
            time.sleep(TICK_SECONDS)
        if time.monotonic() - looked > HEARTBEAT_SECONDS:
            looked = time.monotonic()
            _take_over(work, view)
            _discard_old_checkpoints(work)
        view.tick()


def _discard_old_checkpoints(work: Work) -> None:
    """Empties the folder of half-trained trials of those that ended (one may be written as its worker is stopped), and
    of what was half-written."""
    remove_halves(Path(work.checkpoints))
    found = list_checkpoints(work.checkpoints)  # before the store is asked: another driver may be starting trials
    for number in found - work.store.numbers(work.row, (State.WAITING, State.RUNNING)):
        discard(work.checkpoints, number)


def _hand_back(session: _Session) -> None:
    """Leaves the study: what is still leased waits for another worker."""
    store, row = session.work.store, session.work.row
    session.heart.stop()
    try:
        session.executor.abandon()
    finally:  # also where the cluster is gone
        for trial in session.leased.values():
            store.release(row, trial.number, trial.token, fault=False)
        store.stop_driver(session.driver)
    _discard_old_checkpoints(session.work)


def _take_over(work: Work, view: View) -> None:
    """Trials of drivers that died wait for a worker again."""
    taken = work.store.reclaim(work.row)
    for number in taken:
        view.message(f"trial {number} was left running by a driver that died: it waits for a worker again")
    if taken:
        work.refresh()


def _retry_lost(work: Work, view: View) -> bool:
    """Has trials that were set aside for lost workers tried again, when all else is done; whether there are any.

    A bad start hits what is trained first, the plain nets that all else is compared with.
    """
    lost = work.store.retry_lost(work.row)
    if lost:
        view.message(f"trying again what lost its workers: {name_trials(lost)}")
        work.refresh()
    return bool(lost)


def _is_settled(work: Work) -> bool:
    """Whether nothing runs or waits in the store, other drivers' trials included."""
    work.refresh()
    counts = work.store.states(work.row)
    return not counts[State.RUNNING] and not counts[State.WAITING]


def _fill(session: _Session) -> None:
    """Gives every free worker a trial, as long as there are any."""
    work, executor = session.work, session.executor
    while executor.free:
        trial = work.lease(session.driver)
        if trial is None:
            return
        session.leased[trial.number] = trial
        session.view.on_start(trial)
        executor.submit(work.job(trial))


# ---- what workers say ------------------------------------------------------------------------------------------


def _handle(session: _Session, event: Event) -> None:
    """Stores an event of a leased trial, and tells whoever watches."""
    if isinstance(event, Progress):
        session.view.on_progress(event)
    elif isinstance(event, Notice):
        session.view.message(f"trial {event.trial} {event.message}")
    elif isinstance(event, Report):
        _store_report(session, event)
    elif isinstance(event, Lost):
        reason = f"lost its worker: {event.reason}"
        _release(session, event.trial, event.token, reason, fault=not event.preempted)
    elif (parts := _parts_to_try(session.leased[event.trial], event)) is not None:
        discard(session.work.checkpoints, event.trial)
        reason = f"ran out of memory: once more, with its batches in {parts} parts"
        _release(session, event.trial, event.token, reason, fault=False, provenance={"micro_batches": parts})
    else:
        _store_result(session, event)


def _store_report(session: _Session, report: Report) -> None:
    """Stores a report, and stops its trial where the work says so or another driver has taken it over."""
    work, executor, view = session.work, session.executor, session.view
    trial = session.leased[report.trial]
    seq = work.store.report(work.row, report, trial.token)
    if seq is None:  # we were silent for so long that another driver took it over
        executor.stop(report.trial)
        _lose(session, report.trial)
        return
    view.on_report(report)
    if not work.observe_report(trial, report, seq):
        del session.leased[report.trial]
        executor.stop(report.trial)
        session.used.add(report.seconds)
        work.observe_stop(trial, report, work.store.stop(work.row, report, trial.token))
        discard(work.checkpoints, report.trial)
        view.on_stop(report)


def _store_result(session: _Session, result: Result) -> None:
    """Stores a trial's end, and its weights where the front keeps them."""
    work, view = session.work, session.view
    store, row = work.store, work.row
    trial = session.leased.pop(result.trial)
    result = validate_result(result, row.objectives)
    seq = store.finish(row, result)
    work.observe_end(trial, result, seq)
    if seq is None:
        _lose(session, result.trial)
        return
    session.used.add(result.train_seconds + result.evaluate_seconds)
    discard(work.checkpoints, result.trial)
    if result.weights and should_keep_weights(store, row, result.trial):
        try:
            keep_weights(store, row, result.trial, result.weights)
        except OSError as error:  # the trial's numbers are safe, and it re-trains to the same weights
            view.message(f"trial {result.trial}: its weights could not be kept: {error}")
    view.on_end(result.trial, result)


def _lose(session: _Session, number: int) -> None:
    """Lets go of a trial that is another driver's now."""
    session.leased.pop(number, None)
    session.view.message(f"trial {number} was taken over by another driver")
    session.view.on_end(number, None)


def _release(session: _Session, number: int, token: int, reason: str, **how: Any) -> None:
    """Has a trial wait for a worker again."""
    work, view = session.work, session.view
    del session.leased[number]
    work.store.release(work.row, number, token, **how)
    view.message(f"trial {number} {reason}")
    view.on_end(number, None)
    work.refresh()


def _parts_to_try(trial: Trial, result: Result) -> int | None:
    """In how many parts a batch should be trained next, if memory ran out and smaller parts may help."""
    if result.failure is None or POLICIES[result.failure.kind] != Policy.SHRINK:
        return None
    parts = 2 * trial.provenance.get("micro_batches", 1)
    return parts if parts <= MAX_MICRO_BATCHES else None


def validate_result(result: Result, objectives: Sequence[str]) -> Result:
    """The result, or a failure where an objective was not measured or a value is no finite number."""
    if result.failure is not None:
        return result
    missing = [name for name in objectives if name not in result.values]
    if missing:
        message = f"measured {', '.join(result.values) or 'nothing'}, but not the objective {', '.join(missing)}"
        return replace(result, values={}, failure=Failure(FailureKind.ERROR, message))
    wrong = [f"{name} is {value}" for name, value in result.values.items() if not isfinite(value)]
    if wrong:
        return replace(result, values={}, failure=Failure(FailureKind.DIVERGED, ", ".join(wrong)))
    return result


def retrain(job: Job, view: View) -> Result:
    """Runs one job in this process, outside any study: the same row gives the same numbers."""
    for event in worker.run(job):
        if isinstance(event, Progress):
            view.on_progress(event)
        elif isinstance(event, Notice):
            view.message(f"trial {event.trial} {event.message}")
        elif isinstance(event, Report):
            view.on_report(event)
        else:
            return event
    raise AssertionError("a worker always ends with a result")
