"""The shape of a ladder: its sizes, the tokens and the seeds of each. Needs no torch, so that bad flags are refused at
once."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hypernas.config.keys import RATE_GRID
from hypernas.errors import UserError

MIN_SIZES = 4  # points of a frontier: three would leave a law with its own E nothing to be wrong about
KAPLAN = 0.27 / 0.73  # tokens grow as parameters to this power


@dataclass(frozen=True, slots=True)
class Ladder:
    """`sizes` in parameters, rising; tokens a parameter, one run for each; `seeds` for the smaller half of the sizes,
    one above. With the budget `kaplan` a smallest size trains as with `chinchilla`, and tokens grow more slowly."""

    sizes: tuple[int, ...] = (20_000, 35_000, 60_000, 105_000, 180_000)
    tokens_per_parameter: tuple[float, ...] = (20.0,)
    budget: str = "chinchilla"
    seeds: int = 3
    rates: tuple[float, ...] = RATE_GRID

    def __post_init__(self) -> None:
        if list(self.sizes) != sorted(set(self.sizes)) or len(self.sizes) < 2 or self.sizes[0] < 1:
            raise UserError(f"--ladder {','.join(map(str, self.sizes))}: wanted two rising sizes or more")
        if not self.tokens_per_parameter or not all(0 < ratio < math.inf for ratio in self.tokens_per_parameter):
            raise UserError(f"--tokens-per-parameter {self.tokens_per_parameter}: wanted numbers above 0")
        points = len(self.sizes) * len(self.tokens_per_parameter)
        if points < MIN_SIZES:
            raise UserError(
                f"--ladder {','.join(map(str, self.sizes))}: a law is fitted to {MIN_SIZES} trainings of each family "
                f"or more, and these are {points}; give more sizes, or several --tokens-per-parameter"
            )
        if self.budget not in BUDGETS:
            raise UserError(f"--budget {self.budget!r} is unknown; wanted one of {', '.join(BUDGETS)}")
        if self.seeds < 1:
            raise UserError(f"--seeds {self.seeds}: wanted 1 or more")

    def tokens(self, size: int, ratio: float) -> int:
        """The same for every family at a size, so that all are scored on the same windows of text."""
        return round(ratio * BUDGETS[self.budget](size, self.sizes[0]))

    def seeds_of(self, size: int) -> range:
        small = self.sizes.index(size) < (len(self.sizes) + 1) // 2
        return range(self.seeds if small else 1)


BUDGETS: Mapping[str, Callable[[int, int], float]] = {
    "chinchilla": lambda size, smallest: float(size),
    "kaplan": lambda size, smallest: smallest * (size / smallest) ** KAPLAN,
}


def parse_sizes(text: str) -> tuple[int, ...]:
    """`20k,50k,100k`, or `20k..160k` for a doubling each. Raises UserError."""
    if ".." in text:
        low, high = (_size(end) for end in text.split("..", 1))
        return tuple(low << k for k in range(max(0, int(math.log2(high / low) + 1e-9)) + 1))
    return tuple(_size(part) for part in text.split(","))


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kM]?)", text.strip())
    if found is None or float(found[1]) <= 0:
        raise UserError(f"--ladder {text.strip()!r}: wanted parameters, like 20k,50k,100k or 20k..160k")
    return round(float(found[1]) * {"": 1, "k": 1e3, "M": 1e6}[found[2]])
