"""The comparison of methods, from the metrics of every checkpoint: plain values, no files.

Everything reported comes from the test split.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from folora.frontier import Curve, hypervolume
from folora.selection import best_finals
from folora.significance import t_half_width

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from folora.storage import Record

    Array = NDArray[np.float64]

Checkpoint = tuple[str, int]  # run and step
FIGURES = ("target", "validation", "kept", "kl", "perplexity")
SPREAD = ("target", "kept", "kl")  # figures with an interval over seeds


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
        finals: the last checkpoint at that rate, by seed.
        figures: means over seeds, at the last checkpoint, of ``FIGURES``, of each kept task (``kept/NAME``), of each
            task asked at the best rate only (``best/NAME``), of drift on further texts (``kl/NAME``,
            ``perplexity/NAME``).
        half_widths: of the 95 % t interval over seeds of ``SPREAD``; empty with one seed.
        hypervolume: mean over seeds of the area that its checkpoints dominate in target and kept accuracy, beyond the
            base model's target accuracy and a kept accuracy of zero.
        matches: the method against every other, by name; only those with all of the reference's seeds.
    """

    method: str
    learning_rate: float
    finals: dict[int, Checkpoint]
    figures: dict[str, float]
    half_widths: dict[str, float]
    hypervolume: float
    matches: dict[str, Match]


@dataclass(frozen=True)
class Comparison:
    """All methods on one adaptation.

    Attributes:
        adaptation: name of the task adapted to.
        reference: the method that sets the target accuracy.
        seeds: those of the reference: methods are compared on them.
        complete: the methods that have them all.
        base: figures of the base model.
        arms: the methods, by name.
    """

    adaptation: str
    reference: str
    seeds: list[int]
    complete: list[str]
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
    own = {method: [r for r in records if r["method"] == method] for method in (r["method"] for r in records)}
    finals = {method: best_finals(own[method]) for method in own}
    seeds = list(finals[reference])
    wanted = [np.asarray(final["target"]) for final in finals[reference].values()]
    complete = [method for method in own if set(seeds) <= finals[method].keys()]
    curves = {method: [seed_curve(base, own[method], seed) for seed in seeds] for method in complete}
    arms = {}
    for method in own:
        others = [other for other in complete if other != method and method in complete]
        matches = {other: match(curves[method], curves[other], wanted) for other in others}
        arms[method] = _arm(base, own[method], finals[method], matches)
    return Comparison(adaptation, reference, seeds, complete, mean_figures([base]), arms)


def _arm(base: Record, records: list[Record], finals: dict[int, Record], matches: dict[str, Match]) -> Arm:
    last = list(finals.values())
    curves = [seed_curve(base, records, seed) for seed in finals]
    widths = {name: t_half_width([final[name] for final in last]) for name in SPREAD}
    return Arm(
        method=last[0]["method"],
        learning_rate=last[0]["learning_rate"],
        finals={seed: (final["run"], final["step"]) for seed, final in finals.items()},
        figures=mean_figures(last),
        half_widths={name: width for name, width in widths.items() if width is not None},
        hypervolume=fmean(hypervolume(c.target, c.kept, (base["target"], 0.0)) for c in curves),
        matches=matches,
    )


def match(first: list[Curve], second: list[Curve], wanted: list[Array]) -> Match:
    """Compare two methods, given their curves and the wanted target accuracy of each seed."""
    target, kept, kl, other_kept, other_kl = (float(np.mean(c)) for c in matched(first, second, wanted))
    return Match(target, kept, kl, kept - other_kept, other_kl / kl if kl > 0 else None)


def matched(first: list[Curve], second: list[Curve], wanted: list[Array]) -> list[Array]:
    """Two methods at the wanted target accuracy (...) of each seed, or at the highest that both reach there.

    Returns:
        That target accuracy, kept accuracy and KL of the first, and those of the second: (..., seeds) each.
    """
    columns = []
    for own, others, most in zip(first, second, wanted, strict=True):
        target = np.minimum(most, np.minimum(own.reach(), others.reach()))
        columns.append((target, *own.at(target), *others.at(target)))
    return [np.stack(column, axis=-1) for column in zip(*columns, strict=True)]


def seed_curve(base: Record, records: list[Record], seed: int) -> Curve:
    """The base model and all checkpoints of one seed of a method."""
    chosen = [base, *(record for record in records if record["seed"] == seed)]
    return Curve(*(np.array([record[name] for record in chosen]) for name in ("target", "kept", "kl")))


def mean_figures(records: list[Record]) -> dict[str, float]:
    """Means over seeds of every figure."""
    names = [*FIGURES, *(name for name in records[0] if "/" in name)]
    return {name: fmean(record[name] for record in records) for name in names}
