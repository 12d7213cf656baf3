"""What a search is asked to do: one frozen dataclass, filled from flags, a TOML file, a preset and defaults.

Flags win over the file, the file over the preset. Everything that can be wrong is found here, before Ray starts.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from math import inf, isclose
from pathlib import Path
from typing import Any

import numpy as np

from hypernas.errors import UserError
from hypernas.pareto import LOGARITHMIC
from hypernas.records import Recipe, SpaceSpec
from hypernas.search_spaces import load_space
from hypernas.search_spaces.base import (
    Choices,
    Cost,
    Domain,
    Key,
    Space,
    SpaceError,
    Suggest,
    Uniform,
    nearest,
    nearest_default,
)

ENGINES = ("ray", "tune", "inline")
SAMPLERS = ("nsgaii", "nsgaiii", "tpe", "gp", "evolution", "random", "qmc")
HUB = "hub:"  # before the name of one of OptunaHub's samplers
KERNELS = ("auto", "reference", "triton", "cpu")
MEASURED = ("latency_ms", "peak_bytes")  # on the worker: one sample forward; a training step
OBJECTIVES = {
    "text": ("bits_per_byte", "accuracy", "ceg", "flops_per_token", "parameters", *MEASURED),
    "images": ("loss", "accuracy", "flops_per_image", "parameters", *MEASURED),
}
DEFAULT_OBJECTIVES = {"text": ("bits_per_byte", "flops_per_token"), "images": ("accuracy", "flops_per_image")}

MAX_REPEATS = 100
LEAST_SHARE = 0.01  # of a GPU, for a trial
SAMPLED = 2000  # architectures that limits are tried on before a search starts
DEFAULT_RATE = 3e-3
RATE_GRID = tuple(DEFAULT_RATE * 3.0**k for k in (-2, -1, 0, 1))


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


def _training_key(name: str, default: Any, search: tuple, help: str, **limits: Any) -> Key:
    return Key(name, type(default), default, Choices(search), help, **limits)


TRAINING_KEYS: dict[str, Key] = {
    key.name: key
    for key in (
        _training_key("optim.name", "adamw", ("adamw",), "optimiser", options=("adamw", "muon", "sgd")),
        _training_key("optim.lr", DEFAULT_RATE, RATE_GRID, "peak learning rate", low=1e-9, high=100.0),
        _training_key("optim.weight_decay", 0.1, (0.1,), "weight decay of matrices", low=0.0, high=10.0),
        _training_key("optim.schedule", "cosine", ("cosine",), "learning rate over time",
                      options=("cosine", "linear", "inverse_sqrt")),
        _training_key("train.tokens", 1_000_000, (1_000_000,), "tokens a trial trains on", low=1, high=10**13),
        _training_key("train.batch_tokens", 2048, (2048,), "tokens a step", low=8, high=10**9),
        _training_key("train.images", 40_000, (40_000,), "images a trial trains on", low=1, high=10**13),
        _training_key("train.batch_images", 64, (64,), "images a step", low=2, high=10**9),
        _training_key("train.seed", 0, (0,), "seed of initial weights and gate noise", low=0, high=2**31),
        Key("data.path", str, "", Choices(("",)), "your own text or images: a file or a folder"),
    )
}  # fmt: skip
# The keys that may be searched, in the order in which they are drawn, and the recipe's field of each.
SEARCHED = {
    "optim.name": "optimizer",
    "optim.lr": "learning_rate",
    "optim.weight_decay": "weight_decay",
    "optim.schedule": "schedule",
}
FIXED_ONLY = ("train.tokens", "train.batch_tokens", "train.images", "train.batch_images", "train.seed", "data.path")
COUNTED = {"text": ("train.tokens", "train.batch_tokens"), "images": ("train.images", "train.batch_images")}


# What no architecture may exceed, however it is drawn. FLOPs count with every gate open: the most a token can take.
# Latency alone is not known before a worker has measured it.
LATENCY = "max.latency_ms"
LIMITS: dict[str, Key] = {
    key.name: key
    for key in (
        _training_key("max.flops", inf, (inf,), "FLOPs a token or an image, at most", low=1),
        _training_key("max.parameters", inf, (inf,), "parameters, at most", low=1),
        _training_key("max.memory", inf, (inf,), "bytes of activations a training step keeps, at most", low=1),
        _training_key(LATENCY, inf, (inf,), "milliseconds a forward pass of one sample takes, at most", low=1e-9),
    )
}


def training_keys(task: str) -> dict[str, Key]:
    """The training keys of one task: text counts tokens, images count images."""
    others = {name for other, names in COUNTED.items() if other != task for name in names}
    return {name: key for name, key in TRAINING_KEYS.items() if name not in others}


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
    sampler: str | None = None  # None: what is best with or without halving (nas/samplers.py)
    halving: bool | None = None  # None: as the number of trials makes it worth it (nas/halving.py)
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


KEPT_BYTES = 16  # of a parameter in float32: itself, its gradient, and AdamW's two moments


@dataclass(frozen=True, slots=True)
class Plan:
    """A StudyConfig made definite: the space, what is searched of the training, and the numbers of the preset."""

    space: Space
    space_spec: SpaceSpec
    objectives: tuple[str, ...]
    trials: int
    domains: Mapping[str, Domain]  # of SEARCHED
    recipe: Recipe  # every default
    data_path: str | None
    limits: Mapping[str, float] = field(default_factory=dict)  # of LIMITS, those that were set, but for LATENCY
    latency: float | None = None  # LATENCY in milliseconds; what is over it, a worker finds out
    memory: float | None = None  # bytes that a worker has for a trial, where that is known

    def allows(self, arch: Any) -> bool:
        """Whether an architecture stays within every limit, and may fit into a worker's memory at all.

        A batch that does not fit is trained in parts, so what counts is one sample, beside the weights, their gradients
        and the optimiser's two moments.
        """
        if not self.limits and self.memory is None:
            return True
        cost = self.space.cost(arch)
        if self.memory is not None:
            from hypernas.data.tasks import TASKS  # brings torch

            sample = cost.activation_bytes * TASKS[self.space.task].units(arch)
            if KEPT_BYTES * cost.parameters_total + sample > self.memory:
                return False
        return all(spent <= self.limits[name] for name, spent in self.spent(cost).items())

    def spent(self, cost: Cost) -> dict[str, float]:
        """What an architecture of this cost needs of everything that is limited."""
        needs = {
            "max.flops": cost.flops_total,
            "max.parameters": cost.parameters_total,
            "max.memory": cost.activation_bytes * self.recipe.batch_tokens,
        }
        return {name: float(needs[name]) for name in self.limits}

    def recipe_with(self, picked: Mapping[str, Any]) -> Recipe:
        """The recipe with these values of SEARCHED."""
        return replace(self.recipe, **{SEARCHED[name]: value for name, value in picked.items()})

    def suggest(self, trial: Suggest) -> tuple[Any, Recipe]:
        """One architecture and how to train it; always the same parameters in the same order."""
        arch = self.space.suggest(trial)
        return arch, self.recipe_with({name: self.domains[name].suggest(trial, name) for name in SEARCHED})

    def params(self, arch: Any, recipe: Recipe) -> dict[str, Any]:
        """The parameters with which `suggest` returns these. Raises SpaceError when they are outside the search."""
        params = dict(self.space.params(arch))
        for name, value in picked(recipe).items():
            domain = self.domains[name]
            if isinstance(domain, Choices):
                if value not in domain.values:
                    raise SpaceError(f"{name}={value:g} is outside the search")
                if len(domain.values) == 1:
                    continue
            elif not domain.low <= value <= domain.high:
                raise SpaceError(f"{name}={value:g} is outside the search")
            params[name] = value
        return params

    def baselines(self) -> list[tuple[Any, Recipe]]:
        """The space's baseline at its default learning rate, at three times and at a third of it."""
        arch = self.space.baseline()
        domain = self.domains["optim.lr"]
        rate = self.recipe.learning_rate
        if isinstance(domain, Choices) and len(domain.values) == 1:
            return [(arch, self.recipe)]
        searched = domain.values if isinstance(domain, Choices) else ()
        rates = [
            # 0.009 as somebody wrote it, and not 0.003 * 3 beside it, which differs in its last digit.
            next((value for value in searched if isclose(value, rate * factor)), rate * factor)
            for factor in (1.0, 3.0, 1 / 3)
        ]
        return [(arch, self.recipe_with({"optim.lr": value})) for value in rates]

    def first(self) -> list[tuple[Any, Recipe, str]]:
        """What is trained before the sampler is asked, and why: the baselines, as far as limits allow them."""
        return [(arch, recipe, "baseline") for arch, recipe in self.baselines() if self.allows(arch)]


def picked(recipe: Recipe) -> dict[str, Any]:
    """A recipe under the names of `--set`, as far as it may be searched."""
    return {name: getattr(recipe, attribute) for name, attribute in SEARCHED.items()}


def recipe_with(recipe: Recipe, training: Mapping[str, str], task: str) -> Recipe:
    """The recipe with what these keys say, each one value. Raises SpaceError naming what is legal."""
    total, batch = COUNTED[task]
    fields_of = {**SEARCHED, "train.seed": "seed", total: "tokens", batch: "batch_tokens"}
    given = {name: text for name, text in training.items() if name in fields_of}
    return replace(recipe, **{fields_of[name]: TRAINING_KEYS[name].check(text) for name, text in given.items()})


def split_settings(settings: Mapping[str, str], space: Space) -> tuple[dict[str, str], dict[str, str]]:
    """`--set` keys of the space, and all others. Raises SpaceError naming the nearest known key."""
    training = {**training_keys(space.task), **LIMITS}
    known = (*space.keys, *training)
    for name in settings:
        if name not in known:
            raise SpaceError(f"unknown key {name!r}; {nearest(name, known)}")
    return (
        {name: text for name, text in settings.items() if name in space.keys},
        {name: text for name, text in settings.items() if name in training},
    )


def make_plan(config: StudyConfig) -> Plan:
    """Raises SpaceError and UserError for whatever does not fit together."""
    bare = load_space(config.space)
    if bare.task not in OBJECTIVES:
        raise UserError(f"space {config.space} has task {bare.task!r}: wanted {' or '.join(OBJECTIVES)}")
    preset = PRESETS[config.preset]
    space_settings, training = split_settings(config.settings, bare)
    limits = {name: LIMITS[name].check(training.pop(name)) for name in LIMITS if name in training}
    latency = limits.pop(LATENCY, None)
    if "base" not in space_settings:  # a named architecture brings its own
        space_settings = {**bare.presets.get(config.preset, {}), **space_settings}
    space = bare.restrict(space_settings) if space_settings else bare
    training = {**preset.training[space.task], **training}
    domains = {name: TRAINING_KEYS[name].search for name in SEARCHED}
    fixed = {name: TRAINING_KEYS[name].default for name in FIXED_ONLY}
    for name, text in training.items():
        key = TRAINING_KEYS[name]
        if name in SEARCHED:
            domains[name] = key.parse(text)
        else:
            fixed[name] = key.check(text)
    defaults = {SEARCHED[name]: nearest_default(TRAINING_KEYS[name], domain) for name, domain in domains.items()}
    total, batch = COUNTED[space.task]
    recipe = Recipe(**defaults, tokens=fixed[total], batch_tokens=fixed[batch], seed=fixed["train.seed"])
    plan = Plan(
        space=space,
        space_spec=SpaceSpec(config.space, space_settings),
        objectives=_objectives(config, space),
        trials=config.trials or preset.trials,
        domains=domains,
        recipe=recipe,
        data_path=str(Path(fixed["data.path"]).resolve()) if fixed["data.path"] else None,
        limits=limits,
        latency=latency,
    )
    _check_limits(plan)
    return plan


def _check_limits(plan: Plan) -> None:
    """Raises UserError when no architecture of a large sample stays within the limits."""
    if not plan.limits or plan.allows(plan.space.baseline()):
        return
    rng = np.random.default_rng(0)
    least = dict.fromkeys(plan.limits, inf)
    for _ in range(SAMPLED):
        try:
            arch, _ = plan.suggest(Uniform(rng))
        except SpaceError:
            continue
        spent = plan.spent(plan.space.cost(arch))
        if all(spent[name] <= limit for name, limit in plan.limits.items()):
            return
        least = {name: min(least[name], spent[name]) for name in least}
    asked = ", ".join(f"{name}={limit:g}" for name, limit in plan.limits.items())
    found = ", ".join(f"{name}={value:g}" for name, value in least.items())
    raise UserError(f"no architecture of {SAMPLED} drawn stays within {asked}; each for itself, the least was {found}")


def _default(key: Key, domain: Domain) -> Any:
    """The key's default where the domain allows it, otherwise the domain's middle."""
    if isinstance(domain, Choices):
        return key.default if key.default in domain.values else domain.values[len(domain.values) // 2]
    inside = domain.low <= key.default <= domain.high
    return (
        key.default if inside else (domain.low * domain.high) ** 0.5 if domain.log else (domain.low + domain.high) / 2
    )


def with_data(plan: Plan, found: Mapping[str, str]) -> Plan:
    """The plan for the data found: the keys that data decides (`image.classes`), as far as the space has them.

    Raises UserError when `--set` says otherwise.
    """
    decided = {name: text for name, text in found.items() if name in plan.space.keys}
    settings = plan.space_spec.settings
    for name, text in decided.items():
        if settings.get(name, text) != text:
            raise UserError(f"{name}={settings[name]}, but the data has {text}: leave it out, or give other data")
    if not decided:
        return plan
    spec = SpaceSpec(plan.space_spec.name, {**settings, **decided})
    return replace(plan, space=plan.space.restrict(decided), space_spec=spec)


def _objectives(config: StudyConfig, space: Space) -> tuple[str, ...]:
    known = OBJECTIVES[space.task]
    flops = next(name for name in known if name.startswith("flops"))
    asked = tuple(flops if name == "flops" else name for name in config.objectives) or DEFAULT_OBJECTIVES[space.task]
    if len(asked) == 1 and asked[0] not in LOGARITHMIC:
        asked = (*asked, flops)  # how good against how dear
    for name in asked:
        if name not in known:
            raise UserError(f"--objectives: nobody measures {name!r}; wanted some of {', '.join(known)}")
    if config.inherit and "ceg" in asked:
        raise UserError(
            "--inherit with the objective ceg: a child's own compute leaves out its parent's, so that gains would not "
            "compare; wanted other objectives, or no --inherit"
        )
    if len(set(asked)) < 2 or len(set(asked)) != len(asked):
        raise UserError(f"--objectives {','.join(asked)}: wanted at least two different ones of {', '.join(known)}")
    return asked


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


def resumed(stored: Mapping[str, Any], given: Mapping[str, Any]) -> StudyConfig:
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
