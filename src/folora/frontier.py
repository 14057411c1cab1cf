"""Frontiers: what a method keeps, and how far it drifts, at each target accuracy it can reach.

A method is a set of points, one a checkpoint of a run. The base model (no adaptation) is a point of every method.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """One checkpoint: target accuracy, kept accuracy and KL to the base in nats per token."""

    target: float
    kept: float
    kl: float


def pareto(points: list[Point], cost: str) -> list[Point]:
    """The points that no other beats on both target and ``cost``, by ascending target.

    Args:
        points: any points.
        cost: ``kept`` (greater is better) or ``kl`` (less is better).
    """

    def quality(point: Point) -> float:
        return point.kept if cost == "kept" else -point.kl

    frontier: list[Point] = []
    for point in sorted(points, key=lambda p: (p.target, quality(p)), reverse=True):
        if not frontier or quality(point) > quality(frontier[-1]):
            frontier.append(point)
    return frontier[::-1]


def at_target(points: list[Point], target: float) -> tuple[float, float]:
    """Kept accuracy and KL of a method at a target accuracy.

    Both are read off the hull of the points, the best straight lines between them: one more point never makes a
    method look worse.

    Returns:
        (kept, KL).

    Raises:
        ValueError: no point reaches the target.
    """
    if not points or max(point.target for point in points) < target:
        raise ValueError(f"no point reaches the target accuracy {target}")
    kept = _upper_hull([(p.target, p.kept) for p in pareto(points, "kept")], target)
    kl = -_upper_hull([(p.target, -p.kl) for p in pareto(points, "kl")], target)
    return kept, kl


def _upper_hull(curve: list[tuple[float, float]], x: float) -> float:
    """The height of the upper hull of a falling curve at ``x``, which is at most the last abscissa."""
    if x <= curve[0][0]:
        return curve[0][1]
    return max(y1 + (y0 - y1) * (x1 - x) / (x1 - x0) for x0, y0 in curve if x0 < x for x1, y1 in curve if x1 >= x)
