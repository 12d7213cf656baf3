"""Engines: they run jobs and hand back events. One small protocol (submit, wait, stop, abandon, close), two forms here.

`ray` keeps a pool of warm Ray actors, one job each at a time; `inline` runs in the driver's own process. The third,
`tune`, has a file of its own.

Of each the same holds: a trial takes `gpus_per_trial` GPUs; None is one where there are any, and CPUs where there are
none. `workers` is how many trials run at once; 0 is as many as there is room for.
"""

import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from hypernas.engines.cluster import (
    STOP_SECONDS,
    WARM_UP_SECONDS,
    check_code,
    check_home,
    classify_loss,
    code_hash,
    cpu_memory,
    home_watched,
    join_cluster,
    leave_cluster,
    ray_node,
)
from hypernas.engines.devices import check_usable, hide_gpus, place_job, share_of_gpu
from hypernas.engines.protocol import Event, Started, timeout_result
from hypernas.errors import UserError
from hypernas.kernels.processor import keep_freed_memory
from hypernas.records import Job, Result, Seen
from hypernas.training import worker

START_ATTEMPTS = 3  # of each worker
CONTROL = "control"  # the concurrency group of what must not wait for a job


@dataclass(slots=True)
class _Slot:
    """One warm actor, and the job it runs."""

    actor: Any
    ready: Any  # the promise that the actor is warm; None once it is
    job: Job | None = None
    events: Any = None  # the job's ObjectRefGenerator
    node: str = ""  # where its last job started
    deadline: float | None = None  # on the monotonic clock, once the job has started
    seen: Seen | None = None  # what its actor trains on, once it is warm
    stopped: bool = False  # its last job was stopped, and none has started since
    stop_deadline: float | None = None  # monotonic: past it, an actor that its stopped job still holds is replaced


class RayPool:
    """A pool of Ray actors, warm for jobs of `evaluate`. Joins the cluster at `address`, or starts one on loopback.

    Raises UserError when there is no cluster at the address, or none of its nodes can hold a worker.
    """

    def __init__(
        self,
        workers: int = 0,
        *,
        address: str | None = None,
        gpus_per_trial: float | None = None,
        timeout: float | None = None,
        evaluate: str = "training",
    ) -> None:
        joined = join_cluster(workers, address, gpus_per_trial)
        self._ray = ray = joined.ray
        self.workers, self.gpus = joined.workers, joined.gpus
        self.memory = None if self.gpus else cpu_memory(ray)  # of a GPU, its worker knows how much it has
        self._home = ray_node()
        self._timeout = timeout
        self._actor_class = ray.remote(
            num_cpus=joined.cpus,
            num_gpus=joined.gpus,
            max_restarts=0,
            concurrency_groups={CONTROL: 1},  # a stop reaches the actor while a job runs
        )(_Worker)
        self._code, self._evaluate = code_hash(), evaluate
        self._failures = 0  # of workers to start, since one did
        self._slots = [_Slot(*self._new_actor()) for _ in range(self.workers)]
        # Warm before the first job. On a cluster that has yet to grow, the others are taken up as they come.
        until = time.monotonic() + WARM_UP_SECONDS
        try:
            while self.free < self.workers and (left := until - time.monotonic()) > 0:
                self._warm(left)
        except (UserError, KeyboardInterrupt):
            self.close()
            raise

    @property
    def seen(self) -> Mapping[Seen, int]:
        return Counter(slot.seen for slot in self._slots if slot.seen is not None)

    def resources(self) -> dict[str, float]:
        """CPUs, GPUs and bytes of memory of the cluster."""
        found = self._ray.cluster_resources()
        return {name: found[name] for name in ("CPU", "GPU", "memory") if name in found}

    def _new_actor(self) -> tuple[Any, Any]:
        actor = self._actor_class.remote(self.gpus > 0, self._evaluate)
        return actor, actor.ready.remote()

    def _warm(self, timeout: float) -> None:
        """Notes which workers have become ready; waits for the first. Raises UserError when none can start."""
        coming = {slot.ready: slot for slot in self._slots if slot.ready is not None}
        ready, _ = self._ray.wait(list(coming), num_returns=1, timeout=timeout) if coming else ([], [])
        if coming and not ready and timeout:
            check_home(self._ray, self._home)
        for promise in ready:
            slot = coming[promise]
            try:
                code, where, found = self._ray.get(promise)
            except self._ray.exceptions.RayError as error:
                self._failures += 1
                if self._failures > START_ATTEMPTS * self.workers:
                    last = str(error).strip().splitlines()[-1]
                    raise UserError(
                        f"workers cannot start: {last}; is the same hypernas installed everywhere?"
                    ) from error
                self._replace(slot)
                continue
            check_code(code, where, self._code)
            check_usable(found, where)
            slot.ready, slot.seen, self._failures = None, found, 0
            if (share := share_of_gpu(found, self.gpus)) is not None:
                self.memory = max(self.memory or 0.0, share)

    @property
    def running(self) -> int:
        return sum(slot.job is not None for slot in self._slots)

    @property
    def free(self) -> int:
        return sum(slot.job is None and slot.ready is None for slot in self._slots)

    def submit(self, job: Job) -> None:
        with home_watched(self._ray, self._home):
            self._submit(job)

    def _submit(self, job: Job) -> None:
        idle = [slot for slot in self._slots if slot.job is None]
        slot = next((slot for slot in idle if slot.ready is None), idle[0])
        slot.job, slot.deadline = job, None
        slot.stop_deadline = time.monotonic() + STOP_SECONDS if slot.stopped else None
        slot.events = slot.actor.run.remote(place_job(job, self.gpus))

    def wait(self, timeout: float) -> list[Event]:
        with home_watched(self._ray, self._home):
            return self._wait(timeout)

    def _wait(self, timeout: float) -> list[Event]:
        busy = {slot.events: slot for slot in self._slots if slot.job is not None}
        self._warm(0.0 if busy else timeout)
        if not busy:
            return []
        deadlines = [t for slot in busy.values() for t in (slot.deadline, slot.stop_deadline) if t is not None]
        if deadlines:
            timeout = max(0.0, min(timeout, min(deadlines) - time.monotonic()))
        ready, _ = self._ray.wait(list(busy), num_returns=1, timeout=timeout)
        if ready:  # and whatever else has arrived meanwhile
            ready, _ = self._ray.wait(list(busy), num_returns=len(busy), timeout=0)
        elif timeout:
            check_home(self._ray, self._home)
        events = [event for stream in ready if (event := self._next(busy[stream])) is not None]
        return events + self._overdue()

    def _next(self, slot: _Slot) -> Event | None:
        job = slot.job
        assert job is not None
        try:
            event: Started | Event = self._ray.get(next(slot.events))
        except (self._ray.exceptions.RayError, StopIteration) as error:
            node = slot.node
            self._replace(slot)
            return classify_loss(self._ray, job, str(error), node)
        if isinstance(event, Started):
            slot.node = event.node
            slot.deadline = time.monotonic() + self._timeout if self._timeout else None
            slot.stopped, slot.stop_deadline = False, None
            return None
        if isinstance(event, Result):
            slot.job = slot.events = None
        return event

    def _overdue(self) -> list[Event]:
        out: list[Event] = []
        now = time.monotonic()
        for slot in self._slots:
            if slot.job is None:
                continue
            if slot.deadline is not None and now > slot.deadline:
                out.append(timeout_result(slot.job, self._timeout or 0.0))
                self._replace(slot)
            elif slot.stop_deadline is not None and now > slot.stop_deadline:
                job = slot.job
                self._replace(slot)
                slot.job, slot.events = job, slot.actor.run.remote(place_job(job, self.gpus))
        return out

    def _replace(self, slot: _Slot) -> None:
        """A new process in place of a dead or overdue one."""
        self._ray.kill(slot.actor)
        slot.actor, slot.ready = self._new_actor()
        slot.job, slot.events, slot.seen = None, None, None
        slot.stopped, slot.stop_deadline, slot.deadline = False, None, None

    def stop(self, trial: int) -> None:
        for slot in self._slots:
            if slot.job is not None and slot.job.trial == trial:
                slot.actor.stop.options(concurrency_group=CONTROL).remote(trial, slot.job.token)
                slot.job, slot.events, slot.deadline, slot.stop_deadline, slot.stopped = None, None, None, None, True

    def abandon(self) -> None:
        with home_watched(self._ray, self._home):
            for slot in self._slots:
                if slot.job is not None:
                    self._replace(slot)

    def close(self) -> None:
        leave_cluster(self._ray, self._home, [slot.actor for slot in self._slots])


class _Worker:
    """What runs in the actor's process: one job after the other, and beside it whatever stops one."""

    def __init__(self, gpu: bool, evaluate: str) -> None:
        if not gpu:
            hide_gpus()
        self._gpu = gpu
        keep_freed_memory()
        worker.warm_up(evaluate)
        self._stopped: set[tuple[int, int]] = set()  # (trial, token) of jobs to put down

    def ready(self) -> tuple[str, str, Seen]:
        """The code that this process runs, where, and on what."""
        return code_hash(), platform.node(), worker.inspect_device(self._gpu)

    def run(self, job: Job) -> Iterator[Started | Event]:
        name = (job.trial, job.token)
        if name not in self._stopped:
            yield Started(job.trial, ray_node())
            with closing(worker.run(job)) as events:  # closing a job frees its model
                for event in events:
                    if name in self._stopped:
                        break
                    yield event
        self._stopped.discard(name)

    def stop(self, trial: int, token: int) -> None:
        self._stopped.add((trial, token))
