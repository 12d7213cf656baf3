"""The frozen values that cross a border: driver to worker, worker to driver, store to reader.

A leaf module: it imports nothing of ours, so what runs remotely can use it without pulling in the search.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from enum import StrEnum
from functools import cache
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

RUNGS = (1 / 8, 1 / 4, 1 / 2, 1.0)  # shares of the training at which a trial is evaluated

# What an evaluation may be named instead of module:function. Studies keep these names, which outlive modules.
EVALUATIONS = {"training": "hypernas.training.evaluate:evaluate", "trivial": "hypernas.bench.trivial:evaluate"}
OWN = "own"  # what a study keeps of any other: it names no code for others to run


class State(StrEnum):
    """A trial's life: WAITING -> RUNNING -> COMPLETE | STOPPED | FAILED."""

    WAITING = "WAITING"
    RUNNING = "RUNNING"
    COMPLETE = "COMPLETE"
    STOPPED = "STOPPED"
    FAILED = "FAILED"


CONSTRAINT = "constraints:"  # how the names of a trial's constraints start among its sampler's attributes
IMPORTED = "imported"  # the origin of a trial that Optuna ran
FINISHED = (State.COMPLETE, State.STOPPED, State.FAILED)


class FailureKind(StrEnum):
    """Why a trial failed. `worker_lost` and `preempted` are never the architecture's fault."""

    OUT_OF_MEMORY = "out_of_memory"
    DIVERGED = "diverged"
    BUILD_ERROR = "build_error"
    TIMEOUT = "timeout"
    WORKER_LOST = "worker_lost"
    PREEMPTED = "preempted"
    OVER_LIMIT = "over_limit"
    ERROR = "error"


class Policy(StrEnum):
    """What becomes of a trial that failed in one way."""

    RETRY = "retry"  # another worker takes it up; it was not to blame, or not yet
    SHRINK = "shrink"  # once more, with each batch in twice as many parts
    TEACH = "teach"  # it failed for what it is: the sampler hears that it scored as badly as can be
    QUARANTINE = "quarantine"  # set aside, never proposed again, and no lesson for the sampler


POLICIES = {
    FailureKind.OUT_OF_MEMORY: Policy.SHRINK,
    FailureKind.DIVERGED: Policy.TEACH,
    FailureKind.BUILD_ERROR: Policy.QUARANTINE,
    FailureKind.TIMEOUT: Policy.TEACH,
    FailureKind.WORKER_LOST: Policy.RETRY,  # MAX_LOST times, then when all else is done, then with the next --resume
    FailureKind.PREEMPTED: Policy.RETRY,  # as often as it takes
    FailureKind.OVER_LIMIT: Policy.TEACH,
    FailureKind.ERROR: Policy.QUARANTINE,
}


@dataclass(frozen=True, slots=True)
class SpaceSpec:
    """How a worker rebuilds the study's space: its name and the `--set` restrictions.

    `own` says that whoever runs this named it, so that its code may be imported; no store and no file can say so.
    """

    name: str
    settings: Mapping[str, str] = field(default_factory=dict)
    own: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a trial is trained. Tokens for text; the same fields serve images, counted in images."""

    learning_rate: float
    optimizer: str = "adamw"
    weight_decay: float = 0.1
    schedule: str = "cosine"
    tokens: int = 1_000_000
    batch_tokens: int = 4096
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Inheritance:
    """The parent whose trained weights a trial starts from: kept ones, or else the job that trains them again."""

    trial: int
    arch: Mapping[str, Any]
    change: str  # what the child has that its parent had not, like "d_model 64 -> 96"
    weights: bytes | None = field(repr=False)  # a safetensors file
    job: "Job | None"


@dataclass(frozen=True, slots=True)
class Job:
    """One trial as a worker sees it: everything needed to train it, nothing about the study."""

    study: str
    trial: int
    token: int  # fencing: a result with an older token than the row's is thrown away
    space: SpaceSpec
    arch: Mapping[str, Any]
    recipe: Recipe
    data_path: str | None
    data_hash: str
    data_seed: int
    kernels: str = "auto"
    compile: bool = False
    device: str = "auto"  # auto: the GPU of the process that trains, if it has one; cpu: its CPU all the same
    measured: tuple[str, ...] = ()  # objectives that take measuring: latency_ms, peak_bytes
    max_latency_ms: float | None = None  # over it, the trial fails
    repeats: int = 1  # seeds to train with, from the recipe's on; the values are their means
    micro_batches: int = 1  # parts a batch is trained in, so that it fits into memory
    yardstick: Mapping[str, Any] | None = None  # nas.scaling.Yardstick of the baseline, where `ceg` is an objective
    checkpoint: str | None = None  # the file that a rung's state goes to, and training resumes from
    inherits: Inheritance | None = None  # None: initial weights are drawn
    evaluate: str = "training"  # of EVALUATIONS, or module:function(job) -> Progress, Notice, Report and one Result


@dataclass(frozen=True, slots=True)
class Seen:
    """What a worker trains on, as its process sees it and as its trials' rows will say."""

    device: str  # "cpu", or the GPU's name
    precision: str
    memory: float | None = None  # bytes of the whole GPU
    problem: str = ""  # why the GPU that it was given cannot be used


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a running trial is; shown, never stored."""

    trial: int
    share: float  # of its training, 0 to 1
    loss: float


@dataclass(frozen=True, slots=True)
class Notice:
    """What the user should know of a running trial though it goes on; shown, never stored."""

    trial: int
    message: str


@dataclass(frozen=True, slots=True)
class Report:
    """One point of the learning curve, measured on the fixed validation windows."""

    trial: int
    rung: int
    step: int
    tokens: int  # or images
    training_flops: float
    loss: float
    seconds: float  # of training and evaluation so far


@dataclass(frozen=True, slots=True)
class Failure:
    kind: FailureKind
    message: str
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """How a trial ended on its worker: values, or a failure."""

    trial: int
    token: int
    values: Mapping[str, float] = field(default_factory=dict)  # every measured value, objectives among them
    parameters: int = 0
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    provenance: Mapping[str, Any] = field(default_factory=dict)  # versions, threads, back end, CPU flags
    diagnostics: Mapping[str, Any] = field(default_factory=dict)  # gate rates by layer and the like
    weights: bytes = field(default=b"", repr=False)  # a safetensors file
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Trial:
    """One row of the store."""

    number: int
    state: State
    params: Mapping[str, Any]
    arch: Mapping[str, Any]
    arch_hash: str
    recipe: Recipe
    origin: str  # baseline, enqueued, sampler, sweep or imported
    sampler_attrs: Mapping[str, Any]
    token: int
    attempts: int
    values: Mapping[str, float]
    parameters: int | None
    driver: int | None
    worker: str | None
    created: datetime
    started: datetime | None
    finished: datetime | None
    train_seconds: float | None
    evaluate_seconds: float | None
    provenance: Mapping[str, Any]
    diagnostics: Mapping[str, Any]
    failure: Failure | None
    seq: int  # grows with every change of any trial: readers ask for what is newer


def is_lost(trial: Trial) -> bool:
    """Whether the trial failed for its workers' sake: nothing is known of its architecture, and it is tried again."""
    return trial.failure is not None and POLICIES[trial.failure.kind] == Policy.RETRY


def name_trials(numbers: Sequence[int]) -> str:
    """`trial 3`, `trials 3, 5`."""
    return f"trial{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def violation(trial: Trial) -> float:
    """By how much the trial's constraints are violated, summed; 0 for a feasible one."""
    values = [value for name, value in trial.sampler_attrs.items() if name.startswith(CONSTRAINT)]
    return float(sum(value for value in values if isinstance(value, int | float) and value > 0))


@dataclass(frozen=True, slots=True)
class StudySettings:
    """How a study searches and trains, as the store keeps it; a key that is missing there has its default here.

    `stored` is the JSON that this was read from: `as_json` keeps its order and the keys that are unknown here.
    """

    trials: int = 0  # asked for
    task: str = "text"
    preset: str = "small"
    settings: Mapping[str, str] = field(default_factory=dict)  # --set, as written
    seed: int = 0
    kernels: str = "auto"
    compile: bool = False
    repeats: int = 1  # seeds that each architecture is trained with
    inherit: bool = False  # children of evolution start from their parents' weights
    evaluate: str = "training"  # of EVALUATIONS, or OWN
    data_path: str | None = None
    scaling: Mapping[str, Sequence[float]] = field(default_factory=dict)  # how inputs are normalised
    yardstick: Mapping[str, Any] | None = None  # Yardstick of the baseline, where `ceg` is an objective
    engine: str | None = None  # what it ran on last, like the next two; None: not noted
    workers: int | None = None
    gpus_per_trial: float | None = None
    enqueued: Sequence[Sequence[Mapping[str, Any]]] = ()  # architectures and recipes to train first
    variants: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)  # by trial: see `nas decompose`
    scale: Mapping[str, Any] | None = None  # what `nas scale` found
    imported: bool = False  # from Optuna's database: its space is not known
    stored: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> "StudySettings":
        """Raises ValueError naming a value of another type."""
        check_type("settings", stored, Mapping[str, Any])
        known = {f.name for f in fields(cls)} - {"stored"}
        kept = {name: value for name, value in stored.items() if name in known}
        if kept.get("evaluate", "training") not in EVALUATIONS:  # a row's word is no reason to import anything
            kept["evaluate"] = OWN
        return make_record(cls, {**kept, "stored": stored})

    def as_json(self) -> dict[str, Any]:
        """The stored JSON with what was replaced since; a field that was not stored is there once it has a value."""
        unset = StudySettings()
        now = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "stored"}
        changed = {name: value for name, value in now.items() if name in self.stored or value != getattr(unset, name)}
        return {**self.stored, **changed}


@dataclass(frozen=True, slots=True)
class StudyRow:
    """A study as stored: its settings never change after creation, but for the trials asked for and later findings."""

    id: int
    name: str
    created: datetime
    space: SpaceSpec
    objectives: tuple[str, ...]
    settings: StudySettings
    reference: Mapping[str, float]  # the hypervolume's reference point, by objective
    data_name: str
    data_hash: str


@dataclass(frozen=True, slots=True)
class Proposal:
    """A trial before it has a number: what the sampler chose and how it will be trained."""

    params: Mapping[str, Any]
    arch: Mapping[str, Any]
    arch_hash: str
    config_hash: str  # names architecture, recipe and seed: never trained twice in a study
    recipe: Recipe
    origin: str
    sampler_attrs: Mapping[str, Any]

    def running(self, number: int, seq: int, driver: int | None, at: datetime) -> Trial:
        """The trial it becomes at the moment a worker takes it."""
        return Trial(
            number=number,
            state=State.RUNNING,
            params=self.params,
            arch=self.arch,
            arch_hash=self.arch_hash,
            recipe=self.recipe,
            origin=self.origin,
            sampler_attrs=self.sampler_attrs,
            token=1,
            attempts=1,
            values={},
            parameters=None,
            driver=driver,
            worker=None,
            created=at,
            started=at,
            finished=None,
            train_seconds=None,
            evaluate_seconds=None,
            provenance={},
            diagnostics={},
            failure=None,
            seq=seq,
        )


# ---- records of values that somebody else may have written -------------------------------------------------------


def make_record(kind: type[T], values: Mapping[str, Any]) -> T:
    """A record of a file's or a database's values, each of the type that its field says.

    Raises ValueError naming a value that is missing, unknown or of another type.
    """
    try:
        made = kind(**values)
    except TypeError as error:  # a name too many or too few
        raise ValueError(str(error).replace(f"{kind.__name__}.__init__()", kind.__name__)) from error
    for name, is_of in _field_checks(kind).items():  # type: ignore[arg-type]
        if not is_of(value := getattr(made, name)):
            raise ValueError(f"{name} is {shorten(repr(value))}")
    return made


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raises ValueError naming the value when it is not of a type, as `Mapping[str, float]` or `int | None`."""
    if not _check_of(hint)(value):
        raise ValueError(f"{name} is {shorten(repr(value))}")


def shorten(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


@cache
def _field_checks(kind: type) -> dict[str, Callable[[Any], bool]]:
    hints = get_type_hints(kind)
    return {f.name: _check_of(hints[f.name]) for f in fields(kind) if f.init}


@cache
def _check_of(hint: Any) -> Callable[[Any], bool]:
    """Whether a value is of a type; one of ours inside another is checked where it is made."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda value: True
    if hint is float:
        return lambda value: isinstance(value, int | float)
    if hint is int:
        return lambda value: isinstance(value, int) and not isinstance(value, bool)
    if origin in (Union, UnionType):
        some = [_check_of(each) for each in inner]
        return lambda value: any(is_of(value) for is_of in some)
    if origin is Mapping:
        is_value = _check_of(inner[1])
        return lambda value: isinstance(value, Mapping) and all(map(is_value, value.values()))
    if origin in (Sequence, tuple):
        is_part = _check_of(inner[0])
        return lambda value: isinstance(value, list | tuple) and all(map(is_part, value))
    return lambda value: isinstance(value, hint)
