"""Blocks that were planted are found, and none where there is nothing: evidence, graph and structure."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypernas.decompose.evidence import (
    FAMILY_LEVEL,
    Evidence,
    Structure,
    co_active,
    false_discovery_rate,
    family_wise,
    largest_share,
    learned_change,
    p_values,
    papers_edges,
    share_inside,
    shrinkage,
    take_apart,
    weigh,
)

WALK = 0.2  # how far noise moves a weight, in initial standard deviations
LEARNED = 1.0  # how far learning does


class Planted:
    """A net of k groups that learned apart from each other, its rows and columns shuffled, beside three controls."""

    def __init__(self, width: int, k: int, walk: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        shape = (3, width, 3 * width // 8)
        self.of_coordinate = rng.permutation(np.arange(width) * k // width)
        self.of_unit = rng.permutation(np.arange(shape[2]) * k // shape[2])
        together = self.of_coordinate[:, None] == self.of_unit
        draw = lambda: rng.standard_normal(shape, dtype=np.float32) / np.sqrt(np.float32(width))  # noqa: E731
        self.initial = draw()
        # Outside of the groups weights are at their initial draws, not at zero, but for what noise adds.
        self.final = self.initial + walk * draw() + LEARNED * together * draw()
        trained = [self.initial + WALK * draw() for _ in range(3)]
        self.factor = shrinkage(trained, self.initial)
        self.controls = [learned_change(final, self.initial, self.factor) for final in trained]

    def evidence(self, final: np.ndarray) -> Evidence:
        return weigh(learned_change(final, self.initial, self.factor), self.controls)

    def structure(self) -> Structure:
        evidence = self.evidence(self.final)
        return take_apart(evidence.reads, evidence.writes)


@pytest.mark.parametrize("walk", [0.0, WALK], ids=["still", "noisy"])
@pytest.mark.parametrize("k", [2, 4, 8])
@pytest.mark.parametrize("width", [256, 1024])
def test_planted_groups_are_found_exactly(width: int, k: int, walk: float) -> None:
    planted = Planted(width, k, walk, seed=k)
    structure = planted.structure()
    assert len(structure.blocks) == k
    for block in structure.blocks:
        group = planted.of_unit[block.units[0]]
        assert np.array_equal(np.sort(block.coordinates), np.nonzero(planted.of_coordinate == group)[0])
        assert np.array_equal(np.sort(block.units), np.nonzero(planted.of_unit == group)[0])
    assert not len(structure.lone_units) and not len(structure.lone_coordinates)
    assert (structure.strong, structure.levels) == (k, 1)


def test_the_permutation_shows_the_blocks_along_the_diagonal() -> None:
    planted = Planted(64, 4, WALK, seed=1)
    structure = planted.structure()
    together = planted.of_coordinate[:, None] == planted.of_unit
    shown = together[np.ix_(structure.coordinate_order, structure.unit_order)]
    assert np.array_equal(shown, np.kron(np.eye(4, dtype=bool), np.ones((16, 6), bool)))


def test_training_without_signal_leaves_no_block() -> None:
    found = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        # Units and coordinates that noise moves more than others, as it does in real nets.
        scale = rng.lognormal(0, 0.5, (3, 48, 1)) * rng.lognormal(0, 0.5, (3, 1, 64))
        moved, *controls = (scale * rng.standard_normal((3, 48, 64)) for _ in range(4))
        evidence = weigh(moved, controls)
        found += bool(take_apart(evidence.reads, evidence.writes).blocks)
    assert found <= 1


def test_an_untrained_net_has_no_edge() -> None:
    planted = Planted(64, 2, WALK, seed=0)
    evidence = planted.evidence(planted.initial)
    assert not evidence.confirmed.any() and not evidence.discovered.any()


@pytest.mark.parametrize(("width", "least", "most"), [(64, 0.0, 0.35), (768, 0.99, 1.0)])
def test_at_a_fixed_level_noise_is_dust_when_narrow_and_whole_when_wide(width: int, least: float, most: float) -> None:
    """Why edges are confirmed family-wise: the paper's threshold shows the width."""
    initial = np.random.default_rng(0).standard_normal((3, width, width), dtype=np.float32)
    edges = papers_edges(initial, initial)
    assert edges.mean() == pytest.approx(0.01, rel=0.3)
    assert least <= largest_share(edges) <= most


def test_false_edges_are_as_rare_as_promised() -> None:
    families = 300
    rng = np.random.default_rng(0)
    wrong = sum(
        family_wise(p_values(rng.chisquare(3, (16, 24)), rng.chisquare(3, (3, 16, 24))), 0.05).any()
        for _ in range(families)
    )
    assert wrong <= 0.10 * families  # 0.05, and twice that for the fitted tail


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([0.5, 1.0, 3.0]))
def test_p_values_fall_as_the_statistic_grows_and_match_the_count(seed: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    null = rng.gamma(1.5, spread, 4000)
    points = np.linspace(0, 40 * spread, 200)
    p = p_values(points, null)
    assert (np.diff(p) <= 0).all()
    assert ((p > 0) & (p <= 1)).all()
    middle = points[points < np.quantile(null, 0.95)]
    assert p[: len(middle)] == pytest.approx([(null >= point).mean() for point in middle], abs=1e-3)


@settings(max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_whoever_is_confirmed_family_wise_is_discovered_too(values: list[float]) -> None:
    p = np.array(values)
    assert not (family_wise(p, FAMILY_LEVEL) & ~false_discovery_rate(p, FAMILY_LEVEL)).any()


def test_weight_decay_is_no_evidence() -> None:
    initial = np.random.default_rng(0).standard_normal((3, 8, 8))
    factor = shrinkage([0.3 * initial] * 3, initial)
    assert np.abs(learned_change(0.3 * initial, initial, factor)).max() < 1e-12


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 12), st.floats(0, 0.3))
def test_every_node_is_in_one_block_or_apart_and_no_edge_leaves_a_block(
    seed: int, C: int, H: int, density: float
) -> None:
    rng = np.random.default_rng(seed)
    reads, writes = rng.random((2, C, H)) < density
    structure = take_apart(reads, writes)
    assert np.array_equal(np.sort(structure.coordinate_order), np.arange(C))
    assert np.array_equal(np.sort(structure.unit_order), np.arange(H))
    edges = reads | writes
    for block in structure.blocks:
        assert len(block.units) >= 2 and block.edges >= 1
        assert edges[block.coordinates].sum() == edges[:, block.units].sum() == block.edges


def test_a_chain_of_components_stands_in_the_order_of_its_flow() -> None:
    # Unit 1 reads 2 and writes 0, unit 0 reads 0 and writes 1: 2 -> unit 1 -> 0 -> unit 0 -> 1.
    reads, writes = np.zeros((3, 2), bool), np.zeros((3, 2), bool)
    reads[2, 1] = writes[0, 1] = reads[0, 0] = writes[1, 0] = True
    structure = take_apart(reads, writes)
    (block,) = structure.blocks
    assert (list(block.coordinates), list(block.units)) == ([2, 0, 1], [1, 0])
    assert (structure.strong, structure.levels) == (0, 5)


def test_a_single_unit_is_no_block() -> None:
    edges = np.zeros((3, 2), bool)
    edges[0, 0] = edges[1, 0] = True
    structure = take_apart(edges, edges)
    assert not structure.blocks
    assert list(structure.lone_units) == [0, 1] and list(structure.lone_coordinates) == [0, 1, 2]


def test_units_that_fire_together_are_joined_and_compared_with_the_blocks() -> None:
    rng = np.random.default_rng(0)
    common = np.repeat(rng.standard_normal((500, 2)), 8, axis=1)  # units 0 to 7 and 8 to 15
    activity = common + 0.3 * rng.standard_normal((500, 16))
    controls = [rng.standard_normal((500, 16)) for _ in range(3)]
    pairs = co_active(activity, controls)
    expected = np.kron(np.eye(2, dtype=bool), np.ones((8, 8), bool)) & ~np.eye(16, dtype=bool)
    assert np.array_equal(pairs, expected)
    structure = take_apart(*(np.kron(np.eye(2, dtype=bool), np.ones((4, 8), bool)),) * 2)
    assert share_inside(pairs, structure) == (1.0, pytest.approx(7 / 15))
    assert not co_active(rng.standard_normal((500, 16)), controls).any()
