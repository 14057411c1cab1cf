"""The comparison of methods, from the metrics of every checkpoint: plain values, no files.

A method's learning rate is chosen on the validation split of the target task, at the last checkpoint, averaged over
seeds; a tie goes to the smaller rate. Everything reported comes from the test split.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

from folora.frontier import Point, at_target

Record = dict[str, Any]
FIGURES = ("target", "validation", "kept", "kl", "perplexity")


@dataclass(frozen=True)
class Arm:
    """A method at its best learning rate.

    Attributes:
        method: name in params.yaml.
        learning_rate: the chosen one.
        figures: means over seeds of ``FIGURES`` and of each kept task (``kept/NAME``), at the last checkpoint.
        matched_kept: kept accuracy at the reference's target accuracy, mean over its seeds; None where not reached.
        matched_kl: KL there.
    """

    method: str
    learning_rate: float
    figures: dict[str, float]
    matched_kept: float | None
    matched_kl: float | None


@dataclass(frozen=True)
class Comparison:
    """All methods on one adaptation."""

    adaptation: str
    base: dict[str, float]
    matched_target: float
    arms: dict[str, Arm]


def compare(adaptation: str, base: Record, records: list[Record], reference: str) -> Comparison:
    """Compare the methods on one adaptation.

    Args:
        adaptation: name of the task adapted to.
        base: metrics of the base model.
        records: metrics of every checkpoint of every run on this adaptation.
        reference: the method whose target accuracy the others are compared at.
    """
    methods = list(dict.fromkeys(record["method"] for record in records))
    chosen = {method: best_rate([r for r in records if r["method"] == method]) for method in methods}
    finals = {
        method: [r for r in last_checkpoints(records) if (r["method"], r["learning_rate"]) == (method, chosen[method])]
        for method in methods
    }
    targets = {record["seed"]: record["target"] for record in finals[reference]}
    arms = {}
    for method in methods:
        matched = [at_target(points(base, records, method, seed), target) for seed, target in targets.items()]
        reached = [pair for pair in matched if pair is not None]
        complete = len(reached) == len(targets)
        arms[method] = Arm(
            method=method,
            learning_rate=chosen[method],
            figures=mean_figures(finals[method]),
            matched_kept=fmean(kept for kept, _ in reached) if complete else None,
            matched_kl=fmean(kl for _, kl in reached) if complete else None,
        )
    return Comparison(adaptation, mean_figures([base]), fmean(targets.values()), arms)


def points(base: Record, records: list[Record], method: str, seed: int) -> list[Point]:
    """The points of one method and seed, the base among them."""
    chosen = [r for r in records if r["method"] == method and r["seed"] == seed]
    return [Point(r["target"], r["kept"], r["kl"]) for r in (base, *chosen)]


def last_checkpoints(records: list[Record]) -> list[Record]:
    """The last checkpoint of every run."""
    last: dict[str, Record] = {}
    for record in records:
        if record["run"] not in last or record["step"] > last[record["run"]]["step"]:
            last[record["run"]] = record
    return list(last.values())


def best_rate(records: list[Record]) -> float:
    """The learning rate with the best mean validation accuracy at the last checkpoint; a tie goes to the smaller."""
    by_rate: dict[float, list[float]] = {}
    for record in last_checkpoints(records):
        by_rate.setdefault(record["learning_rate"], []).append(record["validation"])
    return min(by_rate, key=lambda rate: (-fmean(by_rate[rate]), rate))


def mean_figures(records: list[Record]) -> dict[str, float]:
    """Means over seeds of every figure."""
    names = [*FIGURES, *(name for name in records[0] if name.startswith("kept/"))]
    return {name: fmean(record[name] for record in records) for name in names}
