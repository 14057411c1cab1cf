from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folora.frontier import Curve, height, hypervolume, on_frontier

PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)
SHARES = st.integers(0, 8).map(lambda n: n / 8)  # coarse, so that ties and duplicates are frequent
POINTS = st.lists(st.tuples(SHARES, SHARES), min_size=1, max_size=8)


def arrays(points: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    x, y = zip(*points, strict=True)
    return np.array(x), np.array(y)


def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] >= other[0] and one[1] >= other[1] and one != other


@PROPERTY
@given(POINTS)
def test_the_frontier_is_what_no_point_beats(points: list[tuple[float, float]]) -> None:
    expected = [not any(beats(other, point) for other in points) for point in points]
    assert on_frontier(*arrays(points)).tolist() == expected


@PROPERTY
@given(POINTS, SHARES)
def test_height_is_the_best_of_all_chords(points: list[tuple[float, float]], at: float) -> None:
    reaching = [y for x, y in points if x >= at]
    chords = [y0 + (y1 - y0) * (at - x0) / (x1 - x0) for (x0, y0), (x1, y1) in product(points, points) if x0 < at <= x1]
    found = float(height(*arrays(points), at))
    assert found == pytest.approx(max([*reaching, *chords])) if reaching else found == -np.inf


@PROPERTY
@given(POINTS, st.tuples(SHARES, SHARES), SHARES)
def test_one_more_point_never_hurts(points: list[tuple[float, float]], more: tuple[float, float], at: float) -> None:
    rounding = 1e-12
    assert height(*arrays([*points, more]), at) >= height(*arrays(points), at) - rounding
    assert hypervolume(*arrays([*points, more]), (0, 0)) >= hypervolume(*arrays(points), (0, 0)) - rounding


@PROPERTY
@given(st.lists(st.tuples(POINTS, SHARES), min_size=1, max_size=3))
def test_leading_axes_are_rows_on_their_own(rows: list[tuple[list[tuple[float, float]], float]]) -> None:
    least = min(len(points) for points, _ in rows)
    x, y = (np.stack(column) for column in zip(*(arrays(points[:least]) for points, _ in rows), strict=True))
    at = np.array([at for _, at in rows])
    found = height(x, y, at)
    assert found.shape == at.shape
    assert found.tolist() == [float(height(*row)) for row in zip(x, y, at, strict=True)]


@pytest.mark.parametrize(
    ("target", "kept", "kl"),
    [(0.0, 0.9, 0.0), (0.1, 0.9, 0.0), (0.3, 0.8, 0.5), (0.5, 0.7, 1.0), (0.6, 0.45, 2.0), (0.7, 0.2, 3.0)],
)
def test_a_curve_is_read_off_between_its_checkpoints(target: float, kept: float, kl: float) -> None:
    curve = Curve(np.array([0.7, 0.1, 0.5, 0.3]), np.array([0.2, 0.9, 0.7, 0.1]), np.array([3.0, 0.0, 1.0, 2.0]))
    assert curve.reach() == 0.7
    assert [float(value) for value in curve.at(np.asarray(target))] == pytest.approx([kept, kl])


def test_each_cost_has_its_own_hull() -> None:
    frugal_and_faithful = Curve(np.array([0.5, 0.5]), np.array([0.2, 0.8]), np.array([0.1, 0.9]))
    assert frugal_and_faithful.at(np.asarray(0.5)) == (0.8, 0.1)


@PROPERTY
@given(POINTS, st.tuples(SHARES, SHARES))
def test_hypervolume_is_the_share_of_cells_below_a_point(
    points: list[tuple[float, float]], origin: tuple[float, float]
) -> None:
    grid = [n / 8 for n in range(9)]
    cells = [(right, top) for (_, right), (_, top) in product(list(pairwise(grid)), repeat=2)]
    inside = [
        cell
        for cell in cells
        if cell[0] > origin[0] and cell[1] > origin[1] and any(x >= cell[0] and y >= cell[1] for x, y in points)
    ]
    assert hypervolume(*arrays(points), origin) == pytest.approx(len(inside) / 64)
