"""A space searched on a grid of keys: what `lm`, `vision` and a space of your own have in common.

A `Family` describes one kind of network: its keys, which of them only make sense together, and how a flat
dictionary of keys becomes an architecture. A `GridSpace` is one family or several under a name, and does the rest:
`--set`, `base=NAME`, equal budgets by `match.parameters=N`, sampling, replaying and checking.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

from hypernas.errors import SpaceError, nearest
from hypernas.search_spaces import gallery
from hypernas.search_spaces.base import (
    Choices,
    Cost,
    Key,
    Suggest,
    arch_to_json,
    digest,
    nearest_default,
)

if TYPE_CHECKING:  # torch takes a second and a half to import; whoever builds a network has it
    from torch import Tensor, nn

Flat = Mapping[str, Any]
A = TypeVar("A")
Values = Callable[[str], tuple]  # key -> the values the search allows it
Options = Mapping[Any, Flat]  # what the sampler may answer -> the keys that stands for

BUDGETS: Mapping[str, Callable[[Cost], int]] = {
    "match.parameters": lambda cost: cost.parameters_total,
    "match.flops": lambda cost: cost.flops_total,
}


@dataclass(frozen=True, slots=True)
class Joint:
    """Keys that only make sense together, as one parameter of the sampler, so that none is ever without effect.

    `options` lists the combinations that are legal among the allowed values, and raises SpaceError when none is;
    `usual` what a baseline should look like where it may, first choice first.
    """

    name: str
    keys: tuple[str, ...]
    options: Callable[[Values], Options]
    usual: tuple[Flat, ...]


@dataclass(frozen=True, slots=True)
class Solve:
    """How `match.*` may choose a key: in steps of `step`, each tried by `arch` (which may fit other keys to it)."""

    step: int
    arch: Callable[[Flat], Any]


@dataclass(frozen=True, slots=True)
class Growth(Generic[A]):
    """How trained networks of a family become larger ones that compute the same function.

    `obstacle(parent, child)` says why one cannot; where it is None, `grown(parent, weights, child, drawn)` makes the
    child's state_dict of the parent's and of the one that was drawn for the child.
    """

    obstacle: Callable[[A, A], str | None]
    grown: "Callable[[A, Mapping[str, Tensor], A, Mapping[str, Tensor]], Mapping[str, Tensor]]"


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of network in a space.

    `arch` makes an architecture (a frozen dataclass) of a flat dictionary of all keys: it drops what the others leave
    without effect, and raises SpaceError when the rest cannot be built. `canonical` is equal for equal functions.
    `interacting` names parameters of the sampler not every combination of which may be legal: they are tried
    together before a search starts. `solves` holds the keys that `match.*` may choose, first choice first; cost has
    to grow with them. `deepen` gives the keys of the same shape at another depth, in families that grow in depth with
    their width. `growth` lets children of a search start from their parents' weights (`nas search --inherit`).
    """

    name: str
    keys: Mapping[str, Key]
    arch: Callable[[Flat], Any]
    cost: Callable[[Any], Cost]
    build: "Callable[[Any], nn.Module]"
    canonical: Callable[[Any], Flat] = arch_to_json
    joints: tuple[Joint, ...] = ()
    interacting: tuple[tuple[str, ...], ...] = ()
    solves: Mapping[str, Solve] = field(default_factory=dict)
    deepen: Callable[[Flat, int], Flat] | None = None
    growth: Growth[Any] | None = None


@dataclass(frozen=True)
class GridSpace:
    """A search space of one family or several; `settings` is what `--set` said so far.

    With several families searched at once, the parameters of each carry its name (`resnet.depth`, `vit.depth`) and
    all are asked for in every trial.
    """

    settings: Mapping[str, str] = field(default_factory=dict)
    name: ClassVar[str]
    task: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    families: ClassVar[tuple[Family, ...]]

    # ---- what may be set -------------------------------------------------------------------------------------

    @cached_property
    def keys(self) -> Mapping[str, Key]:
        return _keys_of(type(self))  # type: ignore[arg-type]  # mypy takes the class for an instance

    def restrict(self, settings: Mapping[str, str]) -> Self:
        space = self._with(settings)
        space._check()
        return space

    def _with(self, settings: Mapping[str, str]) -> Self:
        for name in settings:
            if name not in self.keys:
                raise SpaceError(f"unknown key {name!r} in space {self.name}; {nearest(name, tuple(self.keys))}")
        return replace(self, settings={**self.settings, **settings})

    @cached_property
    def _given(self) -> Mapping[str, str]:
        """The settings, on top of those of the named architecture they start from."""
        base = self.settings.get("base")
        return {**(gallery.named_settings(self.name, base) if base else {}), **self.settings}

    @cached_property
    def _searched(self) -> tuple[Family, ...]:
        if "family" not in self._given:
            return self.families[:1]
        domain = self.keys["family"].parse(self._given["family"])
        assert isinstance(domain, Choices)  # as for every key of text
        return tuple(family for family in self.families if family.name in domain.values)

    def _values(self, family: Family, name: str) -> tuple:
        """What the search allows a key. A log range (`64..1024:log`) is its doublings, both ends included."""
        key = family.keys[name]
        if name not in self._given and self._pinned(family, name):
            return (key.default,)
        domain = key.parse(self._given[name]) if name in self._given else key.search
        if isinstance(domain, Choices):
            return domain.values
        doublings = [domain.low]
        while 2 * doublings[-1] < domain.high:
            doublings.append(2 * doublings[-1])
        return tuple(dict.fromkeys(key.check(value) for value in (*doublings, domain.high)))

    def _pinned(self, family: Family, name: str) -> bool:
        """Whether a key stays at its default: in a named architecture all do but those that settings open."""
        joined = [key for joint in family.joints if name in joint.keys for key in joint.keys]
        return "base" in self.settings and not any(key in self._given for key in joined)

    def _default(self, family: Family, name: str) -> Any:
        """The key's own default, or what is allowed nearest to it."""
        key = family.keys[name]
        return nearest_default(key, Choices(self._values(family, name))) if name in self._given else key.default

    @cached_property
    def _parameters(self) -> Mapping[str, Mapping[str, Options]]:
        """By family: what the sampler is asked, and the keys that each answer stands for."""
        return {family.name: self._parameters_of(family) for family in self._searched}

    def _parameters_of(self, family: Family) -> Mapping[str, Options]:
        values = partial(self._values, family)
        apart = {key for joint in family.joints for key in joint.keys} | {self._solved(family)}
        single = {name: {value: {name: value} for value in values(name)} for name in family.keys if name not in apart}
        return single | {joint.name: joint.options(values) for joint in family.joints}

    def _check(self) -> None:
        """Raises SpaceError where something that the search may come to cannot be."""
        for name, text in self._given.items():
            self.keys[name].parse(text)
        for family in self._searched:
            self._check_budget(family)
            flat = self._usual(family)
            self._make(family, flat)
            for names in family.interacting:
                options = [
                    self._parameters[family.name][name].values() for name in names if name != self._solved(family)
                ]
                for combination in product(*options):
                    self._make(family, {name: value for part in (flat, *combination) for name, value in part.items()})

    # ---- equal budgets ---------------------------------------------------------------------------------------

    @cached_property
    def _budget(self) -> tuple[str, int] | None:
        """The key and the value of `match.*`."""
        asked = {name: self.keys[name].check(self._given[name]) for name in BUDGETS if name in self._given}
        if len(asked) > 1:
            raise SpaceError(f"{' and '.join(asked)}: wanted one of them")
        return next(iter(asked.items()), None)

    def _solved(self, family: Family) -> str | None:
        """The key that `match.*` chooses; a base leaves all free. Raises SpaceError when none is."""
        if self._budget is None or not family.solves:
            return None
        for name in family.solves:
            if name not in self.settings or len(self._values(family, name)) > 1:
                return name
        fixed = " and ".join(f"{name}={self.settings[name]}" for name in family.solves)
        raise SpaceError(f"{self._budget[0]}={self._budget[1]} has nothing to solve: {fixed} are given; leave one out")

    def _ladder(self, family: Family, name: str) -> range:
        """Every value that `match.*` may give a key."""
        key, step = family.keys[name], family.solves[name].step
        assert key.low is not None and key.high is not None
        return range(-(-int(key.low) // step) * step, int(key.high) + 1, step)

    def _match(self, family: Family, flat: Flat, name: str) -> Any:
        """The architecture whose cost is nearest to the budget. Raises SpaceError naming what can be reached."""
        assert self._budget is not None
        (budget, wanted), ladder, arch = self._budget, self._ladder(family, name), family.solves[name].arch

        def spent(value: int) -> int:
            return BUDGETS[budget](family.cost(arch({**flat, name: value})))

        least, most = spent(ladder[0]), spent(ladder[-1])
        if not least <= wanted <= most:
            raise SpaceError(
                f"{budget}={wanted}: wanted {least} to {most}, what {name}={ladder[0]} and {name}={ladder[-1]} lead to"
            )
        above = bisect_left(ladder, wanted, key=spent)
        nearest_value = min(ladder[max(0, above - 1) : above + 1], key=lambda value: abs(spent(value) - wanted))
        return arch({**flat, name: nearest_value})

    def _check_budget(self, family: Family) -> None:
        """Raises SpaceError when some architecture of the search cannot meet the budget."""
        name = self._solved(family)
        if name is None:
            return
        assert self._budget is not None
        (budget, wanted), ladder, arch = self._budget, self._ladder(family, name), family.solves[name].arch

        def spent(value: int, flat: Flat) -> int:
            return BUDGETS[budget](family.cost(arch({**flat, name: value})))

        smallest, largest = partial(spent, ladder[0]), partial(spent, ladder[-1])
        least = smallest(self._extreme(family, smallest, max))
        most = largest(self._extreme(family, largest, min))
        if not least <= wanted <= most:
            raise SpaceError(
                f"{budget}={wanted}: wanted {least} to {most}, what every architecture of this search can have with "
                f"{name} from {ladder[0]} to {ladder[-1]}; restrict other keys for another range"
            )

    def _extreme(self, family: Family, size: Callable[[Flat], int], choose: Callable) -> dict[str, Any]:
        """The flat architecture with the largest or smallest size: cost grows with each parameter by itself."""
        flat = dict(self._usual(family))
        for options in self._parameters[family.name].values():
            legal = {}
            for label, option in options.items():
                try:
                    legal[label] = size({**flat, **option})
                except SpaceError:
                    continue
            if legal:
                flat |= options[choose(legal, key=legal.__getitem__)]
        return flat

    # ---- architectures ---------------------------------------------------------------------------------------

    def _make(self, family: Family, flat: Flat) -> Any:
        flat, solved = {**flat, "family": family.name}, self._solved(family)
        return family.arch(flat) if solved is None else self._match(family, flat, solved)

    def _usual(self, family: Family) -> Flat:
        """The baseline's keys, but for one that is solved."""
        joints = {joint.name: joint for joint in family.joints}
        flat: dict[str, Any] = {}
        for name, options in self._parameters[family.name].items():
            flat |= _most_usual(joints[name], options) if name in joints else {name: self._default(family, name)}
        return flat

    def baseline(self) -> Any:
        return self._make(self._searched[0], self._usual(self._searched[0]))

    def largest(self) -> Any:
        def flops(family: Family, flat: Flat) -> int:
            return family.cost(self._make(family, flat)).flops_total

        return max(
            (self._make(family, self._extreme(family, partial(flops, family), max)) for family in self._searched),
            key=lambda arch: self.cost(arch).flops_total,
        )

    def suggest(self, trial: Suggest) -> Any:
        names = tuple(family.name for family in self._searched)
        picked = Choices(names).suggest(trial, "family")
        flats: dict[str, dict[str, Any]] = {name: {} for name in names}
        for family in names:
            for name, options in self._parameters[family].items():
                flats[family] |= options[Choices(tuple(options)).suggest(trial, self._asked(family, name))]
        return self._make(self._named(picked), flats[picked])

    def _asked(self, family: str, name: str) -> str:
        """What the sampler calls a parameter."""
        return name if len(self._searched) == 1 else f"{family}.{name}"

    def params(self, arch: Any) -> dict[str, Any]:
        own = self._family(arch)
        if own not in self._searched:
            raise SpaceError(f"family={own.name} is outside the search")
        params: dict[str, Any] = {"family": own.name} if len(self._searched) > 1 else {}
        flat = self._unmatched(own, arch)
        for family in self._searched:
            for name, options in self._parameters[family.name].items():
                label = self._answer(own, arch, flat, name, options) if family is own else next(iter(options))
                if len(options) > 1:
                    params[self._asked(family.name, name)] = label
        return params

    def _answer(self, family: Family, arch: Any, flat: Flat, name: str, options: Options) -> Any:
        """The answer with which the architecture stays as it is. Raises SpaceError when there is none."""
        for label, option in options.items():
            if self._leads_to(arch, family, {**flat, **option}):
                return label
        touched = dict.fromkeys(key for option in options.values() for key in option)
        shown = ", ".join(f"{key}={flat[key]}" for key in touched if key in flat)
        raise SpaceError(f"{shown} is outside the search of {name}: {', '.join(map(str, options))}")

    def _leads_to(self, arch: Any, family: Family, flat: Flat) -> bool:
        try:
            return self._make(family, flat) == arch
        except SpaceError:
            return False

    def _unmatched(self, family: Family, arch: Any) -> Flat:
        """The architecture's keys as the sampler had them, before `match.*` fitted some to the solved one."""
        flat = arch_to_json(arch)
        if self._solved(family) is None:
            return flat
        parameters = self._parameters[family.name]
        fitted = [name for name in parameters if name in flat and flat[name] not in parameters[name]]
        for combination in product(*(parameters[name].values() for name in fitted)):
            asked = {name: value for part in (flat, *combination) for name, value in part.items()}
            if self._leads_to(arch, family, asked):
                return asked
        raise SpaceError(f"this architecture is not what {self._budget[0]}={self._budget[1]} leads to")  # type: ignore[index]

    def from_json(self, arch: Mapping[str, Any]) -> Any:
        settings = {name: str(value) for name, value in arch.items()}
        if (made := self._of_complete(settings)) is not None:
            return made
        space = self._with(settings)
        family = space._searched[0]
        if family.solves and all(name in settings for name in family.solves) and not settings.keys() & BUDGETS.keys():
            # Complete, so there is nothing to solve any more.
            space = replace(space, settings={name: t for name, t in space.settings.items() if name not in BUDGETS})
        for name in settings:
            domain = space.keys[name].parse(settings[name])
            if not isinstance(domain, Choices) or len(domain.values) != 1:
                raise SpaceError(f"{name}={settings[name]}: wanted one value")
        return space.baseline()

    def _of_complete(self, settings: Mapping[str, str]) -> Any | None:
        """The architecture whose keys are exactly these, as a store has them: a long study is read in half the time.

        None where a key is missing, wrong or without effect.
        """
        if any("," in text or ".." in text for text in settings.values()):
            return None
        try:
            flat = {name: self.keys[name].check(text) for name, text in settings.items()}
            family = self._named(flat.get("family", self.families[0].name))
            made = family.arch(
                {**{name: key.default for name, key in family.keys.items()}, "family": family.name, **flat}
            )
        except (SpaceError, KeyError):
            return None
        return made if arch_to_json(made) == flat else None

    def scaled(self, arch: Any, parameters: int) -> Any:
        """The same shape at another size: depth in proportion to width where the family deepens, everything else in
        its ratio to the width, which is what comes nearest to `parameters`. Raises SpaceError."""
        family, flat = self._family(arch), arch_to_json(arch)
        if not family.solves:
            raise SpaceError(f"family {family.name} says of no key that size grows with it: wanted one in its `solves`")
        if family.deepen is not None:
            # Parameters grow as depth x width^2.
            growth = (parameters / family.cost(arch).parameters_total) ** (1 / 3)
            flat = dict(family.deepen(flat, max(1, round(flat["depth"] * growth))))
        width = next(iter(family.solves))
        return self.from_json(
            {**{name: v for name, v in flat.items() if name != width}, "match.parameters": parameters}
        )

    def arch_hash(self, arch: Any) -> str:
        return digest(self._family(arch).canonical(arch))

    def cost(self, arch: Any) -> Cost:
        return self._family(arch).cost(arch)

    def build(self, arch: Any) -> "nn.Module":
        return self._family(arch).build(arch)

    def obstacle(self, parent: Any, child: Any) -> str | None:
        """Why the child cannot start from the parent's trained weights as the same function; None where it can."""
        old, new = self._family(parent), self._family(child)
        if old is not new:
            return f"family {old.name} -> {new.name} is another function"
        if parent == child:
            return None
        return new.growth.obstacle(parent, child) if new.growth else f"nothing is known of growing a {new.name}"

    def grown(
        self, parent: Any, weights: "Mapping[str, Tensor]", child: Any, drawn: "Mapping[str, Tensor]"
    ) -> "Mapping[str, Tensor]":
        """The child's state_dict, of its parent's and the one drawn for itself; `obstacle` of the two is None."""
        growth = self._family(child).growth
        return weights if parent == child or growth is None else growth.grown(parent, weights, child, drawn)

    def _family(self, arch: Any) -> Family:
        return self._named(getattr(arch, "family", self.families[0].name))

    def _named(self, name: str) -> Family:
        return next(family for family in self.families if family.name == name)


def _most_usual(joint: Joint, options: Options) -> Flat:
    """The option that differs least from what is usual."""

    def strangeness(option: Flat) -> tuple[int, int]:
        return min(
            (sum(option.get(name) != value for name, value in usual.items()), rank)
            for rank, usual in enumerate(joint.usual)
        )

    return min(options.values(), key=strangeness)


@cache
def _keys_of(kind: type[GridSpace]) -> Mapping[str, Key]:
    """Every key of a kind of space: each architecture that is read makes a space of its own, with the same keys."""
    keys: dict[str, Key] = {}
    if len(kind.families) > 1:
        names = tuple(family.name for family in kind.families)
        keys["family"] = Key("family", str, names[0], Choices(names[:1]), "kind of network", options=names)
    for family in kind.families:
        for name, key in family.keys.items():
            known = keys.setdefault(name, key)
            keys[name] = replace(known, options=tuple(dict.fromkeys((*known.options, *key.options))))
    if bases := gallery.names(kind.name):
        keys["base"] = Key("base", str, "", Choices(("",)), "start from a named architecture", options=bases)
    solved = " or ".join(dict.fromkeys(name for family in kind.families for name in family.solves))
    for name in BUDGETS if solved else ():
        keys[name] = Key(name, int, 0, Choices((0,)), f"solves {solved} for this total", low=1)
    return keys
