"""Successive halving for several objectives: whether a trial that reached a rung goes on, from the values there alone.

Asynchronous, as in ASHA (Li et al. 2020, https://arxiv.org/abs/1810.05934): a trial is compared with whoever reached
the rung before it, so that no worker waits. Rank in the population is non-dominated rank, as in MO-ASHA (Schmucker et
al. 2021, https://arxiv.org/abs/2106.12639); points of one rank are told apart by the hypervolume that they alone add
inside their bin of log10 FLOPs. Without bins the two ends of a front always come first, and live for ever.

Points are costs: smaller is better, FLOPs and the like as log10. FLOPs are known before training, so they count from
the first rung on.
"""

from collections.abc import Mapping, Sequence
from math import ceil, floor, isfinite, log10

import numpy as np

from hypernas import pareto
from hypernas.pareto import Point

Costs = tuple[float, ...]

KEEP = 1 / 3  # of the trials at a rung go on
BIN = log10(2)  # a factor of two in FLOPs
EXEMPT = 16  # one trial in so many is never stopped
ENOUGH = 64  # trials from which on halving finds the front that full trainings find: nas bench search --part quality


def should_continue(mine: Point, peers: Sequence[Point], axis: int | None = None, keep: float = KEEP) -> bool:
    """Whether the trial at `mine` is among the best `keep` of itself and its `peers` at a rung.

    `axis` is the coordinate in bins (log10 FLOPs); None compares all points as one bin. A point that is not finite is
    worse than every other. The answer depends on the set of peers, not on their order.
    """
    if not _finite(mine):
        return False
    everyone = [tuple(point) for point in (mine, *peers) if _finite(point)]
    ranks = pareto.ranks(everyone)
    front = [point for point, rank in zip(everyone, ranks, strict=True) if rank == ranks[0]]
    ahead = sum(rank < ranks[0] for rank in ranks)
    return ahead + _place(tuple(mine), front, everyone, axis) < ceil(keep * (len(peers) + 1))


def _finite(point: Point) -> bool:
    return all(isfinite(value) for value in point)


def _place(mine: Costs, front: Sequence[Costs], everyone: Sequence[Costs], axis: int | None) -> int:
    """How many points of its front go before `mine`: the best of each bin first, then the second of each.

    Equal points share the best place that they have together.
    """
    bins: dict[int, list[Costs]] = {}
    for point in sorted(set(front)):
        bins.setdefault(_bin(point, axis), []).append(point)
    turns: list[tuple[int, float, Costs]] = []
    for number, points in bins.items():
        worst = [max(values) for values in zip(*(p for p in everyone if _bin(p, axis) == number), strict=True)]
        if axis is not None:
            worst[axis] = (number + 1) * BIN
        ordered = sorted(zip((-added for added in pareto.contributions(points, worst)), points, strict=True))
        turns += [(turn, loss, point) for turn, (loss, point) in enumerate(ordered)]
    earlier = [point for *_, point in sorted(turns)]
    return sum(front.count(point) for point in earlier[: earlier.index(mine)])


def _bin(point: Point, axis: int | None) -> int:
    return 0 if axis is None else floor(point[axis] / BIN)


def stops_early(asked: bool | None, trials: int) -> bool:
    """Whether a search of so many trials stops any: what was asked for or, where nothing was, from ENOUGH trials on.

    Halving leaves one trial in three or four to end. A search of few trials would have a front of two or three.
    """
    return trials >= ENOUGH if asked is None else asked


def is_exempt(number: int) -> bool:
    """Whether trial `number` is never stopped, which gives an unbiased sample for the rank correlation."""
    return number % EXEMPT == EXEMPT - 1


def rank_correlation(early: Mapping[int, float], final: Mapping[int, float]) -> float | None:
    """Spearman's rank correlation of trials' losses at a rung and at the end; None with fewer than 3 trials.

    Equal losses share their mean rank.
    """
    both = [number for number in early if number in final]
    if len(both) < 3:
        return None
    before, after = (_ranks([values[number] for number in both]) for values in (early, final))
    if np.ptp(before) == 0 or np.ptp(after) == 0:
        return None
    return float(np.corrcoef(before, after)[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values)
    return np.array([(array < value).sum() + ((array == value).sum() - 1) / 2 for value in array])
