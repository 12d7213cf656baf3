"""Dominance and hypervolume. Every objective is turned into a cost (smaller is better) before it comes here."""

from collections.abc import Mapping, Sequence
from math import log10
from operator import le, lt

import numpy as np

# Objectives where more is better, and those whose orders of magnitude count (hypervolume takes their log10).
MAXIMIZED = frozenset({"accuracy", "ceg"})
LOGARITHMIC = frozenset({"flops_per_token", "flops_per_image", "parameters", "latency_ms", "peak_bytes"})

Point = Sequence[float]


def cost(objective: str, value: float) -> float:
    """`value` as a cost: smaller is better, and scales where ratios matter become logarithms."""
    if objective in LOGARITHMIC:
        return log10(max(value, 1e-12))
    return -value if objective in MAXIMIZED else value


def costs(objectives: Sequence[str], values: Mapping[str, float]) -> tuple[float, ...]:
    """The trial's point, one cost an objective. Raises KeyError when an objective was not measured."""
    return tuple(cost(name, values[name]) for name in objectives)


def cost_table(objectives: Sequence[str], values: np.ndarray) -> np.ndarray:
    """`costs` of many trials at once: values (N, objectives) -> costs (N, objectives)."""
    out = np.array(values, float)
    for column, name in enumerate(objectives):
        if name in LOGARITHMIC:
            out[:, column] = np.log10(np.maximum(out[:, column], 1e-12))
        elif name in MAXIMIZED:
            out[:, column] *= -1
    return out


def quality(objectives: Sequence[str]) -> str:
    """The objective that says how good a model is, rather than what it costs; the first where there are several."""
    return next((name for name in objectives if name not in LOGARITHMIC), objectives[0])


def dominates(a: Point, b: Point) -> bool:
    """Whether `a` is nowhere worse than `b` and somewhere better."""
    return all(map(le, a, b)) and any(map(lt, a, b))


def no_worse(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where `a` equals or dominates `b`: either is a point (objectives) or points (N, objectives) -> (N)."""
    return np.asarray((a <= b).all(axis=-1))


def front(points: Sequence[Point] | np.ndarray) -> list[int]:
    """Indices of the non-dominated points, in order of their first cost; of equal points the first counts."""
    from moocore import is_nondominated

    if len(points) == 0:
        return []
    keep = is_nondominated(np.asarray(points, float), keep_weakly=False)
    return sorted(np.flatnonzero(keep).tolist(), key=lambda i: tuple(points[i]))


def hypervolume(points: Sequence[Point] | np.ndarray, reference: Point) -> float:
    """The volume between the points and the reference point; points beyond the reference add nothing."""
    from moocore import hypervolume as exact

    every, end = np.asarray(points, float).reshape(len(points), len(reference)), np.asarray(reference, float)
    inside = every[(every < end).all(axis=1)]
    return float(exact(inside, ref=end)) if len(inside) else 0.0


def ranks(points: Sequence[Point]) -> list[int]:
    """The non-dominated rank of every point: 0 on the front, 1 on the front of the rest, and so on."""
    from moocore import pareto_rank

    return [int(rank) for rank in pareto_rank(np.asarray(points, float))] if points else []


def contributions(points: Sequence[Point], reference: Point) -> list[float]:
    """The volume that every point alone adds; 0 for a point beyond the reference, and for equal ones."""
    from moocore import hv_contributions

    return [float(x) for x in hv_contributions(np.asarray(points, float), ref=np.asarray(reference, float))]
