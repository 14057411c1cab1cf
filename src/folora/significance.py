"""Statistics on the scores of answers: resampled accuracies, intervals, exact tests, many comparisons at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.special import bdtr, stdtrit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.float64]

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0


def resampled_accuracy(scores: Array, generator: np.random.Generator) -> Array:
    """Accuracies on resamples of the items, drawn with replacement; every checkpoint sees the same resamples.

    Args:
        scores: (checkpoints, items), 0 or 1 where an answer is right or wrong.
        generator: draws the items.

    Returns:
        (RESAMPLES, checkpoints).
    """
    items = scores.shape[1]
    counts = generator.multinomial(items, np.full(items, 1 / items), size=RESAMPLES)
    return counts.astype(float) @ scores.T / items  # of right and wrong, sums of whole numbers: exact in any order


def resampled_seeds(seeds: int, generator: np.random.Generator) -> Array:
    """(RESAMPLES, seeds) weights of the seeds in resamples of them; each row sums to one."""
    return generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds


def resampled_mean(sums: Array, counts: Array, generator: np.random.Generator) -> Array:
    """Means over all tokens of a text on resamples of its rows, drawn with replacement.

    Args:
        sums: (rows,) of the values of a row's tokens.
        counts: (rows,) how many tokens each has.
        generator: draws the rows.

    Returns:
        (RESAMPLES,).
    """
    rows = len(sums)
    drawn = generator.multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES)
    return np.asarray((drawn @ sums) / (drawn @ counts))


def percentile_interval(samples: Array) -> tuple[float, float]:
    """The middle ``LEVEL`` of bootstrap samples (R,)."""
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def bootstrap_p(samples: Array) -> float:
    """Two-sided p-value of "the difference is zero" from its bootstrap samples (R,); at least 2 / (R + 1)."""
    tail = min(int((samples <= 0).sum()), int((samples >= 0).sum()))
    return min(1.0, 2 * (tail + 1) / (len(samples) + 1))


def sign_test(differences: Array) -> float:
    """Two-sided exact sign test. For one seed it is McNemar's exact test of two methods on the same items.

    Args:
        differences: (seeds, items), scores of the one minus those of the other. An item counts for the method with
            the greater sum over seeds, since its answers over seeds are not independent.
    """
    signs = np.sign(differences.sum(axis=0))
    more, fewer = int((signs > 0).sum()), int((signs < 0).sum())
    return min(1.0, 2 * float(bdtr(min(more, fewer), more + fewer, 0.5)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm, 1979): the chance of one false finding among all stays below each."""
    adjusted = [0.0] * len(p_values)
    greatest = 0.0
    for rank, position in enumerate(np.argsort(p_values, kind="stable")):
        greatest = max(greatest, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = greatest
    return adjusted


def t_half_width(values: Sequence[float]) -> float | None:
    """Half of the ``LEVEL`` t interval of a mean over seeds; None for a single seed."""
    n = len(values)
    if n < 2:
        return None
    return float(stdtrit(n - 1, (1 + LEVEL) / 2) * np.std(values, ddof=1) / np.sqrt(n))
