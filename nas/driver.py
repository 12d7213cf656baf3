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
from nas.records import FINISHED, POLICIES, Job, Notice, Policy, Progress, Report, Result, Trial
from nas.study import Search

HEARTBEAT_SECONDS = 10.0
TICK_SECONDS = 0.5


class View(Protocol):
    """Who watches a search: the terminal, or nobody."""

    def started(self, trial: Trial) -> None: ...
    def progress(self, event: Progress) -> None: ...
    def reported(self, event: Report) -> None: ...
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
    search: Search,
    executor: Executor,
    view: View,
    *,
    seconds: float | None = None,
    device_hours: float | None = None,
) -> Outcome:
    """Runs the study to its number of trials, until a budget is used up, or until the user interrupts.

    `seconds` counts from here; `device_hours` all that the study's trials have trained and evaluated. Raises UserError
    when checkpoints cannot be written.
    """
    store, row = search.store, search.row
    open_folder(search.checkpoints)
    for number in kept(search.checkpoints):
        if store.trial(row, number).state in FINISHED:
            discard(search.checkpoints, number)
    driver = store.start_driver(row, executor.workers)
    _take_over(search, view)
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
                    device_hours is not None and search.device_seconds >= 3600 * device_hours
                )
                stopping = interrupt.count > 0 or spent
                if interrupt.count > told:
                    told = interrupt.count
                    if leased and told == 1:
                        view.message(f"finishing {len(leased)} running trials; once more hands them back unfinished")
                if not stopping:
                    _fill(search, executor, driver, leased, view)
                if not leased and (stopping or search.settled()):
                    break
                if interrupt.count > 1:
                    break
                if leased:
                    search.prefetch(0 if stopping else executor.workers)
                    for event in executor.wait(TICK_SECONDS):
                        _handle(search, executor, event, leased, view)
                else:  # others have the last trials, and may die over them
                    if not waits:
                        view.message("nothing is left to start: waiting for the trials of other drivers")
                    waits = True
                    time.sleep(TICK_SECONDS)
                    search.refresh()
                if time.monotonic() - beat > HEARTBEAT_SECONDS:
                    beat = time.monotonic()
                    store.heartbeat(driver)
                    _take_over(search, view)
                view.tick()
        finally:
            executor.abandon()
            for trial in leased.values():
                store.release(row, trial.number, trial.token, fault=False)
            store.stop_driver(driver)
    return Outcome(
        finished=store.finished(row),
        asked=search.plan.trials,
        interrupted=interrupt.count > 0,
        exhausted=search.exhausted,
        over_budget=spent,
    )


def _take_over(search: Search, view: View) -> None:
    """Trials of drivers that died wait for a worker again."""
    taken = search.store.reclaim(search.row)
    for number in taken:
        view.message(f"trial {number} was left running by a driver that died: it waits for a worker again")
    if taken:
        search.refresh()


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
        seq = store.report(row, event, leased[event.trial].token)
        if seq is None:  # we were silent for so long that another driver took it over
            del leased[event.trial]
            executor.stop(event.trial)
            view.message(f"trial {event.trial} was taken over by another driver")
            view.ended(event.trial, None)
        else:
            search.saw(seq)
            view.reported(event)
    elif isinstance(event, Lost):
        del leased[event.trial]
        store.release(row, event.trial, event.token, fault=not event.preempted)
        view.message(f"trial {event.trial} lost its worker: {event.reason}")
        view.ended(event.trial, None)
        search.refresh()
    elif (parts := _parts_to_try(leased[event.trial], event)) is not None:
        del leased[event.trial]
        discard(search.checkpoints, event.trial)
        store.release(row, event.trial, event.token, fault=False, provenance={"micro_batches": parts})
        view.message(f"trial {event.trial} ran out of memory: once more, with its batches in {parts} parts")
        view.ended(event.trial, None)
        search.refresh()
    else:
        trial = leased.pop(event.trial)
        search.ended(trial, event, store.finish(row, event))
        discard(search.checkpoints, event.trial)
        if event.weights and any(trial.number == event.trial for trial in store.front(row)):
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
