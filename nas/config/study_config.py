"""What a search is asked to do: one frozen dataclass, filled from flags, a TOML file, a preset and defaults.

Flags win over the file, the file over the preset. Everything that can be wrong is found here, before Ray starts.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any

from hypernas.config.keys import ENGINES, HUB, KERNELS, PRESETS, SAMPLERS
from hypernas.errors import StudyError, UserError
from hypernas.records import EVALUATIONS, OWN
from hypernas.search_spaces.base import (
    nearest,
)

MAX_REPEATS = 100
LEAST_SHARE = 0.01  # of a GPU, for a trial


@dataclass(frozen=True, slots=True)
class StudyConfig:
    """One search. Durations in seconds."""

    study: str = "default"
    store: str = "nas.db"
    space: str = "lm"
    preset: str = "small"
    settings: Mapping[str, str] = field(default_factory=dict)  # --set, as written
    objectives: tuple[str, ...] = ()  # empty: the space's own two
    trials: int = 0  # 0: the preset's
    time: float | None = None
    device_hours: float | None = None  # of training and evaluation, over the whole study
    workers: int = 0  # 0: as many as the cluster has room for
    gpus_per_trial: float | None = None  # 0: trials take CPUs; None: one GPU where there is any, otherwise CPUs
    engine: str = "ray"
    address: str | None = None
    sampler: str | None = None  # None: what is best with or without halving (nas/strategy/samplers.py)
    halving: bool | None = None  # None: as the number of trials makes it worth it (nas/strategy/halving.py)
    repeats: int = 1  # seeds that each architecture is trained with
    inherit: bool = False  # children of evolution start from their parents' weights where that keeps the function
    trial_timeout: float | None = None
    checkpoints: str | None = None  # folder; None: beside the weights
    kernels: str = "auto"
    compile: bool = False
    seed: int = 0
    resume: bool = False
    other_device: bool = False  # resume in another precision, or on GPUs after CPUs, or the other way round
    warm_start: str | None = None  # where architectures come from that are trained first

    def __post_init__(self) -> None:
        if not self.study.strip():
            raise UserError("--study is empty: give the study a name")
        if len(self.study) > 200:
            raise UserError(f"--study has {len(self.study)} characters: wanted at most 200")
        for flag, value, known in (
            ("--preset", self.preset, tuple(PRESETS)),
            ("--engine", self.engine, ENGINES),
            ("--kernels", self.kernels, KERNELS),
        ):
            if value not in known:
                raise UserError(f"{flag} {value!r} is unknown; wanted one of {', '.join(known)}")
        if self.sampler not in (None, *SAMPLERS) and not str(self.sampler).startswith(HUB):
            raise UserError(f"--sampler {self.sampler!r} is unknown; wanted one of {', '.join(SAMPLERS)}, {HUB}NAME")
        for flag, count in (("--trials", self.trials), ("--workers", self.workers)):
            if not 0 <= count < 2**31:
                raise UserError(f"{flag} {count}: wanted at least 1 and fewer than 2,147,483,648")
        if not 1 <= self.repeats <= MAX_REPEATS:
            raise UserError(f"--repeats {self.repeats}: wanted 1 to {MAX_REPEATS} seeds an architecture")
        if self.inherit and self.sampler not in (None, "evolution"):
            raise UserError(
                f"--inherit with --sampler {self.sampler}: only evolution's proposals have a parent; "
                "leave one of them out"
            )
        if self.inherit and self.repeats > 1:
            raise UserError(
                f"--inherit with --repeats {self.repeats}: seeds draw the initial weights that a child inherits; "
                "leave one of them out"
            )
        for flag, seconds in (("--time", self.time), ("--trial-timeout", self.trial_timeout)):
            if seconds is not None and not 0 < seconds < inf:
                raise UserError(f"{flag} {seconds:g}: wanted a number of seconds above 0")
        if self.device_hours is not None and not 0 < self.device_hours < inf:
            raise UserError(f"--device-hours {self.device_hours:g}: wanted a number of hours above 0")
        check_gpus(self.gpus_per_trial)
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed {self.seed}: wanted 0 or more, in 63 bits")


def check_gpus(gpus: float | None) -> None:
    """Raises UserError for what no trial can take."""
    if gpus is not None and not (gpus == 0 or LEAST_SHARE <= gpus <= 1 or (gpus < inf and gpus == int(gpus) > 1)):
        raise UserError(
            f"--gpus-per-trial {gpus:g}: wanted 0 for CPUs, a share of one GPU from {LEAST_SHARE:g} to 1, or a whole "
            "number of them"
        )


def own_code(space: str) -> bool:
    """Whether a space's name is a file of the user's: FILE.py:Class."""
    return space.rpartition(":")[0].endswith(".py")


def without_own_code(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Stored settings without a space of the user's own, which older rows name: code that a store names is not run."""
    return {name: value for name, value in stored.items() if name != "space" or not own_code(value)}


def check_evaluation(study: str, kept: str, given: str) -> None:
    """Raises StudyError where a study that is evaluated by code of one's own would go on without being told which."""
    if kept == OWN and given in (*EVALUATIONS, OWN):
        raise StudyError(
            f"study {study!r} is evaluated by code of its own: give evaluate='module:function' again, as no study "
            "names code for others to run"
        )


# ---- reading a configuration file ----------------------------------------------------------------------------

_TOML_TYPES: dict[str, tuple[type, ...]] = {
    "study": (str,), "store": (str,), "space": (str,), "preset": (str,), "objectives": (list, str), "trials": (int,),
    "time": (int, float), "device_hours": (int, float), "workers": (int,), "gpus_per_trial": (int, float),
    "engine": (str,), "address": (str,), "sampler": (str,), "halving": (bool,), "repeats": (int,), "inherit": (bool,),
    "trial_timeout": (int, float), "checkpoints": (str,), "kernels": (str,), "compile": (bool,), "seed": (int,),
    "resume": (bool,), "other_device": (bool,), "warm_start": (str,),
}  # fmt: skip


def read_toml(path: str) -> dict[str, Any]:
    """A file's `[search]` flags (with underscores) and `[set]` keys, as keyword arguments of StudyConfig.

    Raises UserError for a file that is missing or malformed, unknown names and values of the wrong type.
    """
    try:
        data = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not TOML: {error}") from error
    for table, value in data.items():
        if table not in ("search", "set"):
            raise UserError(f"--config {path}: unknown table [{table}]; wanted [search] and [set]")
        if not isinstance(value, dict):
            raise UserError(f"--config {path}: {table} is {value!r}; wanted a table [{table}]")
    out: dict[str, Any] = {}
    for name, value in data.get("search", {}).items():
        if name not in _TOML_TYPES:
            raise UserError(f"--config {path}: unknown flag {name!r} in [search]; {nearest(name, tuple(_TOML_TYPES))}")
        wanted = _TOML_TYPES[name]
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            kinds = " or ".join(kind.__name__ for kind in wanted)
            raise UserError(f"--config {path}: {name} = {value!r} is {type(value).__name__}; wanted {kinds}")
        out[name] = value
    if "objectives" in out:
        parts = out["objectives"].split(",") if isinstance(out["objectives"], str) else out["objectives"]
        out["objectives"] = tuple(str(part).strip() for part in parts)
    if "set" in data:
        out["settings"] = {name: _toml_text(path, name, value) for name, value in _flatten(data["set"]).items()}
    return out


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in table.items():
        out |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return out


def _toml_text(path: str, name: str, value: Any) -> str:
    if isinstance(value, list):
        return ",".join(_toml_text(path, name, part) for part in value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, int, float)):
        return str(value)
    raise UserError(f"--config {path}: [set] {name} = {value!r}; wanted text, a number, true, false or a list of them")


# ---- what a resumed study may change --------------------------------------------------------------------------

# What belongs to one run on one machine, not to the study.
HERE_AND_NOW = frozenset(
    ["store", "resume", "other_device", "warm_start", "time", "device_hours", "address", "checkpoints"]
)
RAN_ON = ("engine", "gpus_per_trial", "workers")  # what a study ran on last: repeated, unless flags say otherwise
CHANGEABLE = HERE_AND_NOW | {*RAN_ON, "study", "trials", "trial_timeout", "halving"}


def to_json(config: StudyConfig) -> dict[str, Any]:
    """What the store keeps. The store's own address (it may hold a password) stays out, and whatever a resumed search
    should take from its command line alone: a machine, a folder, a file of code."""
    left_out = HERE_AND_NOW | ({"space"} if own_code(config.space) else set())
    data = asdict(config) | {"settings": dict(config.settings), "objectives": list(config.objectives)}
    return {name: value for name, value in data.items() if name not in left_out}


def resume_settings(stored: Mapping[str, Any], given: Mapping[str, Any]) -> StudyConfig:
    """A stored study's configuration with what this command line gives. Raises UserError when it contradicts."""
    for name, value in given.items():
        if name in CHANGEABLE:
            continue
        if name == "space" and name not in stored:  # a file of code, which a study's row compares by itself
            continue
        before = stored.get(name)
        before = tuple(before) if isinstance(before, list) else before
        if before != value:
            raise UserError(
                f"--resume: study {given.get('study', stored.get('study'))!r} was created with {name} {_show(before)}, "
                f"not {_show(value)}: leave the flag out, or start another study"
            )
    known = {f.name for f in fields(StudyConfig)}
    merged = {name: value for name, value in stored.items() if name in known} | dict(given) | {"resume": True}
    return StudyConfig(**merged | {"objectives": tuple(merged["objectives"])})


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"--set {name}={text}" for name, text in value.items()) or "no --set"
    return ",".join(value) if isinstance(value, tuple) else repr(value)
