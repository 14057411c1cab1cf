from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folora.frontier import Point, at_target, pareto

if TYPE_CHECKING:
    from random import Random

PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)
shares = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0])  # few values, so that ties are common
clouds = st.lists(st.builds(Point, target=shares, kept=shares, kl=shares), min_size=1, max_size=12)
costs = st.sampled_from(["kept", "kl"])


def quality(point: Point, cost: str) -> float:
    return point.kept if cost == "kept" else -point.kl


def beats(one: Point, other: Point, cost: str) -> bool:
    pairs = [(one.target, other.target), (quality(one, cost), quality(other, cost))]
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


@PROPERTY
@given(clouds, costs)
def test_frontier_is_what_no_point_beats(points: list[Point], cost: str) -> None:
    found = {(p.target, quality(p, cost)) for p in pareto(points, cost)}
    unbeaten = [p for p in points if not any(beats(other, p, cost) for other in points)]
    assert found == {(p.target, quality(p, cost)) for p in unbeaten}
    assert set(pareto(points, cost)) <= set(points)


@PROPERTY
@given(clouds, costs)
def test_frontier_trades_target_for_quality(points: list[Point], cost: str) -> None:
    frontier = pareto(points, cost)
    for lower, higher in itertools.pairwise(frontier):
        assert lower.target < higher.target
        assert quality(lower, cost) > quality(higher, cost)


@PROPERTY
@given(clouds, costs, st.randoms(use_true_random=False))
def test_frontier_depends_on_neither_order_nor_repetition(points: list[Point], cost: str, random: Random) -> None:
    frontier = pareto(points, cost)
    shuffled = points * 2
    random.shuffle(shuffled)
    found = pareto(shuffled, cost)
    assert [(p.target, quality(p, cost)) for p in found] == [(p.target, quality(p, cost)) for p in frontier]
    assert pareto(frontier, cost) == frontier


@PROPERTY
@given(clouds, shares)
def test_at_target_is_between_the_ends_or_out_of_reach(points: list[Point], target: float) -> None:
    if target > max(p.target for p in points):
        with pytest.raises(ValueError, match="no point reaches"):
            at_target(points, target)
        return
    kept, kl = at_target(points, target)
    enough = [p for p in points if p.target >= target]
    rounding = 1e-12
    assert max(p.kept for p in enough) - rounding <= kept <= max(p.kept for p in points) + rounding
    assert min(p.kl for p in enough) + rounding >= kl >= min(p.kl for p in points) - rounding


def test_each_cost_has_its_own_frontier() -> None:
    frugal, faithful = Point(0.5, kept=0.2, kl=0.1), Point(0.5, kept=0.8, kl=0.9)
    assert pareto([frugal, faithful], "kept") == [faithful]
    assert pareto([frugal, faithful], "kl") == [frugal]
    assert at_target([frugal, faithful], 0.5) == (0.8, 0.1)


@pytest.mark.parametrize(
    ("target", "kept", "kl"),
    [(0.0, 0.9, 0.0), (0.1, 0.9, 0.0), (0.3, 0.8, 0.5), (0.5, 0.7, 1.0), (0.6, 0.45, 2.0), (0.7, 0.2, 3.0)],
)
def test_interpolates_linearly_between_points(target: float, kept: float, kl: float) -> None:
    points = [Point(0.7, 0.2, 3.0), Point(0.1, 0.9, 0.0), Point(0.5, 0.7, 1.0), Point(0.3, 0.1, 2.0)]
    assert at_target(points, target) == (pytest.approx(kept), pytest.approx(kl))


def test_nothing_reaches_beyond_the_last_point() -> None:
    assert at_target([Point(0.7, 0.2, 3.0)], 0.7) == (0.2, 3.0)
    for points in ([Point(0.7, 0.2, 3.0)], []):
        with pytest.raises(ValueError, match="no point reaches"):
            at_target(points, 0.7001)


def test_one_more_checkpoint_never_hurts() -> None:
    ends = [Point(0.0, 1.0, 0.0), Point(1.0, 0.0, 2.0)]
    with_more = at_target([*ends, Point(0.5, 0.1, 1.9)], 0.5)
    assert with_more == at_target(ends, 0.5) == (0.5, 1.0)
