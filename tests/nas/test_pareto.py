from hypothesis import given
from hypothesis import strategies as st

from hypernas import pareto

cost = st.integers(0, 6).map(float)
points = st.lists(st.tuples(cost, cost), max_size=12)


@given(points)
def test_front_holds_exactly_the_points_nobody_dominates(points: list[tuple[float, float]]) -> None:
    kept = pareto.front(points)
    values = {points[i] for i in kept}
    assert len(values) == len(kept)  # equal points count once
    assert values == {p for p in points if not any(pareto.dominates(q, p) for q in points)}


@given(points)
def test_hypervolume_counts_the_unit_cells_below_the_reference(points: list[tuple[float, float]]) -> None:
    cells = sum(any(x <= i and y <= j for x, y in points) for i in range(5) for j in range(5))
    assert abs(pareto.hypervolume(points, (5.0, 5.0)) - cells) < 1e-9


@given(points, st.tuples(cost, cost))
def test_hypervolume_never_falls_when_a_point_is_added(
    points: list[tuple[float, float]], point: tuple[float, float]
) -> None:
    before = pareto.hypervolume(points, (7.0, 7.0))
    assert pareto.hypervolume([*points, point], (7.0, 7.0)) >= before - 1e-12


def test_accuracy_is_better_when_larger_and_flops_count_by_their_logarithm() -> None:
    assert pareto.cost("accuracy", 0.9) < pareto.cost("accuracy", 0.8)
    assert pareto.cost("flops_per_token", 1000.0) == 3.0
    assert pareto.costs(("bits_per_byte", "flops_per_token"), {"flops_per_token": 10.0, "bits_per_byte": 2.0}) == (2, 1)
