"""Successive halving for several objectives: whether a trial that reached a rung goes on, from the values there alone.

Asynchronous, as in ASHA (Li et al. 2020, https://arxiv.org/abs/1810.05934): a trial is compared with whoever reached
the rung before it, so that no worker waits. Rank in the population is non-dominated rank, as in MO-ASHA (Schmucker et
al. 2021, https://arxiv.org/abs/2106.12639); points of one rank are told apart by the hypervolume that they alone add
inside their bin of log10 FLOPs. Without bins the two ends of a front always come first, and live for ever.

Points are costs: smaller is better, FLOPs and the like as log10. FLOPs are known before training, so they count from
the first rung on.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from math import ceil, floor, inf, isfinite, log10
from typing import Protocol

import numpy as np

from hypernas import pareto
from hypernas.pareto import Point

Costs = tuple[float, ...]

KEEP = 1 / 3  # of the trials at a rung go on
BIN = log10(2)  # a factor of two in FLOPs
MANY = 8  # new points for each so many known ones are sorted in together
EXEMPT = 16  # one trial in so many is never stopped
ENOUGH = 64  # trials from which on halving finds the front that full trainings find: nas bench search --part quality


def should_continue(mine: Point, peers: Sequence[Point], axis: int | None = None, keep: float = KEEP) -> bool:
    """Whether the trial at `mine` is among the best `keep` of itself and its `peers` at a rung.

    `axis` is the coordinate in bins (log10 FLOPs); None compares all points as one bin. A point that is not finite is
    worse than every other. The answer depends on the set of peers, not on their order.
    """
    rung = Rung(axis, keep)
    for number, point in enumerate((mine, *peers)):
        rung.add(number, tuple(point))
    return rung.keeps(0)


class Rung:
    """The points of all trials that reached one rung, sorted as they come: to answer for the last of a hundred thousand
    takes little longer than for the first."""

    def __init__(self, axis: int | None = None, keep: float = KEEP) -> None:
        self._axis, self._keep = axis, keep
        self._points: dict[int, Costs] = {}  # by trial
        self._clear()

    def _clear(self) -> None:
        self._new: list[int] = list(self._points)  # trials whose points are not sorted in yet
        self._trials: dict[Costs, int] = {}  # how many have this point, of those that are
        self._layers: list[Layer] = []  # of different finite points, by non-dominated rank
        self._sizes: list[int] = []  # of layers, in trials
        self._worst: dict[int, Costs] = {}  # of each bin, in every cost

    def add(self, number: int, point: Costs) -> None:
        """Takes in that a trial reached the rung; one that reports again replaces its point."""
        before = self._points.get(number)
        if before == point:
            return
        self._points[number] = point
        if before is None:
            self._new.append(number)
        else:
            self._clear()

    def keeps(self, number: int) -> bool:
        """Whether a trial that reached the rung is among the best, which go on."""
        self._sort_in()
        mine = self._points[number]
        if not _finite(mine):
            return False
        rank = self._rank(mine)
        left = ceil(self._keep * len(self._points)) - sum(self._sizes[:rank])
        return left >= self._sizes[rank] or (left > 0 and self._place(mine, rank) < left)

    def _sort_in(self) -> None:
        """Brings new points into their layers: each by itself or, where they are many, all at once."""
        new = [point for number in self._new if _finite(point := self._points[number])]
        self._new = []
        at_once = len(new) > 1 + len(self._trials) // MANY
        for point in new:
            known = self._trials.get(point, 0)
            self._trials[point] = known + 1
            place = _bin(point, self._axis)
            self._worst[place] = tuple(map(max, point, self._worst.get(place, point)))
            if known and not at_once:
                self._sizes[self._rank(point)] += 1
            elif not at_once:
                self._insert(point)
        if at_once:
            layers: dict[int, list[Costs]] = {}
            for point, rank in zip(self._trials, pareto.ranks(list(self._trials)), strict=True):
                layers.setdefault(rank, []).append(point)
            self._layers = [_make_layer(layers[rank]) for rank in sorted(layers)]
            self._sizes = [self._count(layers[rank]) for rank in sorted(layers)]

    def _count(self, points: Iterable[Costs]) -> int:
        return sum(self._trials[point] for point in points)

    def _rank(self, point: Costs) -> int:
        """The first layer with nothing in it that dominates the point."""
        return bisect_left(self._layers, True, key=lambda layer: not layer.dominates(point))

    def _insert(self, point: Costs) -> None:
        """What a point dominates in its layer moves to the next, as does what these dominate there, and so on."""
        rank, moving = self._rank(point), [point]
        while moving:
            if rank == len(self._layers):
                self._layers.append(_make_layer(moving))
                self._sizes.append(self._count(moving))
                return
            layer = self._layers[rank]
            moved = layer.displace(moving)
            self._sizes[rank] += self._count(moving) - self._count(moved)
            rank += 1
            if moved and len(layer.points) == len(moving):  # the whole layer: then all behind it move with it
                self._layers.insert(rank, _make_layer(moved))
                self._sizes.insert(rank, self._count(moved))
                return
            moving = moved

    def _place(self, mine: Costs, rank: int) -> int:
        """How many trials of its layer go before `mine`: the best of each bin first, then the second of each.

        Equal points share the best place that they have together.
        """
        if len(self._layers[rank].points) == 1:  # as always of one cost, of which there is no volume
            return 0
        bins: dict[int, list[Costs]] = {}
        for point in sorted(self._layers[rank].points):
            bins.setdefault(_bin(point, self._axis), []).append(point)
        turns: list[tuple[int, float, Costs]] = []
        for number, points in bins.items():
            worst = list(self._worst[number])
            if self._axis is not None:
                worst[self._axis] = (number + 1) * BIN
            ordered = sorted(zip((-added for added in pareto.contributions(points, worst)), points, strict=True))
            turns += [(turn, loss, point) for turn, (loss, point) in enumerate(ordered)]
        earlier = [point for *_, point in sorted(turns)]
        return self._count(earlier[: earlier.index(mine)])


class Layer(Protocol):
    """Different points of which none dominates another."""

    points: list[Costs]

    def dominates(self, point: Costs) -> bool: ...

    def displace(self, moving: list[Costs]) -> list[Costs]:
        """Takes in `moving`, neighbours of the layer before this one (or a new point), and gives up what they
        dominate."""
        ...


class _Stairs:
    """A layer of two costs, sorted by the first and so, downwards, by the second: neighbours displace neighbours."""

    def __init__(self, points: Iterable[Costs]) -> None:
        self.points = sorted(points)

    def dominates(self, point: Costs) -> bool:
        place = bisect_right(self.points, (point[0], inf)) - 1
        return place >= 0 and self.points[place][1] <= point[1] and self.points[place] != point

    def displace(self, moving: list[Costs]) -> list[Costs]:
        first = bisect_left(self.points, (moving[0][0], -inf))
        end = max(first, bisect_right(self.points, -moving[-1][1], key=lambda point: -point[1]))
        moved = self.points[first:end]
        self.points[first:end] = moving
        return moved


class _Cloud:
    """A layer of one cost, or of more than two."""

    def __init__(self, points: Iterable[Costs]) -> None:
        self.points = list(points)
        self._array = np.array(self.points)

    def dominates(self, point: Costs) -> bool:
        return any(
            self.points[place] != point for place in np.flatnonzero(pareto.no_worse(self._array, np.array(point)))
        )

    def displace(self, moving: list[Costs]) -> list[Costs]:
        leaves = np.any([pareto.no_worse(np.array(point), self._array) for point in moving], axis=0)
        moved = [self.points[place] for place in np.flatnonzero(leaves)]
        self.points = [self.points[place] for place in np.flatnonzero(~leaves)] + moving
        self._array = np.concatenate([self._array[~leaves], moving])
        return moved


def _make_layer(points: Sequence[Costs]) -> Layer:
    return _Stairs(points) if len(points[0]) == 2 else _Cloud(points)


def _finite(point: Point) -> bool:
    return all(isfinite(value) for value in point)


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
