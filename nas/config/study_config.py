"""What a search is asked to do: one frozen dataclass, filled from flags, a TOML file, a preset and defaults.

Flags win over the file, the file over the preset. Everything that can be wrong is found here, before Ray starts.
"""

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum, auto
from math import inf
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, get_args, get_origin

from hypernas.errors import StudyError, UserError, nearest

ENGINES = ("ray", "tune", "inline")
SAMPLERS = ("nsgaii", "nsgaiii", "tpe", "gp", "evolution", "random", "qmc")
HUB = "hub:"  # before the name of one of OptunaHub's samplers
KERNELS = ("auto", "reference", "triton", "cpu")
MAX_REPEATS = 100
LEAST_SHARE = 0.01  # of a GPU, for a trial


@dataclass(frozen=True, slots=True)
class Preset:
    trials: int
    training: Mapping[str, Mapping[str, str]]  # by task


def _preset(trials: int, tokens: int, batch_tokens: int, images: int, batch_images: int) -> Preset:
    text = {"train.tokens": str(tokens), "train.batch_tokens": str(batch_tokens)}
    return Preset(
        trials, {"text": text, "images": {"train.images": str(images), "train.batch_images": str(batch_images)}}
    )


PRESETS = {
    "quick": _preset(trials=16, tokens=250_000, batch_tokens=1024, images=8_000, batch_images=64),
    "small": _preset(trials=40, tokens=1_000_000, batch_tokens=2048, images=40_000, batch_images=64),
    "full": _preset(trials=200, tokens=50_000_000, batch_tokens=32_768, images=5_000_000, batch_images=256),
}


class Scope(Enum):
    """How long a value holds."""

    STUDY = auto()  # part of what the study is: a resumed search cannot change it
    CHANGEABLE = auto()  # stored, and a resumed search may change it
    MACHINE = auto()  # what the study ran on last: repeated on resume, unless flags say otherwise
    RUN = auto()  # belongs to one run on one machine, and is not stored


def _accept(value: Any) -> str:
    return ""


@dataclass(frozen=True, slots=True)
class Flag:
    """What a field of StudyConfig is beside its type and default: its words in `--help`, its scope and its check."""

    help: str
    metavar: str | None = None
    shown: str = ""  # the default in words, where the field's own value would not tell
    scope: Scope = Scope.STUDY
    check: Callable[[Any], str] = _accept  # what is wrong with a value, to be said after the flag; "" if nothing is
    least: int | None = None  # of a value that is given, where the default is lower and means: not given
    aliases: tuple[str, ...] = ()


def _flag(default: Any, help: str, metavar: str | None = None, **more: Any) -> Any:
    return field(default=default, metadata={"flag": Flag(help, metavar, **more)})


def _one_of(*known: str) -> Callable[[Any], str]:
    return lambda value: "" if value in known else f"{value!r} is unknown; wanted one of {', '.join(known)}"


def _above_zero(unit: str) -> Callable[[Any], str]:
    return lambda value: "" if 0 < value < inf else f"{value:g}: wanted a number of {unit} above 0"


def _whole(low: int, end: int, wanted: str) -> Callable[[Any], str]:
    return lambda value: "" if low <= value < end else f"{value}: wanted {wanted}"


_count = _whole(0, 2**31, "at least 1 and fewer than 2,147,483,648")


def _fault_of_name(value: str) -> str:
    if not value.strip():
        return "is empty: give the study a name"
    return f"has {len(value)} characters: wanted at most 200" if len(value) > 200 else ""


def _fault_of_sampler(value: str) -> str:
    return "" if value.startswith(HUB) else _one_of(*SAMPLERS, f"{HUB}NAME")(value)


def _fault_of_gpus(gpus: float) -> str:
    if gpus == 0 or LEAST_SHARE <= gpus <= 1 or (gpus < inf and gpus == int(gpus) > 1):
        return ""
    return f"{gpus:g}: wanted 0 for CPUs, a share of one GPU from {LEAST_SHARE:g} to 1, or a whole number of them"


@dataclass(frozen=True, slots=True)
class StudyConfig:
    """One search. Durations in seconds.

    A field is written here alone: the options of the command line, the types that a TOML file and Python may give, and
    what a resumed search may change follow from its type, its default and its Flag.
    """

    study: str = _flag("default", "Name of the study.", "NAME", scope=Scope.CHANGEABLE, check=_fault_of_name)
    store: str = _flag(
        "nas.db",
        "Where studies are kept: a SQLite file, sqlite:///FILE or postgresql://USER@HOST/NAME.",
        "URL",
        scope=Scope.RUN,
    )
    space: str = _flag("lm", "lm, vision, pkg.module:Space or FILE.py:Space.", "NAME")
    preset: str = _flag("small", "quick, small or full: trials and tokens.", "NAME", check=_one_of(*PRESETS))
    settings: Mapping[str, str] = field(  # --set, as written
        default_factory=dict,
        metadata={
            "flag": Flag(
                "Fix a key (depth=4) or restrict it (depth=2..8, ffn.shape=hourglass,conventional). Repeat for more.",
                "KEY=VALUE",
            )
        },
    )
    objectives: tuple[str, ...] = _flag(  # empty: the space's own two
        (),
        "What to trade off; a quality alone against flops.",
        "A,B[,C]",
        shown="loss and flops",
        aliases=("--objective",),
    )
    trials: int = _flag(  # 0: the preset's
        0,
        "Trials in the study when it is done.",
        "N",
        shown="the preset's",
        scope=Scope.CHANGEABLE,
        check=_count,
        least=1,
    )
    time: float | None = _flag(
        None, "Start no trial after so long.", "SECONDS", scope=Scope.RUN, check=_above_zero("seconds")
    )
    device_hours: float | None = _flag(  # of training and evaluation, over the whole study
        None,
        "Start no trial once all have used so much of a device.",
        "H",
        scope=Scope.RUN,
        check=_above_zero("hours"),
    )
    workers: int = _flag(  # 0: as many as the cluster has room for
        0,
        "Trainings at once.",
        "N",
        shown="as many as there are GPUs or cores for",
        scope=Scope.MACHINE,
        check=_count,
        least=1,
    )
    gpus_per_trial: float | None = _flag(  # 0: trials take CPUs; None: one GPU where there is any, otherwise CPUs
        None,
        "GPUs a training takes; a fraction shares one, 0 is CPUs.",
        "F",
        shown="1, or 0 where there is none",
        scope=Scope.MACHINE,
        check=_fault_of_gpus,
    )
    engine: str = _flag(
        "ray",
        "ray (warm worker processes), tune (Ray Tune) or inline (this process).",
        "NAME",
        scope=Scope.MACHINE,
        check=_one_of(*ENGINES),
    )
    address: str | None = _flag(None, "Join this Ray cluster: auto or HOST:PORT.", "HOST:PORT", scope=Scope.RUN)
    sampler: str | None = _flag(  # None: what is best with or without halving (nas/strategy/samplers.py)
        None,
        "evolution, tpe, nsgaii, nsgaiii, gp, random, qmc or hub:NAME.",
        "NAME",
        shown="evolution with halving, else tpe",
        check=_fault_of_sampler,
    )
    halving: bool | None = _flag(  # None: as the number of trials makes it worth it (nas/strategy/halving.py)
        None,
        "Stop trials early that promise no place on the front.",
        shown="on from 64 trials on",
        scope=Scope.CHANGEABLE,
    )
    repeats: int = _flag(
        1,
        "Seeds each trial is trained with; values are means.",
        "N",
        check=_whole(1, MAX_REPEATS + 1, f"1 to {MAX_REPEATS} seeds an architecture"),
    )
    inherit: bool = _flag(  # where that keeps the function
        False, "Children of evolution start from their parents' weights; measured in docs/search.md.", shown="off"
    )
    trial_timeout: float | None = _flag(
        None, "Kill a trial that runs longer.", "S", scope=Scope.CHANGEABLE, check=_above_zero("seconds")
    )
    checkpoints: str | None = _flag(
        None, "Where half-trained trials are kept.", "DIR", shown="beside the store", scope=Scope.RUN
    )
    kernels: str = _flag("auto", "auto, reference, triton or cpu.", "NAME", check=_one_of(*KERNELS))
    compile: bool = _flag(False, "torch.compile each net: only long trials win it back.")
    seed: int = _flag(
        0, "Seed of the study: data order and proposals.", "N", check=_whole(0, 2**63, "0 or more, in 63 bits")
    )
    resume: bool = _flag(False, "Continue the study up to --trials; create it if unknown.", scope=Scope.RUN)
    other_device: bool = _flag(
        False,
        "Go on with a study in another precision, or on the other of GPUs and CPUs (name it: --gpus-per-trial).",
        scope=Scope.RUN,
    )
    warm_start: str | None = _flag(
        None, "Train these first: FILE.json, [STORE#]STUDY or optuna:URL#STUDY.", "SOURCE", scope=Scope.RUN
    )

    def __post_init__(self) -> None:
        for name, flag in FLAGS.items():
            value = getattr(self, name)
            if value is not None and (fault := flag.check(value)):
                raise UserError(f"{option_of(name)} {fault}")
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


DATA_PATH = "data.path"  # the key that is no part of what a study is
FLAGS: Mapping[str, Flag] = MappingProxyType({f.name: f.metadata["flag"] for f in fields(StudyConfig)})
DEFAULTS: Mapping[str, Any] = MappingProxyType({f.name: f.default for f in fields(StudyConfig)})


def _kinds(hint: Any) -> tuple[type, ...]:
    """The types that a file may give for a field of this type; None is for what is not given."""
    if isinstance(hint, UnionType):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    several = {float: (int, float), tuple: (list, str), Mapping: (dict,)}
    return several.get(get_origin(hint) or hint, (hint,))


KINDS: Mapping[str, tuple[type, ...]] = MappingProxyType({f.name: _kinds(f.type) for f in fields(StudyConfig)})


def option_of(name: str) -> str:
    """A field's option on the command line."""
    return "--set" if name == "settings" else "--" + name.replace("_", "-")


def wrong_type(name: str, value: Any) -> str:
    """What is wrong with the type of a value given for the field `name`; "" if nothing is."""
    wanted = KINDS[name]
    found = list if isinstance(value, tuple) else type(value)
    if issubclass(found, wanted) and (found is not bool or bool in wanted):
        return ""
    return f"is {found.__name__}; wanted {' or '.join(kind.__name__ for kind in wanted)}"


def check_least(name: str, value: Any) -> None:
    """Raises UserError for a given value that a default alone may have: 0 trials are the preset's."""
    least = FLAGS[name].least
    if least is not None and value < least:
        raise UserError(f"{option_of(name)} {value}: wanted at least {least}")


def split_names(value: Any) -> tuple[str, ...]:
    """Names in a list, or in one text with commas between them."""
    return tuple(str(part).strip() for part in (value.split(",") if isinstance(value, str) else value))


def check_gpus(gpus: float | None) -> None:
    """Raises UserError for what no trial can take."""
    if gpus is not None and (fault := _fault_of_gpus(gpus)):
        raise UserError(f"--gpus-per-trial {fault}")


def own_code(space: str) -> bool:
    """Whether a space is not ours, so that its name is code to import: FILE.py:Class or pkg.module:Class."""
    from hypernas.search_spaces import SPACES  # with its bases, which `nas --help` does without

    return space not in SPACES


def without_own_code(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Stored settings without a space of the user's own, which a row may name: code that a store names is not run."""
    return {name: value for name, value in stored.items() if name != "space" or not own_code(str(value))}


# ---- reading a configuration file ----------------------------------------------------------------------------


def read_toml(path: str) -> dict[str, Any]:
    """A file's `[search]` flags (with underscores) and `[set]` keys, as keyword arguments of StudyConfig.

    Raises UserError for a file that is missing or malformed, unknown names and values of the wrong type.
    """
    try:
        data = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"--config {path}: not TOML: {error}") from error
    for table, value in data.items():
        if table not in ("search", "set"):
            raise UserError(f"--config {path}: unknown table [{table}]; wanted [search] and [set]")
        if not isinstance(value, dict):
            raise UserError(f"--config {path}: {table} is {value!r}; wanted a table [{table}]")
    out: dict[str, Any] = {}
    known = tuple(name for name in FLAGS if name != "settings")  # which have a table of their own
    for name, value in data.get("search", {}).items():
        if name not in known:
            raise UserError(f"--config {path}: unknown flag {name!r} in [search]; {nearest(name, known)}")
        if wrong := wrong_type(name, value):
            raise UserError(f"--config {path}: {name} = {value!r} {wrong}")
        check_least(name, value)
        out[name] = split_names(value) if name == "objectives" else value
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


def names_of(*scopes: Scope) -> tuple[str, ...]:
    """The fields whose values hold for so long."""
    return tuple(name for name, flag in FLAGS.items() if flag.scope in scopes)


def to_json(config: StudyConfig) -> dict[str, Any]:
    """What the store keeps. The store's own address (it may hold a password) stays out, and whatever a resumed search
    should take from its command line alone: a machine, a folder, a file of code."""
    left_out = {*names_of(Scope.RUN), *(["space"] if own_code(config.space) else [])}
    data = asdict(config) | {"settings": dict(config.settings), "objectives": list(config.objectives)}
    return {name: value for name, value in data.items() if name not in left_out}


def resume_settings(stored: Mapping[str, Any], given: Mapping[str, Any]) -> StudyConfig:
    """A stored study's configuration with what this command line gives. Raises UserError when it contradicts.

    What belongs to a run, and so to a machine, and what names code to run, is taken from the command line alone.
    """
    for name, value in given.items():
        if FLAGS[name].scope is not Scope.STUDY:
            continue
        if name == "space" and name not in stored:  # a file of code, which a study's row compares by itself
            continue
        before: Any = stored.get(name)
        before = tuple(before) if isinstance(before, list) else before
        asked = value
        if name == "settings":
            before, asked = _without_path(before or {}), _without_path(value)
            if not asked:  # nothing but where the data lies now
                continue
        if before != asked:
            raise UserError(
                f"--resume: study {given.get('study', stored.get('study'))!r} was created with {name} {_show(before)}, "
                f"not {_show(asked)}: leave the flag out, or start another study"
            )
    sampler = str(stored.get("sampler"))
    if sampler.startswith(HUB) and "sampler" not in given:
        raise StudyError(
            f"study {given.get('study', stored.get('study'))!r} proposes with OptunaHub's code: --resume wants its "
            f"--sampler {sampler} again, as no study names code for others to run"
        )
    kept = {name: value for name, value in stored.items() if name in FLAGS and FLAGS[name].scope is not Scope.RUN}
    merged = kept | dict(given) | {"resume": True}
    merged["settings"] = _resumed_keys(stored, given)
    return StudyConfig(**merged | {"objectives": tuple(merged["objectives"])})


def _resumed_keys(stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, str]:
    """The study's keys of --set. Its data is known by a hash: `data.path` is where it lay last, or was said to lie."""
    keys: Mapping[str, str] = stored.get("settings") or {}
    path = given.get("settings", {}).get(DATA_PATH, stored.get("data_path") or keys.get(DATA_PATH, ""))
    return _without_path(keys) | ({DATA_PATH: path} if path else {})


def _without_path(keys: Mapping[str, str]) -> dict[str, str]:
    return {name: text for name, text in keys.items() if name != DATA_PATH}


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"--set {name}={text}" for name, text in value.items()) or "no --set"
    return ",".join(value) if isinstance(value, tuple) else repr(value)
