"""What a search space is: the protocol every space meets, and the pieces all spaces share.

A space says what may be chosen (`keys`), proposes one architecture (`suggest`), prices it (`cost`) and
builds it (`build`). It never samples by itself, trains or touches a file. An architecture is a frozen
dataclass that goes to and from a flat dictionary of keys (`ffn.ratio`, `streams.n`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from hashlib import sha256
from itertools import pairwise
from json import dumps
from math import exp
from math import log as log_of
from typing import TYPE_CHECKING, Any, Protocol, get_type_hints, runtime_checkable

from hypernas.errors import SpaceError

if TYPE_CHECKING:  # torch and NumPy take long to import; whoever builds a network or draws at random has them
    from numpy.random import Generator
    from torch import nn

Scalar = str | int | float | bool

MAX_LISTED = 64  # a whole-number range this long is searched value by value, a longer one on the key's own grid


class Suggest(Protocol):
    """The three methods of `optuna.Trial` that a space may call."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...
    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...


@dataclass(frozen=True, slots=True)
class FixedTrial:
    """Replays stored parameters through `suggest`: `FixedTrial({"depth": 4}).suggest_int("depth", 2, 8) == 4`."""

    params: Mapping[str, Any]

    def _take(self, name: str) -> Any:
        if name not in self.params:
            raise SpaceError(f"no stored value for parameter {name!r}; stored: {', '.join(sorted(self.params))}")
        return self.params[name]

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._take(name)

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        return int(self._take(name))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        return float(self._take(name))


class Uniform:
    """Answers each question evenly and independently, and keeps its answers."""

    def __init__(self, rng: "Generator") -> None:
        self._rng = rng
        self.answers: dict[str, Any] = {}

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        self.answers[name] = choices[int(self._rng.integers(len(choices)))]
        return self.answers[name]

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        if log:
            self.answers[name] = round(self._between(low, high, log))
            return int(self.answers[name])
        return int(self.suggest_categorical(name, range(low, high + 1, step)))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        value = self._between(low, high, log)
        self.answers[name] = value if step is None else low + step * round((value - low) / step)
        return float(self.answers[name])

    def _between(self, low: float, high: float, log: bool) -> float:
        if log:
            return float(exp(self._rng.uniform(log_of(low), log_of(high))))
        return float(self._rng.uniform(low, high))


@dataclass(frozen=True, slots=True)
class Choices:
    """A finite set of values a key may take in the search."""

    values: tuple[Any, ...]

    def suggest(self, trial: Suggest, name: str) -> Any:
        """One of the values. Evenly spaced whole numbers are asked for as such: a sampler then sees their order."""
        if len(self.values) == 1:
            return self.values[0]
        steps = {b - a for a, b in pairwise(self.values)} if all(type(v) is int for v in self.values) else set()
        if len(steps) == 1 and min(steps) > 0:
            return trial.suggest_int(name, self.values[0], self.values[-1], step=min(steps))
        return trial.suggest_categorical(name, self.values)


@dataclass(frozen=True, slots=True)
class Range:
    """A numeric interval, both ends included; integer when `integer`, log-uniform when `log`."""

    low: float
    high: float
    log: bool = False
    integer: bool = False

    def suggest(self, trial: Suggest, name: str) -> Any:
        if self.integer:
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)


Domain = Choices | Range


@dataclass(frozen=True, slots=True)
class Key:
    """One thing that `--set` can fix or restrict.

    `kind` is int, float, str or bool; `default` the baseline's value; `search` what the search may choose
    (a single choice when the key is not searched unless asked); `legal` lists or describes legal values.
    """

    name: str
    kind: type
    default: Any
    search: Domain
    help: str
    options: tuple[Any, ...] = ()  # every legal value, where they can be listed
    low: float | None = None  # the smallest legal number
    high: float | None = None

    def check(self, value: Any) -> Any:
        """`value` as this key's kind. Raises SpaceError naming what is legal."""
        try:
            if self.kind is bool:
                value = {"true": True, "false": False}[str(value).lower()]
            elif self.kind is int:
                if float(value) != int(float(value)):
                    raise ValueError
                value = int(float(value))
            else:
                value = self.kind(value)
        except (KeyError, ValueError, OverflowError) as error:
            raise SpaceError(f"{self.name}={value!s}: wanted {self._wanted()}") from error
        if self.options and value not in self.options:
            raise SpaceError(f"{self.name}={value!s}: wanted {self._wanted()}")
        outside = (self.low is not None and not value >= self.low) or (self.high is not None and not value <= self.high)
        if self.kind in (int, float) and outside:
            raise SpaceError(f"{self.name}={value!s}: wanted {self._wanted()}")
        return value

    def _wanted(self) -> str:
        if self.options:
            return "one of " + ", ".join(str(option) for option in self.options)
        name = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[self.kind]
        bounds = [
            f"{word} {bound:g}" for word, bound in (("at least", self.low), ("at most", self.high)) if bound is not None
        ]
        return " ".join([name, " and ".join(bounds)]).strip()

    def parse(self, text: str) -> Domain:
        """The domain a `--set` value stands for: `8`, `2,4,8`, `2..8` or `1e-4..1e-2:log`. Raises SpaceError.

        A range of a key that is searched on a grid keeps the grid points inside it, and its two ends.
        """
        text = text.strip()
        if not text:
            raise SpaceError(f"{self.name}= has no value: wanted {self._wanted()}")
        if self.kind in (int, float) and ".." in text:
            body, _, scale = text.partition(":")
            if scale not in ("", "log"):
                raise SpaceError(f"{self.name}={text}: after ':' wanted 'log', got {scale!r}")
            low, high = (self.check(end) for end in body.split("..", 1))
            if low > high:
                raise SpaceError(f"{self.name}={text}: the range is empty; write {high}..{low}")
            if scale == "log" and low <= 0:
                raise SpaceError(f"{self.name}={text}: a log range starts above 0")
            if isinstance(self.search, Range) or scale == "log":
                return Range(low, high, log=scale == "log", integer=self.kind is int)
            if self.kind is int and not self.options and high - low < MAX_LISTED:
                return Choices(tuple(range(low, high + 1)))
            grid = self.options or self.search.values
            return Choices(tuple(sorted({low, high, *(value for value in grid if low < value < high)})))
        values = tuple(dict.fromkeys(self.check(part.strip()) for part in text.split(",")))
        return Choices(values)


def nearest_default(key: Key, domain: Domain) -> Any:
    """The key's default, or what the domain allows nearest to it."""
    if isinstance(domain, Range):
        return min(max(key.default, domain.low), domain.high)
    if key.default in domain.values or key.kind not in (int, float):
        return key.default if key.default in domain.values else domain.values[0]
    return min(domain.values, key=lambda value: abs(value - key.default))


@dataclass(frozen=True, slots=True)
class Cost:
    """What an architecture costs. 1 MAC = 2 FLOPs; FLOPs are forward, per token (text) or per image.

    `parameters` and `flops` map a part (embedding, attention, ffn, connections, gates, norms, head) to a
    count; `matmul` counts matrix products alone, `elementwise` the rest, and their sum is `flops_total`.
    `gated_flops` is the part of `flops` that runs only where a gate opens, one entry a gate, in model order.
    """

    parameters: Mapping[str, int]
    flops: Mapping[str, int]
    matmul: int
    elementwise: int
    activation_bytes: int
    gated_flops: tuple[int, ...] = ()

    @property
    def parameters_total(self) -> int:
        return sum(self.parameters.values())

    @property
    def flops_total(self) -> int:
        return sum(self.flops.values())

    def flops_executed(self, rates: Sequence[float]) -> float:
        """FLOPs when gate i opens for the share `rates[i]` of tokens (or images)."""
        if len(rates) != len(self.gated_flops):
            raise ValueError(f"want {len(self.gated_flops)} gate rates, got {len(rates)}")
        return self.flops_total - sum(flops * (1.0 - rate) for flops, rate in zip(self.gated_flops, rates, strict=True))


@runtime_checkable
class Space(Protocol):
    """A search space. `restrict` returns a new space; everything else is a pure function of its arguments."""

    name: str
    task: str  # "text" or "images": which data and loss train it
    presets: Mapping[str, Mapping[str, str]]  # `--preset NAME`: settings that `--set` overrides

    @property
    def keys(self) -> Mapping[str, Key]:
        """Every key of the space, by name."""
        ...

    def restrict(self, settings: Mapping[str, str]) -> "Space":
        """This space with keys fixed (`8`) or restricted (`2..8`, `2,4,8`). Raises SpaceError."""
        ...

    def baseline(self) -> Any:
        """The architecture every study starts from."""
        ...

    def largest(self) -> Any:
        """The architecture with the most FLOPs, which bounds the hypervolume."""
        ...

    def suggest(self, trial: Suggest) -> Any:
        """One architecture. Asks for the same parameters in the same order every time, so that any sampler can
        learn from every trial; what the chosen branch does not use is dropped from the architecture."""
        ...

    def params(self, arch: Any) -> dict[str, Any]:
        """The parameters with which `suggest` returns `arch`. Raises SpaceError when `arch` is outside the space."""
        ...

    def from_json(self, arch: Mapping[str, Any]) -> Any:
        """The architecture with these keys, unset ones as in the baseline. Raises SpaceError when it is impossible."""
        ...

    def arch_hash(self, arch: Any) -> str:
        """The same for architectures that are the same function, however they are written."""
        ...

    def cost(self, arch: Any) -> Cost: ...

    def build(self, arch: Any) -> "nn.Module":
        """The torch module, initialised from torch's global generator (seed it outside)."""
        ...


def arch_to_json(arch: Any) -> dict[str, Scalar]:
    """A frozen dataclass as a flat dictionary with dotted keys; fields that are None are left out."""
    out: dict[str, Scalar] = {}
    for field in fields(arch):
        value = getattr(arch, field.name)
        if is_dataclass(value):
            out |= {f"{field.name}.{key}": inner for key, inner in arch_to_json(value).items()}
        elif value is not None:
            out[field.name] = value
    return out


def arch_from(kind: type, flat: Mapping[str, Any], prefix: str = "") -> Any:
    """The inverse of `arch_to_json`: a frozen dataclass of a flat dictionary; what is missing there is None."""
    types, values = _types(kind), {}
    for field in fields(kind):
        name, inner = f"{prefix}{field.name}", types[field.name]
        nested = isinstance(inner, type) and is_dataclass(inner)
        values[field.name] = arch_from(inner, flat, f"{name}.") if nested else flat.get(name)
    return kind(**values)


@cache
def _types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)  # reads every annotation anew, and every draw of a sampler asks


def digest(data: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that name a flat dictionary, whatever the order of its keys."""
    return sha256(dumps(data, sort_keys=True).encode()).hexdigest()[:16]
