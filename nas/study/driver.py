"""The loop that trains: lease, submit, store what comes back, tell the sampler. The only writer of trials.

Whatever kills it, the store is consistent: every event is one transaction, and a new driver takes over.
"""

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from types import FrameType
from typing import Protocol

from hypernas.engines.protocol import Event, Executor, Lost
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
)
from hypernas.store import Store
from hypernas.store.weights import keep_weights, should_keep_weights
from hypernas.study.search import check_device, computed_in
from hypernas.training import worker
from hypernas.training.checkpoints import discard, list_checkpoints, open_folder

HEARTBEAT_SECONDS = 10.0
TICK_SECONDS = 0.5


class View(Protocol):
    """Who watches a search: the terminal, or nobody."""

    def started(self, trial: Trial) -> None: ...
    def progress(self, event: Progress) -> None: ...
    def reported(self, event: Report) -> None: ...
    def stopped(self, event: Report) -> None: ...
    def ended(self, trial: int, result: Result | None) -> None: ...
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

    def reported(self, trial: Trial, report: Report, seq: int) -> bool:
        """A report of ours, stored as change `seq`; whether the trial goes on after it."""
        ...

    def stopped(self, trial: Trial, report: Report, seq: int | None) -> None:
        """The trial was stopped where the report was made."""
        ...

    def ended(self, trial: Trial, result: Result, seq: int | None) -> None:
        """A result of ours, stored as change `seq` (None: our lease was lost, and nothing was stored)."""
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


MAX_MICRO_BATCHES = 8


def run(
    work: Work,
    executor: Executor,
    view: View,
    *,
    seconds: float | None = None,
    device_hours: float | None = None,
    other_device: bool = False,
) -> Outcome:
    """Trains until the work is done, a budget is used up or the user interrupts.

    `seconds` counts from here; `device_hours` all that the study's trials have trained and evaluated. Raises UserError
    when checkpoints cannot be written, and, but for `other_device`, before a worker is given a trial that would train
    in another precision or on another kind of device than the study's trials were.
    """
    store, row = work.store, work.row
    before = set() if other_device else computed_in(store, row)
    open_folder(work.checkpoints)
    found = list_checkpoints(work.checkpoints)  # before the store is asked: another driver may be starting trials
    unfinished = {trial.number for trial in store.trials(row, states=(State.WAITING, State.RUNNING))}
    for number in found - unfinished:
        discard(work.checkpoints, number)
    driver = store.start_driver(row, executor.workers)
    _take_over(work, view)
    interrupt = Interrupt()
    leased: dict[int, Trial] = {}
    deadline = None if seconds is None else time.monotonic() + seconds
    beat = time.monotonic()
    told = 0
    waits = False
    with interrupt.caught():
        try:
            while True:
                spent = (deadline is not None and time.monotonic() > deadline) or (
                    device_hours is not None and store.device_seconds(row) >= 3600 * device_hours
                )
                stopping = interrupt.count > 0 or spent
                if interrupt.count > told:
                    told = interrupt.count
                    if leased and told == 1:
                        view.message(f"finishing {len(leased)} running trials; once more hands them back unfinished")
                check_device(row, before, executor.seen)  # workers may have come since
                if not stopping:
                    _fill(work, executor, driver, leased, view)
                if not leased and (stopping or (executor.free and _settled(work))):
                    break
                if interrupt.count > 1:
                    break
                if leased or not executor.free:
                    work.prefetch(0 if stopping else executor.workers)
                    for event in executor.wait(TICK_SECONDS):
                        if event.trial not in leased:  # an earlier event of the same call ended it for us
                            continue
                        _handle(work, executor, event, leased, view)
                else:  # others have the last trials, and may die over them
                    if not waits:
                        view.message("nothing is left to start: waiting for the trials of other drivers")
                    waits = True
                    time.sleep(TICK_SECONDS)
                if time.monotonic() - beat > HEARTBEAT_SECONDS:
                    beat = time.monotonic()
                    store.heartbeat(driver)
                    _take_over(work, view)
                view.tick()
        finally:
            executor.abandon()
            for trial in leased.values():
                store.release(row, trial.number, trial.token, fault=False)
            store.stop_driver(driver)
    return Outcome(
        finished=store.finished(row),
        asked=work.asked,
        interrupted=interrupt.count > 0,
        exhausted=work.exhausted,
        over_budget=spent,
    )


def _take_over(work: Work, view: View) -> None:
    """Trials of drivers that died wait for a worker again."""
    taken = work.store.reclaim(work.row)
    for number in taken:
        view.message(f"trial {number} was left running by a driver that died: it waits for a worker again")
    if taken:
        work.refresh()


def _settled(work: Work) -> bool:
    """Whether nothing runs or waits in the store, other drivers' trials included."""
    work.refresh()
    counts = work.store.states(work.row)
    return not counts[State.RUNNING] and not counts[State.WAITING]


def _fill(work: Work, executor: Executor, driver: int, leased: dict[int, Trial], view: View) -> None:
    """Gives every free worker a trial, as long as there are any."""
    while executor.free:
        trial = work.lease(driver)
        if trial is None:
            return
        leased[trial.number] = trial
        view.started(trial)
        executor.submit(work.job(trial))


def _handle(work: Work, executor: Executor, event: Event, leased: dict[int, Trial], view: View) -> None:
    store, row = work.store, work.row
    if isinstance(event, Progress):
        view.progress(event)
    elif isinstance(event, Notice):
        view.message(f"trial {event.trial} {event.message}")
    elif isinstance(event, Report):
        trial = leased[event.trial]
        seq = store.report(row, event, trial.token)
        if seq is None:  # we were silent for so long that another driver took it over
            del leased[event.trial]
            executor.stop(event.trial)
            view.message(f"trial {event.trial} was taken over by another driver")
            view.ended(event.trial, None)
            return
        view.reported(event)
        if not work.reported(trial, event, seq):
            del leased[event.trial]
            executor.stop(event.trial)
            work.stopped(trial, event, store.stop(row, event, trial.token))
            discard(work.checkpoints, event.trial)
            view.stopped(event)
    elif isinstance(event, Lost):
        del leased[event.trial]
        store.release(row, event.trial, event.token, fault=not event.preempted)
        view.message(f"trial {event.trial} lost its worker: {event.reason}")
        view.ended(event.trial, None)
        work.refresh()
    elif (parts := _parts_to_try(leased[event.trial], event)) is not None:
        del leased[event.trial]
        discard(work.checkpoints, event.trial)
        store.release(row, event.trial, event.token, fault=False, provenance={"micro_batches": parts})
        view.message(f"trial {event.trial} ran out of memory: once more, with its batches in {parts} parts")
        view.ended(event.trial, None)
        work.refresh()
    else:
        trial = leased.pop(event.trial)
        event = checked(event, row.objectives)
        seq = store.finish(row, event)
        work.ended(trial, event, seq)
        if seq is None:
            view.message(f"trial {event.trial} was taken over by another driver")
            view.ended(event.trial, None)
            return
        discard(work.checkpoints, event.trial)
        if event.weights and should_keep_weights(store, row, event.trial):
            try:
                keep_weights(store, row, event.trial, event.weights)
            except OSError as error:  # the trial's numbers are safe, and it re-trains to the same weights
                view.message(f"trial {event.trial}: its weights could not be kept: {error}")
        view.ended(event.trial, event)


def _parts_to_try(trial: Trial, result: Result) -> int | None:
    """In how many parts a batch should be trained next, if memory ran out and smaller parts may help."""
    if result.failure is None or POLICIES[result.failure.kind] != Policy.SHRINK:
        return None
    parts = 2 * trial.provenance.get("micro_batches", 1)
    return parts if parts <= MAX_MICRO_BATCHES else None


def checked(result: Result, objectives: Sequence[str]) -> Result:
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
            view.progress(event)
        elif isinstance(event, Notice):
            view.message(f"trial {event.trial} {event.message}")
        elif isinstance(event, Report):
            view.reported(event)
        else:
            return event
    raise AssertionError("a worker always ends with a result")
