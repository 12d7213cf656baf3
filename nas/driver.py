"""The loop of a search: lease, submit, store what comes back, tell the sampler. The only writer of trials.

Whatever kills it, the store is consistent: every event is one transaction, and a new driver takes over.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

from nas import worker
from nas.artifacts import keep_weights
from nas.checkpoints import discard, kept, open_folder
from nas.executors import Event, Executor, Lost
from nas.records import FINISHED, Job, Notice, Progress, Report, Result, Trial
from nas.study import Search

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


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the loop ended."""

    finished: int
    asked: int
    interrupted: bool
    exhausted: bool
    timed_out: bool


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


def run(search: Search, executor: Executor, view: View, *, seconds: float | None = None) -> Outcome:
    """Runs the study to its number of trials, or until `seconds` have passed or the user interrupts."""
    store, row = search.store, search.row
    open_folder(search.checkpoints)
    for number in kept(search.checkpoints):
        if store.trial(row, number).state in FINISHED:
            discard(search.checkpoints, number)
    driver = store.start_driver(row, executor.workers)
    for number in store.reclaim(row):
        view.message(f"trial {number} was left running by a driver that died: it waits for a worker again")
    interrupt = Interrupt()
    leased: dict[int, Trial] = {}
    deadline = None if seconds is None else time.monotonic() + seconds
    beat = time.monotonic()
    told = 0
    with interrupt.caught():
        try:
            while True:
                late = deadline is not None and time.monotonic() > deadline
                stopping = interrupt.count > 0 or late
                if interrupt.count > told:
                    told = interrupt.count
                    if leased and told == 1:
                        view.message(f"finishing {len(leased)} running trials; once more hands them back unfinished")
                if not stopping:
                    _fill(search, executor, driver, leased, view)
                if not leased or interrupt.count > 1:
                    break
                search.prefetch(0 if stopping else executor.workers)
                for event in executor.wait(TICK_SECONDS):
                    _handle(search, executor, event, leased, view)
                if time.monotonic() - beat > HEARTBEAT_SECONDS:
                    beat = time.monotonic()
                    store.heartbeat(driver)
                view.tick()
        finally:
            executor.abandon()
            for trial in leased.values():
                store.release(row, trial.number, trial.token, fault=False)
            store.stop_driver(driver)
    late = deadline is not None and time.monotonic() > deadline
    return Outcome(
        finished=store.finished(row),
        asked=search.plan.trials,
        interrupted=interrupt.count > 0,
        exhausted=search.exhausted,
        timed_out=late,
    )


def _fill(search: Search, executor: Executor, driver: int, leased: dict[int, Trial], view: View) -> None:
    """Gives every free worker a trial, as long as there are any."""
    while executor.running < executor.workers:
        trial = search.lease(driver)
        if trial is None:
            return
        leased[trial.number] = trial
        view.started(trial)
        executor.submit(search.job(trial))


def _handle(search: Search, executor: Executor, event: Event, leased: dict[int, Trial], view: View) -> None:
    store, row = search.store, search.row
    if isinstance(event, Progress):
        view.progress(event)
    elif isinstance(event, Notice):
        view.message(f"trial {event.trial} {event.message}")
    elif isinstance(event, Report):
        trial = leased[event.trial]
        goes_on = search.reported(trial, event, store.report(row, event, trial.token))
        view.reported(event)
        if not goes_on:
            executor.stop(event.trial)
            del leased[event.trial]
            search.stopped(trial, event, store.stop(row, event, trial.token))
            discard(search.checkpoints, event.trial)
            view.stopped(event)
    elif isinstance(event, Lost):
        del leased[event.trial]
        store.release(row, event.trial, event.token)
        view.message(f"trial {event.trial} lost its worker ({event.reason})")
        view.ended(event.trial, None)
        search.refresh()
    else:
        trial = leased.pop(event.trial)
        event = search.checked(event)
        search.ended(trial, event, store.finish(row, event))
        discard(search.checkpoints, event.trial)
        if event.weights and any(trial.number == event.trial for trial in store.front(row)):
            keep_weights(store, row, event.trial, event.weights)
        view.ended(event.trial, event)


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
