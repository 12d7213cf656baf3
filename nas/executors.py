"""Engines: they run jobs and hand back events. One small protocol (submit, wait, stop, abandon, close), two forms here.

`ray` keeps a pool of warm Ray actors, one job each at a time; `inline` runs in the driver's own process. The third,
`tune`, has a file of its own.

Of each the same holds: a trial takes `gpus_per_trial` GPUs; None is one where there are any, and CPUs where there are
none. `workers` is how many trials run at once; 0 is as many as there is room for.
"""

import os
import platform
import secrets
import socket
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch

from hypernas import worker
from hypernas.config import check_gpus
from hypernas.errors import UserError
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


class Inline:
    """One job at a time in this process: for tests and debugging. A timeout is noticed between a job's events.

    Raises UserError when a GPU is asked for that is not here, or cannot be used.
    """

    workers = 1
    memory: float | None = None

    def __init__(self, timeout: float | None = None, gpus_per_trial: float | None = None) -> None:
        self.gpus, found = own_device(gpus_per_trial)
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
        self._current = (job, worker.run(placed(job, self.gpus)), time.monotonic())

    def wait(self, timeout: float) -> list[Event]:
        if self._current is None:
            return []
        job, events, started = self._current
        event = next(events)
        if self._timeout and not isinstance(event, Result) and time.monotonic() - started > self._timeout:
            event = timed_out(job, self._timeout)
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


def own_device(gpus: float | None) -> tuple[float, Seen]:
    """How many GPUs this process trains on, none or one, and what it sees. Raises UserError as `Inline` does."""
    found = worker.seen(gpu=gpus != 0)
    check_usable(found, platform.node())
    if gpus and found.device == "cpu":
        raise UserError(f"--gpus-per-trial {gpus:g}: torch sees no GPU here; --gpus-per-trial 0 asks for CPUs")
    if gpus is not None and gpus > 1:
        raise UserError(f"--gpus-per-trial {gpus:g}: one process trains on one GPU; wanted 1, or 0 for CPUs")
    return (0.0 if found.device == "cpu" else 1.0), found


def asked_device(gpus: float | None) -> torch.device:
    """Where a command of one process works, by its --gpus-per-trial. Raises UserError for a GPU that is not there."""
    check_gpus(gpus)
    return torch.device("cuda" if own_device(gpus)[0] else "cpu")


def placed(job: Job, gpus: float) -> Job:
    """The job for a worker of so many GPUs: without any, it trains on the CPU whatever its process sees."""
    return job if gpus else replace(job, device="cpu")


def timed_out(job: Job, seconds: float) -> Result:
    message = f"killed after --trial-timeout {seconds:g} seconds"
    failure = Failure(FailureKind.TIMEOUT, message)
    return Result(job.trial, job.token, train_seconds=seconds, failure=failure)


WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # a worker trains on one thread
WARM_UP_SECONDS = 30.0
ANSWER_SECONDS = 5.0
# Of nas.
TRAINING = (
    "worker", "repeats", "train", "cuda_graph", "inherit", "tasks", "data", "images", "measure", "checkpoints",
    "records",
)  # fmt: skip
START_ATTEMPTS = 3  # of each worker
STOP_SECONDS = 10.0  # a worker that has not put a stopped job down by then is replaced
CONTROL = "control"  # the concurrency group of what must not wait for a job
OBJECT_STORE_BYTES = 256 << 20  # holds the weights of finished trials on their way to the driver


def _check_answers(address: str) -> None:
    """Raises UserError when nobody listens at HOST:PORT: Ray itself would wait for minutes."""
    host, colon, port = address.rpartition(":")
    if address == "auto":
        return
    if address.startswith("ray://"):
        raise UserError(
            f"--address {address}: Ray Client cannot stream a trial's reports; start the search on a machine of the "
            "cluster with --address auto, or give the head's own HOST:PORT"
        )
    if not colon or not port.isdigit():
        raise UserError(f"--address {address!r}: wanted auto or HOST:PORT")
    error = _listens(host, int(port))
    if error is not None:
        raise UserError(
            f"--address {address}: no Ray cluster answers there ({error.strerror or error}); "
            "start one with `ray start --head`, or leave the flag out for a local one"
        ) from error


def set_environment(own_cluster: bool) -> None:
    """Ray's settings, which it reads from the environment once, when it is first imported."""
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # We report lost workers ourselves; Ray would print a paragraph on stdout for each.
        "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed",
    }
    if own_cluster and "ray" not in sys.modules:
        settings |= {
            # Ray's switch for laptops: every server of the cluster listens on loopback alone.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            # A cluster of our own takes no work from anybody else on this machine.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Ray cluster that was joined, how many workers it is to run, and what each takes of it."""

    ray: Any
    workers: int
    cpus: float
    gpus: float


def join_cluster(workers: int, address: str | None, gpus_per_trial: float | None) -> Cluster:
    """Connects to the cluster at `address`, or to one started on loopback for this process.

    Raises UserError when there is no cluster at the address, none of its nodes can hold a worker, or a cluster of our
    own, which never grows, cannot hold them all.
    """
    if address is not None:
        _check_answers(address)
    set_environment(own_cluster=address is None)
    import ray

    settings: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "namespace": "hypernas",
        "runtime_env": {"env_vars": WORKER_ENVIRONMENT},
    }
    if address is None:
        ray.init(
            address="local",
            num_cpus=workers or cores(),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            **settings,
        )
    else:
        try:
            ray.init(address=address, **settings)
        except ConnectionError as error:
            raise UserError(f"--address {address}: cannot join: {error}") from error
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return _shared_out(ray, nodes, workers, gpus_per_trial, own=address is None)
    except UserError:
        ray.shutdown()
        raise


def _shared_out(
    ray: Any, nodes: list[Mapping[str, float]], workers: int, gpus_per_trial: float | None, *, own: bool
) -> Cluster:
    """What workers take of these nodes, and how many there are room for, unless `workers` says how many are wanted."""
    most = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
    gpus = float(most >= 1) if gpus_per_trial is None else gpus_per_trial
    if gpus > most:
        has = "this machine has" if own else "the largest node has"
        raise UserError(f"--gpus-per-trial {gpus:g}: {has} {most:g} GPUs; --gpus-per-trial 0 asks for CPUs")
    # Nobody else uses a cluster of our own: its GPUs may be shared by more workers than there are CPUs.
    cpus = 0.0 if own and gpus else 1.0
    room = sum(_fitting(node, cpus, gpus) for node in nodes)
    if own and workers > room:
        raise UserError(
            f"--workers {workers} (given, or what the study ran on last): with --gpus-per-trial {gpus:g} this machine "
            f"has room for {room}; give fewer workers, a smaller --gpus-per-trial, or 0 for CPUs"
        )
    return Cluster(ray, workers or max(1, room), cpus, gpus)


def _fitting(node: Mapping[str, float], cpus: float, gpus: float) -> int:
    """Workers that a node has room for. A share of a GPU is always of one."""
    if not gpus:
        return int(node.get("CPU", 0.0))
    whole = node.get("GPU", 0.0)
    # Ray counts shares in ten thousandths.
    by_gpu = int(whole / gpus) if gpus >= 1 else int(whole) * int(1 / round(gpus, 4) + 1e-9)
    return min(by_gpu, int(node.get("CPU", 0.0))) if cpus else by_gpu


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hide_gpus() -> None:
    """For a worker's process that asked for no GPU, before it first looks for one: Ray hides none from it."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def cpu_memory(ray: Any) -> float | None:
    """Bytes for each CPU of the roomiest machine that is there; None where no machine says."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return max((node["memory"] / node["CPU"] for node in nodes if node.get("CPU") and "memory" in node), default=None)


def share_of_gpu(found: Seen, gpus: float) -> float | None:
    """Bytes of a GPU that a worker has for its trial; None without one."""
    return None if found.memory is None else found.memory * min(1.0, gpus)


def check_usable(found: Seen, where: str) -> None:
    """Raises UserError when a worker was given a GPU that it cannot use."""
    if found.problem:
        raise UserError(
            f"the GPU of {where} cannot be used ({found.problem}): see nas doctor there, or use its CPUs with "
            "--gpus-per-trial 0"
        )


SHARES = {1 / 2: "half of ", 1 / 3: "a third of ", 1 / 4: "a quarter of ", 1 / 8: "an eighth of "}


def on_what(executor: Executor) -> str:
    """What runs the trials: "8 workers, each on one NVIDIA H100", "2 workers on CPU cores"."""

    def counted(count: int) -> str:
        return f"{count} worker{'s' if count > 1 else ''}"

    def device(name: str) -> str:
        if executor.gpus > 1:
            return f"{executor.gpus:g} {name}"
        return f"{'' if executor.gpus == 1 else SHARES.get(executor.gpus, f'{executor.gpus:g} of ')}one {name}"

    names: Counter[str] = Counter()
    for found, count in executor.seen.items():
        names[found.device] += count
    parts = []
    for name, count in names.items():
        if executor.gpus == 0:
            parts.append(f"{counted(count)} on {'CPU cores' if count > 1 else 'a CPU core'}")
        elif name == "cpu":
            parts.append(f"{counted(count)}, each with {device('GPU')} that torch does not see, so on CPU cores")
        else:
            parts.append(f"{counted(count)}, each on {device(name)}")
    missing = executor.workers - names.total()
    if missing > 0:
        parts.append(f"{counted(missing)} yet to come, {'each with ' + device('GPU') if executor.gpus else 'on CPUs'}")
    return "; ".join(parts).replace("1 worker, each", "1 worker")


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
    patience: float | None = None  # on the monotonic clock: until then a stopped job must have made room for this one


class RayPool:
    """A pool of warm Ray actors. Joins the cluster at `address`, or starts one on loopback for this process.

    Raises UserError when there is no cluster at the address, or none of its nodes can hold a worker.
    """

    def __init__(
        self,
        workers: int = 0,
        *,
        address: str | None = None,
        gpus_per_trial: float | None = None,
        timeout: float | None = None,
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
        self._code = code_hash()
        self._failures = 0  # of workers to start, since one did
        self._slots = [_Slot(*self._new_actor()) for _ in range(self.workers)]
        # Warm before the first job. On a cluster that has yet to grow, the others are taken up as they come.
        until = time.monotonic() + WARM_UP_SECONDS
        try:
            while self.free < self.workers and (left := until - time.monotonic()) > 0:
                self._warm(left)
        except UserError:
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
        actor = self._actor_class.remote(self.gpus > 0)
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
        idle = [slot for slot in self._slots if slot.job is None]
        slot = next((slot for slot in idle if slot.ready is None), idle[0])
        slot.job, slot.deadline = job, None
        slot.patience = time.monotonic() + STOP_SECONDS if slot.stopped else None
        slot.events = slot.actor.run.remote(placed(job, self.gpus))

    def wait(self, timeout: float) -> list[Event]:
        busy = {slot.events: slot for slot in self._slots if slot.job is not None}
        self._warm(0.0 if busy else timeout)
        if not busy:
            return []
        deadlines = [t for slot in busy.values() for t in (slot.deadline, slot.patience) if t is not None]
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
            return lost(self._ray, job, str(error), node)
        if isinstance(event, Started):
            slot.node = event.node
            slot.deadline = time.monotonic() + self._timeout if self._timeout else None
            slot.stopped, slot.patience = False, None
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
                out.append(timed_out(slot.job, self._timeout or 0.0))
                self._replace(slot)
            elif slot.patience is not None and now > slot.patience:
                job = slot.job
                self._replace(slot)
                slot.job, slot.events = job, slot.actor.run.remote(placed(job, self.gpus))
        return out

    def _replace(self, slot: _Slot) -> None:
        """A new process in place of a dead or overdue one."""
        self._ray.kill(slot.actor)
        slot.actor, slot.ready = self._new_actor()
        slot.job, slot.events, slot.seen = None, None, None
        slot.stopped, slot.patience, slot.deadline = False, None, None

    def stop(self, trial: int) -> None:
        for slot in self._slots:
            if slot.job is not None and slot.job.trial == trial:
                slot.actor.stop.options(concurrency_group=CONTROL).remote(trial, slot.job.token)
                slot.job, slot.events, slot.deadline, slot.patience, slot.stopped = None, None, None, None, True

    def abandon(self) -> None:
        for slot in self._slots:
            if slot.job is not None:
                self._replace(slot)

    def close(self) -> None:
        for slot in self._slots:
            self._ray.kill(slot.actor)
        self._ray.shutdown()


class _Worker:
    """What runs in the actor's process: one job after the other, and beside it whatever stops one."""

    def __init__(self, gpu: bool) -> None:
        if not gpu:
            hide_gpus()
        self._gpu = gpu
        import hypernas.train  # noqa: F401 - imports torch now, so that the first job finds it warm
        from hypernas.kernels._cpu import keep_freed_memory

        keep_freed_memory()

        self._stopped: set[tuple[int, int]] = set()  # (trial, token) of jobs to put down

    def ready(self) -> tuple[str, str, Seen]:
        """The code that this process runs, where, and on what."""
        return code_hash(), platform.node(), worker.seen(self._gpu)

    def run(self, job: Job) -> Iterator[Started | Event]:
        name = (job.trial, job.token)
        if name not in self._stopped:
            yield Started(job.trial, ray_node())
            with closing(worker.run(job)) as events:  # closed, a job lets go of its model
                for event in events:
                    if name in self._stopped:
                        break
                    yield event
        self._stopped.discard(name)

    def stop(self, trial: int, token: int) -> None:
        self._stopped.add((trial, token))


def code_hash() -> str:
    """Names the text of what trains: a worker's must be the driver's, or its numbers would not compare."""
    root = Path(__file__).parent.parent
    files = [*(root / "kernels").rglob("*.py"), *(root / "search_spaces").rglob("*.py")]
    files += [root / "nas" / f"{name}.py" for name in TRAINING]
    return sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:12]


def check_code(found: str, where: str, ours: str) -> None:
    """Raises UserError when the workers of a machine run other code than this search."""
    if found != ours:
        raise UserError(
            f"the workers on {where} run other code of hypernas ({found}) than this search ({ours}): "
            "install the same version everywhere"
        )


def ray_node() -> str:
    """The Ray node that the caller runs on."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def lost(ray: Any, job: Job, error: str, node: str) -> Event:
    """What became of a job whose actor died of `error`: killed for memory, gone with its machine, or dead by itself."""
    text = error.lower()
    if "running low on memory" in text:
        failure = Failure(FailureKind.OUT_OF_MEMORY, "Ray killed its worker: the machine was running low on memory")
        return Result(job.trial, job.token, failure=failure)
    preempted = not node_lives(ray, node) or "preemption" in text or "node has died" in text
    return Lost(job.trial, job.token, "its machine is gone" if preempted else "its process died", preempted)


def check_home(ray: Any, node: str) -> None:
    """Raises UserError when this process' own Ray node is gone: no worker would ever be heard of again."""
    if not node_lives(ray, node):
        raise UserError("the Ray node of this search died (ray's logs say why); nothing is lost: --resume goes on")


def node_lives(ray: Any, node: str) -> bool:
    """Whether the Ray node is up: Ray's list says so, and its server answers. The list is seconds late."""
    entry = next((entry for entry in ray.nodes() if entry["NodeID"] == node and entry["Alive"]), None)
    return entry is not None and _listens(entry["NodeManagerAddress"], entry["NodeManagerPort"]) is None


def _listens(host: str, port: int) -> OSError | None:
    """None when somebody takes connections at the port, otherwise why not."""
    try:
        socket.create_connection((host, port), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        return error
    return None


def make_executor(
    engine: str, workers: int, *, address: str | None, gpus_per_trial: float | None, timeout: float | None
) -> Executor:
    """`ray`, `tune` or `inline`. Raises UserError as the pools do."""
    if engine == "inline":
        return Inline(timeout, gpus_per_trial)
    if engine == "tune":
        set_environment(own_cluster=address is None)
        from hypernas.tune import TunePool

        return TunePool(workers, address=address, gpus_per_trial=gpus_per_trial, timeout=timeout)
    return RayPool(workers, address=address, gpus_per_trial=gpus_per_trial, timeout=timeout)
