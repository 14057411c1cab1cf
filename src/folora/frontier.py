"""Frontiers: what a method keeps, and how far it drifts, at each target accuracy it can reach.

A method is a set of checkpoints; the base model (no adaptation) is a checkpoint of every method. Arrays may have
leading axes, one entry a bootstrap resample of the test items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """The checkpoints of one method and seed, the base model first.

    Attributes:
        target: (..., K) accuracy on the target task.
        kept: (..., K) mean accuracy on the kept tasks.
        kl: (K,) KL to the base, in nats per token.
    """

    target: Array
    kept: Array
    kl: Array

    def reach(self) -> Array:
        """(...) the highest target accuracy of a checkpoint."""
        return self.target.max(axis=-1)

    def at(self, target: Array) -> tuple[Array, Array]:
        """Kept accuracy and KL at a target accuracy (...) that a checkpoint reaches.

        Both are read off the hull of the checkpoints, the best straight lines between them: one more checkpoint never
        makes a method look worse.
        """
        kl = np.broadcast_to(self.kl, self.target.shape)
        return height(self.target, self.kept, target), -height(self.target, -kl, target)


def height(x: Array, y: Array, at: Array) -> Array:
    """The height at ``at`` of the upper hull of points, where a point also stands for all that is left of it.

    Args:
        x: (..., K) abscissae.
        y: (..., K) ordinates, greater is better.
        at: (...) none greater than the greatest x.

    Returns:
        (...), or -∞ beyond the last point.
    """
    at = np.asarray(at)[..., None]
    beyond = x >= at
    reached = np.where(beyond, y, -np.inf).max(axis=-1)
    x0, x1 = x[..., :, None], x[..., None, :]
    y0, y1 = y[..., :, None], y[..., None, :]
    between = ~beyond[..., :, None] & beyond[..., None, :]
    share = np.divide(x1 - at[..., None], x1 - x0, out=np.zeros(between.shape), where=between)
    chords = np.where(between, y1 + (y0 - y1) * share, -np.inf)
    return np.maximum(reached, chords.max(axis=(-2, -1)))


def on_frontier(x: Array, y: Array) -> NDArray[np.bool_]:
    """Which of the points (K,) no other beats on one of both without falling behind on the other."""
    x0, y0 = x[:, None], y[:, None]
    beaten = ((x >= x0) & (y >= y0) & ((x > x0) | (y > y0))).any(axis=1)
    return np.asarray(~beaten)


def hypervolume(x: Array, y: Array, origin: tuple[float, float]) -> float:
    """The area above and right of ``origin`` that the points (K,) dominate: the staircase below their frontier."""
    front = on_frontier(x, y) & (x > origin[0]) & (y > origin[1])
    corners = sorted(set(zip(x[front].tolist(), y[front].tolist(), strict=True)))
    area, left = 0.0, origin[0]
    for right, top in corners:  # the frontier falls, so each point tops the strip up to it
        area += (right - left) * (top - origin[1])
        left = right
    return area
