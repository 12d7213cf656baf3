"""Joins a Ray cluster or starts one: its room, its memory, its GPUs, and whether its workers run the same code."""

import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from hypernas.engines.devices import cores
from hypernas.engines.protocol import Event, Lost
from hypernas.engines.session_folder import close_session_folder, open_session_folder
from hypernas.errors import ClusterError, UserError
from hypernas.records import Failure, FailureKind, Job, Result

WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # a worker trains on one thread
WARM_UP_SECONDS = 30.0
ANSWER_SECONDS = 5.0
GROUND = ("errors", "files", "pareto", "records", "version", "yardstick")
COMPUTES = ("data", "kernels", "search_spaces", "training", *GROUND)
SOURCES = (".py", ".cpp", ".h")
STOP_SECONDS = 10.0  # a worker that has not put a stopped job down by then is replaced
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
            # Ray would start a process for each CPU at once, without our settings: none of them could be a worker.
            "RAY_prestart_worker_first_driver": "0",
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
        others = psutil.Process().children(recursive=True)
        try:
            with _sessions_of_their_own(), _signals_as_before():
                ray.init(
                    address="local",
                    _temp_dir=open_session_folder(),
                    num_cpus=workers or cores(),
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    **settings,
                )
        except (KeyboardInterrupt, OSError, RuntimeError) as error:
            started = set(psutil.Process().children(recursive=True)) - set(others)
            ray.shutdown()  # knows nothing yet of a node that was only half started
            _kill(started)
            close_session_folder(crashed=False)
            if isinstance(error, KeyboardInterrupt):
                raise
            # A folder for its sockets that is too long, full or not ours.
            raise UserError(
                f"Ray cannot start here: {error}; where its folder is full, its name too long or not ours, "
                "RAY_TMPDIR=/tmp, say, names it another folder, and --engine inline does without Ray"
            ) from error
    else:
        try:
            with _signals_as_before():
                ray.init(address=address, **settings)
        except ConnectionError as error:
            raise UserError(f"--address {address}: cannot join: {error}") from error
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return _share_out(ray, nodes, workers, gpus_per_trial, own=address is None)
    except UserError:
        shut_down(ray)
        raise


def shut_down(ray: Any, *, crashed: bool = False) -> None:
    """Ends Ray in this process, and a cluster of its own with what that wrote; of one that `crashed` its logs stay."""
    ray.shutdown()
    close_session_folder(crashed=crashed)


@contextmanager
def _sessions_of_their_own() -> Iterator[None]:
    """Ray's servers start in sessions of their own: a signal to the driver's process group, as `timeout`, systemd and
    a supervisor send it, is the driver's alone to answer, which then ends them in order."""
    from ray._private import services as found

    services: Any = found
    popen = services.ConsolePopen
    services.ConsolePopen = partial(popen, start_new_session=True)
    try:
        yield
    finally:
        services.ConsolePopen = popen


@contextmanager
def _signals_as_before() -> Iterator[None]:
    """Ray answers SIGTERM by ending the process at once: here it is as Ctrl-C while Ray starts, and then as before."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if main and callable(before):
            signal.signal(signal.SIGTERM, before)


def _share_out(
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


def cpu_memory(ray: Any) -> float | None:
    """Bytes for each CPU of the roomiest machine that is there; None where no machine says."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return max((node["memory"] / node["CPU"] for node in nodes if node.get("CPU") and "memory" in node), default=None)


def code_hash() -> str:
    """Names the text of what trains: a worker's must be the driver's, or its numbers would not compare."""
    texts = sha256()
    for name in COMPUTES:
        found = find_spec(f"hypernas.{name}")
        assert found is not None and found.origin is not None
        origin = Path(found.origin)
        inside = origin.parent.rglob("*") if found.submodule_search_locations else [origin]
        for path in sorted(path for path in inside if path.suffix in SOURCES):
            texts.update(f"{name}/{path.relative_to(origin.parent).as_posix()}".encode() + path.read_bytes())
    return texts.hexdigest()[:12]


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


def classify_loss(ray: Any, job: Job, error: str, node: str) -> Event:
    """What became of a job whose actor died of `error`: killed for memory, gone with its machine, or dead by itself."""
    text = error.lower()
    if "running low on memory" in text:
        failure = Failure(FailureKind.OUT_OF_MEMORY, "Ray killed its worker: the machine was running low on memory")
        return Result(job.trial, job.token, failure=failure)
    preempted = not node_lives(ray, node) or "preemption" in text or "node has died" in text
    return Lost(job.trial, job.token, "its machine is gone" if preempted else "its process died", preempted)


def check_home(ray: Any, node: str) -> None:
    """Raises ClusterError when this process' own Ray node is gone: no worker would ever be heard of again."""
    if not node_lives(ray, node):
        raise ClusterError("the Ray node of this search died (Ray's logs say why); nothing is lost")


@contextmanager
def home_watched(ray: Any, node: str) -> Iterator[None]:
    """What Ray raises meanwhile because its own servers are gone ("Broken pipe") is said as `check_home` says it."""
    try:
        yield
    except (OSError, ray.exceptions.RayError):
        check_home(ray, node)
        raise


def leave_cluster(ray: Any, node: str, actors: Iterable[Any] = ()) -> None:
    """Ends these actors, Ray in this process, and the cluster that was started for it.

    Without its head's server (GCS) Ray would wait to end an actor, and its node does not end in order: its helpers
    would stay for minutes.
    """
    helpers: list[psutil.Process] = []
    lives = node_lives(ray, node)
    if lives:
        for actor in actors:
            ray.kill(actor)
    else:
        servers = [process for process in psutil.Process().children() if process.name() == "raylet"]
        helpers = [helper for server in servers for helper in server.children(recursive=True)]
    ray.shutdown()
    _kill(helpers)
    close_session_folder(crashed=not lives)


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def node_lives(ray: Any, node: str) -> bool:
    """Whether the Ray node is up: Ray's list says so, and its server answers. The list is seconds late.

    The list is kept by the head's server (GCS). Where that is gone Ray would wait for it for a minute, and then end
    this process: whether it is there is asked first.
    """
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    if _listens(host, int(port)) is not None:
        return False
    entry = next((entry for entry in ray.nodes() if entry["NodeID"] == node and entry["Alive"]), None)
    return entry is not None and _listens(entry["NodeManagerAddress"], entry["NodeManagerPort"]) is None


def _listens(host: str, port: int) -> OSError | None:
    """None when somebody takes connections at the port, otherwise why not."""
    try:
        socket.create_connection((host, port), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        return error
    return None
