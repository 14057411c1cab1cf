"""Methods compared item by item: intervals and tests, from the answers to the same test items.

Each method stands at its best rate and last checkpoint. Items are resampled within every task, and seeds with them
where there are several, the same for all methods, so that a difference is paired. Learning rates stay as chosen, and
KL has no interval: it is measured on text, not on items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from folora.comparison import matched
from folora.frontier import Curve
from folora.selection import BASE
from folora.significance import (
    SEED,
    bootstrap_p,
    holm,
    percentile_interval,
    resampled_accuracy,
    resampled_seeds,
    sign_test,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from folora.comparison import Checkpoint, Comparison
    from folora.storage import Record

    Array = NDArray[np.float64]
    Answers = Mapping[Checkpoint, Mapping[str, Array]]

BASE_CHECKPOINT = (BASE, 0)
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Difference:
    """How much more one method has than another.

    Attributes:
        value: the difference.
        low: lower end of its 95 % interval.
        high: upper end.
        p: that it is zero; corrected for the number of methods compared.
    """

    value: float
    low: float
    high: float
    p: float

    @property
    def significant(self) -> bool:
        """Whether it is told apart from zero."""
        return self.p < SIGNIFICANT


@dataclass(frozen=True)
class Pair:
    """A method against another, means over the seeds of the comparison.

    Attributes:
        kept: mean accuracy on the kept tasks; p of McNemar's exact test on their pooled items.
        target: accuracy on the target task, likewise.
        gain: kept accuracy at a target accuracy that both reach (``Match.kept_gain``); p of the bootstrap.
    """

    kept: Difference
    target: Difference
    gain: Difference


class Pairing:
    """The methods of a comparison on the same resamples of the test items and seeds."""

    def __init__(
        self, comparison: Comparison, base: Record, records: list[Record], answers: Answers, tasks: dict[str, list[str]]
    ) -> None:
        """Resample the items of every task.

        Args:
            comparison: the methods, their best rates and last checkpoints.
            base: metrics of the base model.
            records: metrics of every checkpoint on this adaptation.
            answers: scores, (items,) for each task, of every checkpoint and of ``BASE_CHECKPOINT``.
            tasks: names of the tasks behind the figures ``target`` and ``kept``.
        """
        generator = np.random.default_rng(SEED)
        self._comparison = comparison
        self._answers = answers
        self._tasks = tasks
        self._weights = resampled_seeds(len(comparison.seeds), generator)
        self._records = {BASE_CHECKPOINT: base, **{(record["run"], record["step"]): record for record in records}}
        self._samples = {figure: self._resampled(names, generator) for figure, names in tasks.items()}

    def pairs(self, names: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Pair]:
        """Pairs of methods, those left out that lack a seed; p-values are corrected for the number of pairs."""
        complete = self._comparison.complete
        names = [(method, other) for method, other in names if method in complete and other in complete]
        columns = {
            "kept": _corrected([self._difference(*pair, "kept") for pair in names]),
            "target": _corrected([self._difference(*pair, "target") for pair in names]),
            "gain": _corrected([self._gain(*pair) for pair in names]),
        }
        return {pair: Pair(**{name: column[i] for name, column in columns.items()}) for i, pair in enumerate(names)}

    def interval(self, checkpoint: Checkpoint, figure: str) -> tuple[float, float]:
        """The 95 % interval of a figure of one checkpoint, over the items."""
        return percentile_interval(self._samples[figure][checkpoint])

    def against_base(self) -> dict[tuple[str, str], float]:
        """p-values of McNemar's exact test of every method and kept task against the base; corrected together."""
        base = self._answers[BASE_CHECKPOINT]
        raw = {
            (method, task): sign_test(self._scores(arm.finals.values(), [task]) - base[task])
            for method, arm in self._comparison.arms.items()
            for task in self._tasks["kept"]
        }
        return dict(zip(raw, holm(list(raw.values())), strict=True))

    def _resampled(self, tasks: list[str], generator: np.random.Generator) -> dict[Checkpoint, Array]:
        """(R,) accuracy of every checkpoint, mean over tasks, on each resample of their items."""
        checkpoints = list(self._records)
        each = [
            resampled_accuracy(np.stack([self._answers[checkpoint][task] for checkpoint in checkpoints]), generator)
            for task in tasks
        ]
        return dict(zip(checkpoints, np.mean(each, axis=0).T, strict=True))

    def _difference(self, method: str, other: str, figure: str) -> tuple[float, Array, float]:
        """Difference of a figure at the last checkpoints, its samples and its p-value."""
        pairs = list(zip(self._finals(method), self._finals(other), strict=True))
        value = np.mean([self._records[own][figure] - self._records[its][figure] for own, its in pairs])
        samples = np.stack([self._samples[figure][own] - self._samples[figure][its] for own, its in pairs], axis=-1)
        own_scores, its_scores = (self._scores(self._finals(name), self._tasks[figure]) for name in (method, other))
        return float(value), (samples * self._weights).sum(axis=-1), sign_test(own_scores - its_scores)

    def _gain(self, method: str, other: str) -> tuple[float, Array, float]:
        """Kept accuracy that a method gains at a target accuracy both reach, its samples and its p-value."""
        wanted = [self._samples["target"][checkpoint] for checkpoint in self._finals(self._comparison.reference)]
        _, kept, _, other_kept, _ = matched(self._curves(method), self._curves(other), wanted)
        samples = ((kept - other_kept) * self._weights).sum(axis=-1)
        return self._comparison.arms[method].matches[other].kept_gain, samples, bootstrap_p(samples)

    def _finals(self, method: str) -> list[Checkpoint]:
        return [self._comparison.arms[method].finals[seed] for seed in self._comparison.seeds]

    def _curves(self, method: str) -> list[Curve]:
        """The method's checkpoints on every resample, one curve a seed."""
        curves = []
        for seed in self._comparison.seeds:
            own = [c for c, r in self._records.items() if (r["method"], r["seed"]) == (method, seed)]
            chosen = [BASE_CHECKPOINT, *own]
            target, kept = (np.stack([self._samples[f][c] for c in chosen], axis=-1) for f in ("target", "kept"))
            curves.append(Curve(target, kept, np.array([self._records[c]["kl"] for c in chosen])))
        return curves

    def _scores(self, checkpoints: Iterable[Checkpoint], tasks: list[str]) -> Array:
        """(checkpoints, items of all tasks)."""
        return np.array([np.concatenate([self._answers[c][task] for task in tasks]) for c in checkpoints])


def _corrected(found: list[tuple[float, Array, float]]) -> list[Difference]:
    p_values = holm([p for _, _, p in found])
    return [
        Difference(value, *percentile_interval(samples), p)
        for (value, samples, _), p in zip(found, p_values, strict=True)
    ]
