"""The engine `tune`: jobs run as the trials of one Ray Tune experiment, for those whose cluster lives in Tune.

A Searcher hands Tune the jobs the driver submits, a TrialScheduler stops those it gives up, a Callback brings back
their events. The study, its sampler and its store stay with the driver: Tune's own folder is scratch, deleted in the
end and never read back. Actors are reused from trial to trial, and Tune's loggers are off.
"""

import logging
import os
import platform
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from hypernas.engines.cluster import (
    STOP_SECONDS,
    WARM_UP_SECONDS,
    check_code,
    check_home,
    classify_loss,
    code_hash,
    cpu_memory,
    join_cluster,
    leave_cluster,
    node_lives,
    ray_node,
    shut_down,
)
from hypernas.engines.devices import check_usable, hide_gpus, place_job, share_of_gpu
from hypernas.engines.protocol import Event, timeout_result
from hypernas.errors import UserError
from hypernas.files import scratch_folder
from hypernas.kernels.processor import keep_freed_memory
from hypernas.records import Job, Result, Seen
from hypernas.training import worker

# Read by Tune when it is imported or starts: no loggers, no change of folder (data paths may be relative), each
# result by itself, no opinion on which metrics there must be.
TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_RESULT_BUFFER_LENGTH": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints on stdout at verbose=0 too
}
CLOSE_SECONDS = 20.0
PATIENCE_SECONDS = 0.1  # Tune's own, between two looks for more to run


@dataclass(frozen=True, slots=True)
class _Started:
    """A job was given to an actor that is there."""

    job: Job
    actor: Any


@dataclass(frozen=True, slots=True)
class _Placed:
    """A new actor's first sign of life, with its first job: the node it is on, the code it runs, and on what."""

    job: Job
    node: str
    machine: str
    code: str
    seen: Seen


@dataclass(frozen=True, slots=True)
class _Ended:
    """Tune is through with the job; of a job without a result, its actor died."""

    job: Job
    error: str


_Heard = _Started | _Placed | _Ended | tuple[Job, Event]


def _name(job: Job) -> tuple[int, int]:
    """One lease of one trial."""
    return job.trial, job.token


@dataclass(slots=True)
class _Running:
    job: Job
    actor: Any = None
    node: str = ""
    deadline: float | None = None  # on the monotonic clock, once it has started
    refused: int = 0  # times it was given to an actor that had died meanwhile


def why_failed(trial: Trial) -> str:
    """What Tune wrote down of a trial's error, as soon as it did: `get_error` reads a copy that is made later."""
    written = trial.error_file and Path(trial.error_file)
    return written.read_text() if written and written.exists() else "its actor ended without a word"


class TunePool:
    """`workers` jobs at a time in one Tune experiment. Raises UserError as the pool of actors does."""

    def __init__(
        self,
        workers: int = 0,
        *,
        address: str | None = None,
        gpus_per_trial: float | None = None,
        timeout: float | None = None,
    ) -> None:
        os.environ.update(TUNE_ENVIRONMENT)
        self._cluster = join_cluster(workers, address, gpus_per_trial)
        self._ray = self._cluster.ray
        self.workers, self.gpus = self._cluster.workers, self._cluster.gpus
        self._home = ray_node()
        self._code = code_hash()
        self.memory = None if self.gpus else cpu_memory(self._ray)
        self.seen: Counter[Seen] = Counter()
        self._ask_one()
        self._timeout = timeout
        self._running: dict[int, _Running] = {}
        self._stopping: dict[tuple[int, int], tuple[_Running, float]] = {}  # killed after the given moment
        self._offers = _Offers(self.workers)
        self._heard: Queue[_Heard] = Queue()
        self._nodes: dict[Any, str] = {}  # by actor
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._experiment, daemon=True)
        self._thread.start()

    def _ask_one(self) -> None:
        """Asks a process with a worker's share of the cluster on what it trains: Tune's own start with their jobs."""
        given = {"num_cpus": self._cluster.cpus, "num_gpus": self.gpus}
        asked = self._ray.remote(**given)(_ready).remote(self.gpus > 0)
        if not self._ray.wait([asked], timeout=WARM_UP_SECONDS)[0]:
            self._ray.cancel(asked)
            return
        try:
            where, found = self._ray.get(asked)
            check_usable(found, where)
        except UserError:
            shut_down(self._ray)
            raise
        except self._ray.exceptions.RayError as error:
            shut_down(self._ray)
            last = str(error).strip().splitlines()[-1]
            raise UserError(f"workers cannot start: {last}; is the same hypernas installed everywhere?") from error
        self.seen[found] = self.workers  # as far as one can tell for all
        if self.gpus:
            self.memory = share_of_gpu(found, self.gpus)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def free(self) -> int:
        """What is left of `workers`: on a cluster that has yet to grow, Tune's own trials ask it for room."""
        return self.workers - self.running

    def submit(self, job: Job) -> None:
        job = place_job(job, self.gpus)
        self._running[job.trial] = _Running(job)
        self._offers.append(job)

    def wait(self, timeout: float) -> list[Event]:
        if self._failed is not None:
            check_home(self._ray, self._home)  # of which the experiment may have heard first
            raise RuntimeError("Ray Tune ended the experiment") from self._failed
        if not self._running:
            return []
        moments = [entry.deadline for entry in self._running.values() if entry.deadline is not None]
        moments += [moment for _, moment in self._stopping.values()]
        if moments:
            timeout = max(0.0, min(timeout, min(moments) - time.monotonic()))
        events: list[Event] = []
        try:
            events += self._take(self._heard.get(timeout=timeout))
            while True:
                events += self._take(self._heard.get_nowait())
        except Empty:
            if not events:
                check_home(self._ray, self._home)
            return events + self._overdue()

    def _take(self, heard: _Heard) -> list[Event]:
        job = heard[0] if isinstance(heard, tuple) else heard.job
        if _name(job) in self._stopping:
            if isinstance(heard, _Started):
                self._stopping[_name(job)][0].actor = heard.actor
            elif isinstance(heard, _Placed):
                self._nodes[self._stopping[_name(job)][0].actor] = heard.node
            elif isinstance(heard, _Ended):
                del self._stopping[_name(job)]
            return []
        entry = self._running.get(job.trial)
        if entry is None or entry.job.token != job.token:
            return []
        if isinstance(heard, _Started):
            entry.actor, entry.node = heard.actor, self._nodes.get(heard.actor, "")
            entry.deadline = time.monotonic() + self._timeout if self._timeout else None
            return []
        if isinstance(heard, _Placed):
            self._nodes[entry.actor] = entry.node = heard.node
            check_code(heard.code, heard.machine, self._code)
            check_usable(heard.seen, heard.machine)
            self.seen |= Counter([heard.seen])
            return []
        if isinstance(heard, _Ended):
            if entry.actor is None and entry.refused < self.workers:
                entry.refused += 1
                self._offers.append(job)
                return []
            del self._running[job.trial]
            return [classify_loss(self._ray, job, heard.error, entry.node)]
        if isinstance(heard[1], Result):
            del self._running[job.trial]
        return [heard[1]]

    def _overdue(self) -> list[Event]:
        now = time.monotonic()
        for name, (entry, moment) in list(self._stopping.items()):
            if now > moment:
                del self._stopping[name]
                self._kill(entry)
        late = [entry for entry in self._running.values() if entry.deadline is not None and now > entry.deadline]
        for entry in late:
            del self._running[entry.job.trial]
            self._kill(entry)
        return [timeout_result(entry.job, self._timeout or 0.0) for entry in late]

    def _kill(self, entry: _Running) -> None:
        if entry.actor is not None:
            self._ray.kill(entry.actor)

    def stop(self, trial: int) -> None:
        entry = self._running.pop(trial, None)
        if entry is None:
            return
        if not self._offers.remove(entry.job):  # Tune has taken it
            self._stopping[_name(entry.job)] = (entry, time.monotonic() + STOP_SECONDS)

    def abandon(self) -> None:
        for trial in list(self._running):
            self.stop(trial)
        while not self._heard.empty():  # an actor whose job has stopped by now is not killed: Tune may use it again
            self._take(self._heard.get())
        for entry, _ in self._stopping.values():
            self._kill(entry)

    def close(self) -> None:
        self.abandon()
        self._offers.close()
        if node_lives(self._ray, self._home):  # without it, Ray may keep the thread waiting for ever
            self._thread.join(CLOSE_SECONDS)
        leave_cluster(self._ray, self._home)

    def _experiment(self) -> None:
        """What the thread does: Tune's own loop, until the pool is closed."""
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        try:
            with scratch_folder(stem="nas-tune-") as folder:
                tune.Tuner(
                    tune.with_resources(_Jobs, {"cpu": self._cluster.cpus, "gpu": self.gpus}),
                    tune_config=tune.TuneConfig(
                        search_alg=self._offers,
                        scheduler=_Stops(self._stopping),
                        num_samples=-1,
                        reuse_actors=True,
                        trial_name_creator=lambda trial: f"trial-{trial.config['job'].trial}",
                        trial_dirname_creator=lambda trial: f"trial-{trial.config['job'].trial}-{trial.trial_id}",
                    ),
                    run_config=tune.RunConfig(
                        storage_path=str(folder),
                        name="jobs",
                        verbose=0,
                        callbacks=[_Events(self._heard)],
                        checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    ),
                ).fit()
        except BaseException as error:  # noqa: BLE001 - it is raised again where the driver waits
            if not self._offers.closed:
                self._failed = error


def _ready(gpu: bool) -> tuple[str, Seen]:
    """Where a process with a worker's share runs, and on what it trains."""
    if not gpu:
        hide_gpus()
    return platform.node(), worker.inspect_device(gpu)


class _Jobs(tune.Trainable):
    """What runs in Tune's actor: each step is the job's next event, but for an actor's first."""

    def setup(self, config: dict[str, Any]) -> None:
        keep_freed_memory()
        self._gpu = config["job"].device != "cpu"
        if not self._gpu:
            hide_gpus()
        worker.warm_up(config["job"].evaluate)
        self._begin(config["job"])
        self._placed = False

    def _begin(self, job: Job) -> None:
        self._job = job
        self._events = worker.run(job)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.let_go()
        self._begin(new_config["job"])
        return True

    def step(self) -> dict[str, Any]:
        if not self._placed:
            self._placed = True
            placed = _Placed(self._job, ray_node(), platform.node(), code_hash(), worker.inspect_device(self._gpu))
            return {"heard": placed, "done": False}
        event = next(self._events)
        ended = isinstance(event, Result)
        if ended:
            self.let_go()
        return {"heard": (self._job, event), "done": ended}

    def let_go(self) -> None:
        """Closes the job so that its model is freed while the actor is idle."""
        self._events.close()

    def cleanup(self) -> None:
        self.let_go()


class _Live:
    """Tune saves its parts to disk, to restore an experiment from; ours go on from the store, and save nothing."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def save(self, checkpoint_path: str) -> None: ...


class _Offers(_Live, Searcher):
    """Hands Tune the jobs as they are submitted.

    A worker that is free waits here for its next. Told that there is none, Tune ends the actors that it has more than
    one of, asks for new ones before it sees those it kept, and with nothing running sleeps a second.
    """

    def __init__(self, workers: int) -> None:
        super().__init__()
        self.closed = False
        self._workers = workers
        self._waiting: deque[Job] = deque()
        self._taken: set[str] = set()  # Tune's trials that have not ended
        self._changed = threading.Condition()

    def append(self, job: Job) -> None:
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()

    def remove(self, job: Job) -> bool:
        """Whether the job was still here."""
        with self._changed:
            here = job in self._waiting
            if here:
                self._waiting.remove(job)
            return here

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify()

    def suggest(self, trial_id: str) -> Any:
        patience = PATIENCE_SECONDS if len(self._taken) < self._workers else 0.0
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self.closed, patience if self._taken else None)
            if self.closed:
                return Searcher.FINISHED
            if not self._waiting:
                return None
            self._taken.add(trial_id)
            return {"job": self._waiting.popleft()}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        self._taken.discard(trial_id)


class _Stops(_Live, FIFOScheduler):
    """Stops the trials whose jobs were given up, at their next sign of life."""

    def __init__(self, stopping: dict[tuple[int, int], Any]) -> None:
        super().__init__()
        self._stopping = stopping

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        # Tune writes down every trial's state, and takes longer over it than a worker to hand over a job.
        trial.get_json_state = lambda: ("{}", "{}")  # type: ignore[method-assign]

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict) -> str:
        if _name(trial.config["job"]) not in self._stopping:
            return str(TrialScheduler.CONTINUE)
        actor: Any = trial.temporary_state.ray_actor
        actor.let_go.remote()
        return str(TrialScheduler.STOP)


class _Events(_Live, tune.Callback):
    """Brings back what jobs send. Tune keeps results for its own files: events are taken out of them."""

    def __init__(self, heard: "Queue[_Heard]") -> None:
        self._heard = heard

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._heard.put(_Started(trial.config["job"], trial.temporary_state.ray_actor))

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict, **info: Any) -> None:
        heard = result.pop("heard", None)
        if heard is not None:
            self._heard.put(heard)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._heard.put(_Ended(trial.config["job"], "it ended without a result"))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._heard.put(_Ended(trial.config["job"], why_failed(trial)))
