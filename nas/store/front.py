"""The Pareto front and its hypervolume, updated as trials end."""

from dataclasses import dataclass, replace

import numpy as np
from sqlalchemy import (
    Connection,
)

from hypernas import pareto
from hypernas.records import (
    Result,
    StudyRow,
)
from hypernas.store.statements import FRONT_POINTS, place_on_front


@dataclass(slots=True)
class Front:
    """A study's front as it was at change `seq`: (row id, number) and costs of each that stands there."""

    seq: int
    rows: list[tuple[int, int]]
    costs: np.ndarray  # (N, objectives)

    def only(self, keep: np.ndarray) -> "Front":
        """The points where `keep`, booleans of shape (N,), is true."""
        if keep.all():
            return self
        return Front(self.seq, [row for row, stays in zip(self.rows, keep, strict=True) if stays], self.costs[keep])

    def joined(self, new: "Front") -> "Front":
        return Front(new.seq, self.rows + new.rows, np.concatenate([self.costs, new.costs]))


def front_before(connection: Connection, study: StudyRow, seq: int, known: Front | None) -> Front:
    """The front just before change `seq`: the cached one, if any, with what other drivers have added since."""
    if known is None:
        return front_points(connection, study, 0)
    if known.seq == seq - 1:
        return known
    new = front_points(connection, study, known.seq)
    if not set(new.rows).isdisjoint(known.rows):  # the values of one were corrected
        return front_points(connection, study, 0)
    for point in new.costs:
        known = known.only(~pareto.no_worse(point, known.costs))
    return known.joined(new) if new.rows else known


def front_points(connection: Connection, study: StudyRow, after: int) -> Front:
    """The points of the front that changed since sequence `after`."""
    values: dict[tuple[int, int], dict[str, float]] = {}
    for trial_id, number, name, value in connection.execute(FRONT_POINTS, {"at_study": study.id, "at_seq": after}):
        values.setdefault((trial_id, number), {})[name] = value
    points = [pareto.costs(study.objectives, measured) for measured in values.values()]
    return Front(after, list(values), np.array(points, float).reshape(len(points), len(study.objectives)))


def extend_front(
    connection: Connection, study: StudyRow, trial_id: int, result: Result, seq: int, before: Front
) -> Front:
    """Places a COMPLETE trial: on the front (pushing others off it) or behind the trial that dominates it.

    The front after it, at change `seq`.
    """
    mine = np.array(pareto.costs(study.objectives, result.values))
    # An equal point that came first stays; ours stands behind it.
    behind = np.flatnonzero(pareto.no_worse(before.costs, mine))
    dominated: dict[int, int | None]
    if len(behind):
        after, dominated = replace(before, seq=seq), {trial_id: before.rows[behind[0]][1]}
    else:
        stays = ~pareto.no_worse(mine, before.costs)
        after = before.only(stays).joined(Front(seq, [(trial_id, result.trial)], mine[None]))
        pushed = (row for row, kept in zip(before.rows, stays, strict=True) if not kept)
        dominated = {trial_id: None} | {row_id: result.trial for row_id, _ in pushed}
    reference = tuple(study.reference[name] for name in study.objectives)  # stored as costs
    volume = pareto.hypervolume(after.costs, reference)
    rows = [
        {"trial_id": row_id, "study_id": study.id, "hypervolume": volume, "dominated_by": by}
        for row_id, by in dominated.items()
    ]
    connection.execute(place_on_front(connection.dialect.name), rows)
    return after
