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
class Match:
    """Two methods at one target accuracy that both reach; means over seeds.

    Attributes:
        target: the accuracy.
        kept: kept accuracy of the first there.
        kl: KL of the first there.
        kept_gain: how much more the first keeps than the second.
        kl_ratio: how many times smaller the first's KL is; None where it is zero, as the base model's.
    """

    target: float
    kept: float
    kl: float
    kept_gain: float
    kl_ratio: float | None


@dataclass(frozen=True)
class Arm:
    """A method at its best learning rate.

    Attributes:
        method: name in params.yaml.
        learning_rate: the chosen one.
        figures: means over seeds of ``FIGURES`` and of each kept task (``kept/NAME``), at the last checkpoint.
        matches: the method against every other, by name; only those with all of the reference's seeds.
    """

    method: str
    learning_rate: float
    figures: dict[str, float]
    matches: dict[str, Match]


@dataclass(frozen=True)
class Comparison:
    """All methods on one adaptation."""

    adaptation: str
    base: dict[str, float]
    arms: dict[str, Arm]


def compare(adaptation: str, base: Record, records: list[Record], reference: str) -> Comparison:
    """Compare the methods on one adaptation.

    Two methods are compared at the target accuracy that the reference has at its best rate, or at the highest that
    both reach where that is less.

    Args:
        adaptation: name of the task adapted to.
        base: metrics of the base model.
        records: metrics of every checkpoint of every run on this adaptation.
        reference: the method that sets the target accuracy.
    """
    methods = list(dict.fromkeys(record["method"] for record in records))
    chosen = {method: best_rate([r for r in records if r["method"] == method]) for method in methods}
    finals = {
        method: [r for r in last_checkpoints(records) if (r["method"], r["learning_rate"]) == (method, chosen[method])]
        for method in methods
    }
    targets = {record["seed"]: record["target"] for record in finals[reference]}
    curves = {method: [points(base, records, method, seed) for seed in targets] for method in methods}
    complete = [method for method in methods if all(len(curve) > 1 for curve in curves[method])]
    arms = {
        method: Arm(
            method=method,
            learning_rate=chosen[method],
            figures=mean_figures(finals[method]),
            matches={
                other: match(curves[method], curves[other], list(targets.values()))
                for other in complete
                if method in complete and other != method
            },
        )
        for method in methods
    }
    return Comparison(adaptation, mean_figures([base]), arms)


def match(first: list[list[Point]], second: list[list[Point]], targets: list[float]) -> Match:
    """Compare two methods, given their points and the wanted target accuracy of each seed."""
    rows = []
    for own, others, wanted in zip(first, second, targets, strict=True):
        target = min(wanted, max(p.target for p in own), max(p.target for p in others))
        rows.append((target, *at_target(own, target), *at_target(others, target)))
    target, kept, kl, other_kept, other_kl = (fmean(column) for column in zip(*rows, strict=True))
    return Match(target, kept, kl, kept - other_kept, other_kl / kl if kl > 0 else None)


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
