"""Whether a trial goes on depends on values alone, never on the order in which they came."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypernas import pareto
from hypernas.strategy.halving import (
    BIN,
    ENOUGH,
    EXEMPT,
    KEEP,
    Rung,
    is_exempt,
    rank_correlation,
    should_continue,
    stops_early,
)

# Few different values, so that ties and equal points are common.
coordinates = st.sampled_from([0.0, 0.1, 0.2, 0.35, 0.5, 0.8, 1.3])
points = st.tuples(coordinates, coordinates)
axes = st.sampled_from([None, 1])


@given(points, st.lists(points, max_size=20), axes, st.randoms())
def test_the_order_of_the_peers_does_not_matter(mine, peers, axis, rng: random.Random) -> None:
    shuffled = list(peers)
    rng.shuffle(shuffled)
    assert should_continue(mine, peers, axis) == should_continue(mine, shuffled, axis)


@given(st.lists(points, min_size=1, max_size=20, unique=True), axes)
def test_of_different_points_exactly_the_share_goes_on(everyone, axis) -> None:
    on = [should_continue(point, everyone[:i] + everyone[i + 1 :], axis) for i, point in enumerate(everyone)]
    assert sum(on) == math.ceil(KEEP * len(everyone))


@given(points, st.lists(points, max_size=20), axes)
def test_who_dominates_somebody_that_goes_on_goes_on_too(mine, peers, axis) -> None:
    better = tuple(value - 0.05 for value in mine)
    if should_continue(mine, [*peers, better], axis):
        assert should_continue(better, [*peers, mine], axis)


@given(points, st.lists(points, max_size=20), axes)
def test_equal_points_share_one_fate(mine, peers, axis) -> None:
    assert should_continue(mine, [*peers, mine], axis) == should_continue(tuple(mine), [mine, *peers], axis)


@given(points, st.lists(points, max_size=20), axes)
def test_peers_that_are_not_finite_count_as_the_worst(mine, peers, axis) -> None:
    bad = [(math.nan, 0.1), (math.inf, 0.0)]
    assert should_continue(mine, peers, axis) <= should_continue(mine, [*peers, *bad], axis)
    assert should_continue(mine, [*peers, *bad * len(peers)], axis)  # two thirds are worse, whatever the rest is


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_never_goes_on(bad: float) -> None:
    assert not should_continue((bad, 1.0), [])
    assert not should_continue((bad, 1.0), [(bad, 1.0)] * 5)


@given(st.integers(1, 3).flatmap(lambda d: st.lists(st.tuples(*[coordinates] * d), min_size=1, max_size=40)), axes)
def test_a_rung_that_grows_point_by_point_answers_as_one_that_is_sorted_at_once(everyone, axis) -> None:
    axis = None if axis is None else len(everyone[0]) - 1
    rung = Rung(axis)
    for number, point in enumerate(everyone):
        rung.add(number, point)
        assert rung.keeps(number) == should_continue(point, everyone[:number], axis)
    again = tuple(value + 0.05 for value in everyone[0])  # reported once more, after a resume
    rung.add(0, again)
    assert rung.keeps(0) == should_continue(again, everyone[1:], axis)


def test_layers_of_a_growing_rung_are_the_non_dominated_ranks() -> None:
    rng = random.Random(0)
    for dimensions in (2, 3):
        points = [tuple(rng.random() for _ in range(dimensions)) for _ in range(400)]
        rung = Rung()
        for number, point in enumerate(points):
            rung.add(number, point)
            rung.keeps(number)
        found = {point: rank for rank, layer in enumerate(rung._layers) for point in layer.points}
        assert [found[point] for point in points] == pareto.ranks(points)


def test_the_first_at_a_rung_goes_on() -> None:
    assert should_continue((3.0, 5.0), [])


def test_the_end_of_the_front_is_stopped_where_its_bin_has_better_ones() -> None:
    # Ten nets of one bin, each a little cheaper and a little worse: the cheapest has no claim to live for ever.
    front = [(1.0 + 0.1 * i, 0.5 * BIN - 0.001 * i) for i in range(10)]
    front[4] = (0.0, 0.5 * BIN - 0.004)  # now far ahead of those that are dearer
    cheapest, best = front[9], front[4]
    others = [point for point in front if point not in (cheapest, best)]
    assert should_continue(best, [*others, cheapest], axis=1)
    crowd = [(0.5 + 0.01 * i, 0.4 * BIN - 0.001 * i) for i in range(20)]
    assert not should_continue((0.70, 0.4 * BIN - 0.0205), [*crowd, (0.0, 0.3 * BIN)], axis=1)


def test_every_bin_has_a_first_before_any_has_a_second() -> None:
    crowd = [(1.0 - 0.01 * i, 1.5 * BIN + 0.01 * i) for i in range(10)]
    alone = (2.0, 0.5 * BIN)  # worst loss of all, but nobody else is as cheap
    assert should_continue(alone, crowd, axis=1)


@given(st.lists(points, min_size=1, max_size=12, unique=True))
def test_the_same_cut_is_made_with_three_objectives(everyone) -> None:
    three = [(*point, point[0]) for point in everyone]
    on = [should_continue(point, three[:i] + three[i + 1 :], 1) for i, point in enumerate(three)]
    assert sum(on) == math.ceil(KEEP * len(three))


def test_one_trial_in_sixteen_runs_to_the_end_whatever_comes() -> None:
    assert sum(is_exempt(number) for number in range(10 * EXEMPT)) == 10


def test_the_rank_correlation_is_spearmans() -> None:
    early = {0: 5.0, 1: 4.0, 2: 3.0, 3: 2.0}
    assert rank_correlation(early, {0: 9.0, 1: 8.0, 2: 7.0, 3: 1.0}) == pytest.approx(1)
    assert rank_correlation(early, {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}) == pytest.approx(-1)
    # 1 - 6 * (1 + 1) / (4 * 15), one pair swapped
    assert rank_correlation(early, {0: 9.0, 1: 8.0, 2: 1.0, 3: 7.0}) == pytest.approx(0.8)
    assert rank_correlation(early, {0: 9.0, 1: 8.0, 7: 3.0}) is None
    assert rank_correlation(early, dict.fromkeys(early, 1.0)) is None


@given(st.integers(min_value=1, max_value=10**6))
def test_halving_is_on_from_enough_trials_on_unless_the_user_says_otherwise(trials: int) -> None:
    assert stops_early(None, trials) == (trials >= ENOUGH)
    assert stops_early(True, trials)
    assert not stops_early(False, trials)
