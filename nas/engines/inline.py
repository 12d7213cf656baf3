"""The engine `inline`: one job at a time in this process, for tests and debugging."""

import time
from collections.abc import Generator, Mapping

from hypernas.engines.devices import machine_memory, own_device, place_job
from hypernas.engines.protocol import Event, timeout_result
from hypernas.records import Job, Result, Seen
from hypernas.training import worker


class Inline:
    """One job at a time in this process: for tests and debugging. A timeout is noticed between a job's events.

    Raises UserError when a GPU is asked for that is not here, or cannot be used.
    """

    workers = 1

    def __init__(self, timeout: float | None = None, gpus_per_trial: float | None = None) -> None:
        self.gpus, found = own_device(gpus_per_trial)
        self.memory = None if self.gpus else machine_memory()
        self.seen: Mapping[Seen, int] = {found: 1}
        self._timeout = timeout
        self._current: tuple[Job, Generator[worker.Event], float] | None = None

    @property
    def running(self) -> int:
        return int(self._current is not None)

    @property
    def free(self) -> int:
        return 1 - self.running

    def submit(self, job: Job) -> None:
        self._current = (job, worker.run(place_job(job, self.gpus)), time.monotonic())

    def wait(self, timeout: float) -> list[Event]:
        if self._current is None:
            return []
        job, events, started = self._current
        event = next(events)
        if self._timeout and not isinstance(event, Result) and time.monotonic() - started > self._timeout:
            event = timeout_result(job, self._timeout)
        if isinstance(event, Result):
            self._current = None
        return [event]

    def stop(self, trial: int) -> None:
        if self._current is not None and self._current[0].trial == trial:
            self._current[1].close()
            self._current = None

    def abandon(self) -> None:
        self._current = None

    def close(self) -> None:
        self._current = None
