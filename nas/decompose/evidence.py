"""Which dependencies of a feed-forward net its training confirmed, and the independent blocks that they form.

An edge joins residual coordinate c and hidden unit h by m weights: those by which h reads c (one, or gate and up) and
the one by which it writes to c. A net is an array (m, C, H), the writing weights last. 2601.15871 asks of every edge
whether its trained weights are larger than the initialisation explains, at p < .01, and takes the graph of those that
are apart. Two things keep that from saying anything of learning, and are mended here:

- Training without signal moves weights too. The evidence is the change of an edge's weights, beside the changes in
  controls: the same training on shuffled targets. P-values come from the controls' own distribution.
- A fixed p grows a graph with the width, whatever the weights: pure noise is dust at 64 coordinates and one connected
  whole at 768. One false edge joins two blocks, so the graph is built of edges confirmed family-wise: all of them are
  right with probability 1 - FAMILY_LEVEL, and the threshold of an edge shrinks as FAMILY_LEVEL / (C H).

Everything is a pure function of arrays. Co-activation of hidden units goes through the same p-values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import chi2, genpareto

FAMILY_LEVEL = 0.01  # chance of any false edge in the graph of a net without signal
DISCOVERY_LEVEL = 0.05  # share of false ones among the edges that are counted as discovered
PAPER_LEVEL = 0.01  # of one edge, in 2601.15871
DIRECTION_LEVEL = 0.01  # of one direction of an edge that is confirmed already
TAIL = 250  # control values that the Pareto tail is fitted to (Knijnenburg et al. 2009, section 3)
COUNTED = 10  # below so many exceedances the tail speaks in place of the count (same source)
LEAST_SCALE = 0.01  # of a matrix's mean square change: a unit that no control moved is not infinitely surprising


@dataclass(frozen=True, eq=False, slots=True)
class Evidence:
    """What is known of every edge of a net, arrays (C, H).

    `p` is the chance that a control's edge has moved as far; `discovered` holds the edges at a false discovery rate
    of DISCOVERY_LEVEL, `confirmed` those at a family-wise error of FAMILY_LEVEL. A confirmed edge `reads` (C to H),
    `writes` (H to C), or both.
    """

    statistic: np.ndarray
    p: np.ndarray
    discovered: np.ndarray
    confirmed: np.ndarray
    reads: np.ndarray
    writes: np.ndarray


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """Coordinates and units that confirmed edges join, in the order of the condensation: who is read comes first."""

    coordinates: np.ndarray
    units: np.ndarray
    edges: int


@dataclass(frozen=True, eq=False, slots=True)
class Structure:
    """A net taken apart: blocks, largest first, and what is in none.

    `strong` counts the strongly connected components of two or more nodes, `levels` the layers of the condensation,
    the acyclic graph between all strongly connected components (1: nothing flows from one to another).
    """

    blocks: tuple[Block, ...]
    lone_coordinates: np.ndarray
    lone_units: np.ndarray
    strong: int
    levels: int

    @property
    def coordinate_order(self) -> np.ndarray:
        """The permutation of coordinates that shows the blocks along the diagonal."""
        return np.concatenate([*(block.coordinates for block in self.blocks), self.lone_coordinates])

    @property
    def unit_order(self) -> np.ndarray:
        """The permutation of hidden units that shows the blocks along the diagonal."""
        return np.concatenate([*(block.units for block in self.blocks), self.lone_units])


# ---- evidence ------------------------------------------------------------------------------------------------------


def shrinkage(controls: Sequence[np.ndarray], initial: np.ndarray) -> np.ndarray:
    """The factor (m, 1, 1) by which training scales all of a matrix's initial weights: weight decay.

    Least squares over the final weights (m, C, H) of controls, which decay as the model does, whatever the optimiser.
    The model's own weights would not do: what they learned hides a small net's factor.
    """
    squares = np.square(initial).sum((1, 2), keepdims=True)
    mean = np.mean(controls, axis=0)
    return np.asarray((mean * initial).sum((1, 2), keepdims=True) / np.maximum(squares, np.finfo(initial.dtype).tiny))


def learned_change(final: np.ndarray, initial: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """What training added to the weights (m, C, H) beyond scaling them by `factor`, which is no edge's evidence."""
    return final - factor * initial


def noise_scale(controls: Sequence[np.ndarray]) -> np.ndarray:
    """The mean square change that training without signal gives each weight, (m, C, H).

    Of rank one in each matrix, (a coordinate's) x (a unit's) / (the matrix's): coordinates and units differ in how far
    noise moves them, and single weights are too few to tell.
    """
    squares = np.mean([np.square(control) for control in controls], axis=0)
    whole = squares.mean((1, 2), keepdims=True)
    tiny = np.finfo(squares.dtype).tiny
    rank_one = squares.mean(1, keepdims=True) * squares.mean(2, keepdims=True) / np.maximum(whole, tiny)
    return np.maximum(rank_one, np.maximum(LEAST_SCALE * whole, tiny))


def p_values(statistic: np.ndarray, null: np.ndarray) -> np.ndarray:
    """The chance that a draw of the null's distribution is at least `statistic`, whose shape it has.

    By counting; where fewer than COUNTED of `null` are as large, by a generalised Pareto tail fitted to its TAIL
    largest by moments (Hosking & Wallis 1987, section 4.2). The tail is never taken to be lighter than exponential,
    which errs on the side of no evidence.
    """
    ordered = np.sort(null, axis=None).astype(float)
    n = ordered.size
    exceeding = n - np.searchsorted(ordered, statistic, "left")
    counted = (exceeding + 1) / (n + 1)
    k = min(TAIL, n // 4)
    start = ordered[n - k - 1]
    excess = ordered[n - k :] - start
    mean, variance = excess.mean(), excess.var(ddof=1)
    if not variance > 0:
        return np.asarray(counted)
    shape = max(0.0, 0.5 * (1 - mean**2 / variance))
    tail = k / n * genpareto.sf(np.maximum(statistic - start, 0.0), shape, scale=mean * (1 - shape))
    return np.where(exceeding >= COUNTED, counted, np.minimum(tail, counted))


def false_discovery_rate(p: np.ndarray, level: float) -> np.ndarray:
    """Which hypotheses to reject so that a share of `level` of them is false (Benjamini & Hochberg 1995)."""
    ordered = np.sort(p, axis=None)
    passing = np.nonzero(ordered <= level * np.arange(1, p.size + 1) / p.size)[0]
    return p <= ordered[passing[-1]] if passing.size else np.zeros(p.shape, bool)


def family_wise(p: np.ndarray, level: float) -> np.ndarray:
    """Which hypotheses to reject so that any of them is false with probability `level` (Bonferroni)."""
    return p * p.size <= level


def weigh(change: np.ndarray, controls: Sequence[np.ndarray]) -> Evidence:
    """The evidence of a net's change (m, C, H), beside the changes of at least two controls.

    The statistic of an edge is the sum of its squared changes, each over its noise scale. A control's own statistic
    takes the scale from the others, since a scale fitted to the values it divides makes them look smaller.
    """
    if len(controls) < 2:
        raise ValueError(f"want at least 2 controls, each the other's measure, got {len(controls)}")
    parts = np.square(change) / noise_scale(controls)
    null = np.stack(
        [np.square(own) / noise_scale([c for c in controls if c is not own]) for own in controls], axis=1
    )  # (m, K, C, H)
    statistic = parts.sum(0)
    p = p_values(statistic, null.sum(0))
    confirmed = family_wise(p, FAMILY_LEVEL)
    read = p_values(parts[:-1].sum(0), null[:-1].sum(0))
    written = p_values(parts[-1], null[-1])
    # The stronger direction of a confirmed edge counts always, the other one where it stands on its own.
    return Evidence(
        statistic=statistic,
        p=p,
        discovered=false_discovery_rate(p, DISCOVERY_LEVEL),
        confirmed=confirmed,
        reads=confirmed & ((read <= written) | (read <= DIRECTION_LEVEL)),
        writes=confirmed & ((written < read) | (written <= DIRECTION_LEVEL)),
    )


def papers_edges(weights: np.ndarray, initial: np.ndarray) -> np.ndarray:
    """The edges (C, H) that 2601.15871 would keep: sum of w^2 / s0^2 over its m weights is beyond chi^2_m at p < .01.

    s0 is each matrix's initial standard deviation. The formula is our reading: the paper names null, level and length
    of the sequence of weights.
    """
    variance = initial.var((1, 2), keepdims=True)
    return (np.square(weights) / variance).sum(0) > chi2.isf(PAPER_LEVEL, len(weights))


# ---- structure -----------------------------------------------------------------------------------------------------


def take_apart(reads: np.ndarray, writes: np.ndarray) -> Structure:
    """The blocks of a net whose unit h reads coordinate c where reads[c, h], and writes to it where writes[c, h].

    Blocks are what no edge joins, so each runs without the others; a block has two units at least, and smaller ones
    are apart. Inside of a block nodes stand in the order of the condensation of its strongly connected components.
    """
    C, H = reads.shape
    read_from, read_by = np.nonzero(reads)
    written_to, written_by = np.nonzero(writes)
    sources = np.concatenate([read_from, C + written_by])
    targets = np.concatenate([C + read_by, written_to])
    graph = coo_array((np.ones(len(sources), np.int8), (sources, targets)), shape=(C + H, C + H)).tocsr()
    count, label = connected_components(graph, connection="weak")
    _, strong = connected_components(graph, connection="strong")
    level = _levels(strong[sources], strong[targets], strong.max() + 1)[strong]
    order = np.lexsort((np.arange(C + H), strong, level, label))  # by block, level, component, number
    units = np.bincount(label[C:], minlength=count)
    edges = np.bincount(label[np.nonzero(reads | writes)[0]], minlength=count)
    blocks = []
    starts = np.searchsorted(label[order], np.arange(count + 1))
    for found in np.nonzero(units >= 2)[0]:
        nodes = order[starts[found] : starts[found + 1]]
        blocks.append(Block(nodes[nodes < C], nodes[nodes >= C] - C, int(edges[found])))
    blocks.sort(key=lambda block: -len(block.coordinates) * len(block.units))
    apart = units[label] < 2
    return Structure(
        blocks=tuple(blocks),
        lone_coordinates=np.nonzero(apart[:C])[0],
        lone_units=np.nonzero(apart[C:])[0],
        strong=int((np.bincount(strong) >= 2).sum()),
        levels=int(level.max()) + 1,
    )


def _levels(sources: np.ndarray, targets: np.ndarray, count: int) -> np.ndarray:
    """The length of the longest path to each node of an acyclic graph; arcs from a node to itself do not count."""
    arcs = np.unique(np.stack([sources, targets]), axis=1)
    arcs = arcs[:, arcs[0] != arcs[1]]
    level = np.zeros(count, int)
    while True:
        deeper = level.copy()
        np.maximum.at(deeper, arcs[1], level[arcs[0]] + 1)
        if (deeper == level).all():
            return level
        level = deeper


def largest_share(edges: np.ndarray) -> float:
    """The share of coordinates and units in the largest connected component of edges (C, H)."""
    structure = take_apart(edges, edges)
    sizes = [len(block.coordinates) + len(block.units) for block in structure.blocks]
    return max(sizes, default=1) / sum(edges.shape)


# ---- co-activation -------------------------------------------------------------------------------------------------


def co_activation(activity: np.ndarray) -> np.ndarray:
    """How alike in size pairs of hidden units are, from activity (N, H): |correlation of |a||, a vector of H(H-1)/2."""
    size = np.abs(activity)
    size = size - size.mean(0)
    norm = np.sqrt(np.square(size).sum(0))
    correlation = size.T @ size / np.maximum(np.outer(norm, norm), np.finfo(size.dtype).tiny)
    return np.abs(correlation[np.triu_indices(size.shape[1], 1)])


def co_active(activity: np.ndarray, controls: Sequence[np.ndarray]) -> np.ndarray:
    """The pairs of units, symmetric (H, H), that go together more than any do in the controls' activities (N, H)."""
    null = np.concatenate([co_activation(control) for control in controls])
    kept = family_wise(p_values(co_activation(activity), null), FAMILY_LEVEL)
    H = activity.shape[1]
    pairs = np.zeros((H, H), bool)
    pairs[np.triu_indices(H, 1)] = kept
    return pairs | pairs.T


def share_inside(pairs: np.ndarray, structure: Structure) -> tuple[float, float]:
    """The share of co-active pairs (H, H) whose units are in one block, and that of all pairs: equal without relation.

    (nan, ...) where no pair is co-active.
    """
    H = len(pairs)
    inside = np.zeros((H, H), bool)
    for block in structure.blocks:
        inside[np.ix_(block.units, block.units)] = True
    np.fill_diagonal(inside, False)
    found = int(pairs.sum())
    return (pairs & inside).sum() / found if found else float("nan"), inside.sum() / (H * (H - 1))
