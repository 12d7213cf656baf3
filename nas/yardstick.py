"""What compute-equivalent gain is read off: a fitted law and the baseline's, without what fits them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True, slots=True)
class Law:
    """loss(C) = irreducible + scale C^-exponent."""

    irreducible: float
    scale: float
    exponent: float

    def loss(self, flops: ArrayLike) -> Any:
        return self.irreducible + self.scale * np.asarray(flops, dtype=float) ** -self.exponent

    def flops(self, loss: ArrayLike) -> Any:
        """The compute that leads to a loss, infinite at `irreducible` and below."""
        above = np.maximum(np.asarray(loss, dtype=float) - self.irreducible, 0.0)
        with np.errstate(divide="ignore", over="ignore"):
            return (above / self.scale) ** (-1.0 / self.exponent)


def law_gain(candidate: Law, baseline: Law, flops: ArrayLike) -> Any:
    """CEG by two laws: the baseline's compute at the loss that the candidate has after `flops`, over `flops`."""
    return baseline.flops(candidate.loss(flops)) / np.asarray(flops, dtype=float)


@dataclass(frozen=True, slots=True)
class Yardstick:
    """A baseline's law, to say of single trainings what they gained; `reach` is the most compute that it speaks for."""

    law: Law
    reach: float

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> "Yardstick":
        """What `dataclasses.asdict` made a dictionary of."""
        return cls(Law(**stored["law"]), stored["reach"])

    def gain(self, loss: float, flops: float) -> float:
        """The baseline's compute at `loss` over `flops`. Where the law says more than `reach`, as it does of any loss
        that it holds to be out of the baseline's reach, that is what counts."""
        return min(float(self.law.flops(loss)), self.reach) / flops
