"""What every engine does: jobs go in, events come out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from hypernas.records import Failure, FailureKind, Job, Notice, Progress, Report, Result, Seen


@dataclass(frozen=True, slots=True)
class Started:
    """A worker took up its job; the clock of its timeout runs from here."""

    trial: int
    node: str  # the Ray node it is on


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker died under its job; the job may run elsewhere. `preempted` when its whole machine went away."""

    trial: int
    token: int
    reason: str
    preempted: bool = False


Event = Notice | Progress | Report | Result | Lost


class Executor(Protocol):
    workers: int
    gpus: float  # that a trial takes; 0: it trains on CPUs
    memory: float | None  # bytes that a trial may use on the roomiest machine; None where that is not known

    @property
    def seen(self) -> Mapping[Seen, int]:
        """What the workers that are there train on, and how many of them."""
        ...

    @property
    def running(self) -> int:
        """Jobs submitted and not ended."""
        ...

    @property
    def free(self) -> int:
        """Jobs that would start at once if they were submitted now."""
        ...

    def submit(self, job: Job) -> None:
        """Starts a job. Call only while `running < workers`; where nothing is free, the job waits for its worker."""
        ...

    def wait(self, timeout: float) -> list[Event]:
        """Events since the last call; waits up to `timeout` seconds for the first, or for a worker that is to come.

        Raises UserError when workers cannot start, or never will.
        """
        ...

    def stop(self, trial: int) -> None:
        """Ends the trial's job without further events. Its worker is free at once, and its memory is given back.

        Does nothing when no such job runs (it may have ended meanwhile).
        """
        ...

    def abandon(self) -> None:
        """Stops every running job, without events."""
        ...

    def close(self) -> None: ...


def timeout_result(job: Job, seconds: float) -> Result:
    message = f"killed after --trial-timeout {seconds:g} seconds"
    failure = Failure(FailureKind.TIMEOUT, message)
    return Result(job.trial, job.token, train_seconds=seconds, failure=failure)
