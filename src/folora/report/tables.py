"""The comparison as rows of values: for CSV, JSON, figures and text."""

from __future__ import annotations

from dataclasses import asdict, fields
from statistics import fmean
from typing import TYPE_CHECKING, Any

from folora.comparison import FIGURES, SPREAD, Match, seed_curve
from folora.frontier import on_frontier
from folora.report.spectra import gated_method, spectrum_rows
from folora.selection import BASE

if TYPE_CHECKING:
    from folora.params import Params
    from folora.report.inputs import Inputs
    from folora.report.study import Study
    from folora.storage import Record

COSTS = ("trainable", "export", "rank", "bytes")
METRICS = ("target", "kept", "kl", "perplexity")
AVERAGED = (*METRICS, "matched_kept_gain")  # a rate or a matched target accuracy has no meaning across adaptations
BEYOND = ("hypervolume", "matched_kept_gain_low", "matched_kept_gain_high")  # what metrics.json also has of an arm


def arm_row(study: Study, method: str) -> Record:
    """All that is known of a method, or of the base model, in one flat row; None where there is nothing."""
    row: Record = {"adaptation": study.name, "method": method}
    if method == BASE:
        return row | {"learning_rate": None, "rate_is": None} | study.comparison.base
    arm = study.comparison.arms[method]
    row |= {"learning_rate": arm.learning_rate, "rate_is": _end_of_rates(study, method), **arm.figures}
    row |= {f"{name}_half_width": arm.half_widths.get(name) for name in SPREAD}
    row |= {"hypervolume": arm.hypervolume}
    match = arm.matches.get(study.reference)
    row |= {f"matched_{field.name}": getattr(match, field.name, None) for field in fields(Match)}
    pair = study.pairs.get((method, study.reference))
    for name, figure in (("matched_kept_gain", "gain"), ("kept_gain", "kept"), ("target_gain", "target")):
        difference = getattr(pair, figure, None)
        row |= {name: getattr(difference, "value", None)}
        row |= {f"{name}_{part}": getattr(difference, part, None) for part in ("low", "high", "p")}
    final = next(iter(arm.finals.values()))
    row |= {name: study.record(final)[name] for name in COSTS}
    if method in study.budgets:
        kls = [record["kl"] for record in study.records if record["method"] == method]
        row |= {"kl_budget": study.budgets[method], "greatest_kl": max(kls)}
    return row


def _end_of_rates(study: Study, method: str) -> str | None:
    """Whether the best rate is the ``highest`` or the ``lowest`` of several that were tried."""
    rates = {record["learning_rate"] for record in study.records if record["method"] == method}
    ends = {max(rates): "highest", min(rates): "lowest"} if len(rates) > 1 else {}
    return ends.get(study.comparison.arms[method].learning_rate)


def summary_rows(studies: list[Study]) -> list[Record]:
    """One row for the base model and each method, all with the same keys."""
    rows = [arm_row(study, method) for study in studies for method in (BASE, *study.comparison.arms)]
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def metrics(studies: list[Study]) -> dict[str, Any]:
    """``{"base", "arms"}``; of several adaptations their means, and each by itself under ``adaptations``.

    DVC drops nulls when it shows metrics, so what has no value has no key.
    """
    each = {study.name: _metrics(study) for study in studies}
    if len(each) == 1:
        return each[studies[0].name]
    arms = {row.pop("method"): row for row in mean_rows(studies)}
    base = {name: value for name, value in arms.pop(BASE).items() if name != "kl"}
    return {"base": base, "arms": arms, "adaptations": each}


def _metrics(study: Study) -> dict[str, Any]:
    arms = {}
    for method in study.comparison.arms:
        row = arm_row(study, method)
        names = [*METRICS, *(f"matched_{field.name}" for field in fields(Match)), *BEYOND]
        arms[method] = {"lr": row["learning_rate"]} | {name: row[name] for name in names if row[name] is not None}
    return {"base": {name: study.base[name] for name in METRICS if name != "kl"}, "arms": arms}


def mean_rows(studies: list[Study]) -> list[Record]:
    """One row for the base model and each method that ran on every adaptation: means of its figures over them."""
    shared = [name for name in studies[0].comparison.arms if all(name in study.comparison.arms for study in studies)]
    each = {method: [arm_row(study, method) for study in studies] for method in (BASE, *shared)}
    return [{"method": method, **_means(rows)} for method, rows in each.items()]


def _means(rows: list[Record]) -> dict[str, float]:
    """Means of the figures that all rows have."""
    names = [name for name in AVERAGED if all(row.get(name) is not None for row in rows)]
    return {name: fmean(row[name] for row in rows) for name in names}


def match_rows(studies: list[Study]) -> list[Record]:
    """One row for each ordered pair of methods."""
    return [
        {"adaptation": study.name, "method": arm.method, "other": other, **asdict(match)}
        for study in studies
        for arm in study.comparison.arms.values()
        for other, match in arm.matches.items()
    ]


def figure_rows(params: Params, inputs: Inputs, study: Study) -> dict[str, list[Record]]:
    """The rows behind every figure of a study, by its name; without runs or spectra theirs are left out."""
    rows = {"frontier": checkpoint_rows(study), "kept": kept_rows(study)}
    if inputs.histories:
        rows["training"] = history_rows(study, inputs.histories)
    if inputs.spectra:
        rows["spectrum"] = spectrum_rows(inputs.spectra[study.name], gated_method(params)[1])
    return rows


def checkpoint_rows(study: Study) -> list[Record]:
    """One row a checkpoint, the base first, and whether it lies on its seed's frontier of kept accuracy or of KL.

    The last ones at a method's best rate have intervals too, as in ``kept_low`` and ``kept_high``.
    """
    names = ("adaptation", "method", "learning_rate", "seed", "step", *FIGURES)
    none = {f"{figure}_{end}": None for figure in SPREAD for end in ("low", "high")}
    rows = [{name: study.base[name] for name in names} | {"frontier_kept": True, "frontier_kl": True} | none]
    for method, seed in dict.fromkeys((record["method"], record["seed"]) for record in study.records):
        own = [record for record in study.records if (record["method"], record["seed"]) == (method, seed)]
        curve = seed_curve(study.base, own, seed)
        by_kept, by_kl = (on_frontier(curve.target, quality)[1:].tolist() for quality in (curve.kept, -curve.kl))
        for record, kept, kl in zip(own, by_kept, by_kl, strict=True):
            ends = study.intervals.get((record["run"], record["step"]), {})
            found = {
                f"{figure}_{end}": pair[i] for figure, pair in ends.items() for i, end in enumerate(("low", "high"))
            }
            front = {"frontier_kept": kept, "frontier_kl": kl}
            rows.append({name: record[name] for name in names} | front | none | found)
    return rows


def kept_rows(study: Study) -> list[Record]:
    """One row a method and kept task: accuracy, its change from the base model's and the p-value of that."""
    rows = []
    for method, arm in study.comparison.arms.items():
        for task in study.kept:
            accuracy, base = arm.figures[f"kept/{task}"], study.comparison.base[f"kept/{task}"]
            row = {"adaptation": study.name, "method": method, "task": task, "accuracy": accuracy, "base": base}
            rows.append(row | {"change": accuracy - base, "p": study.kept_p[method, task]})
    return rows


def history_rows(study: Study, histories: dict[str, list[Record]]) -> list[Record]:
    """The forgetting meter over training, a row a reading, of every method at its best rate."""
    return [
        {"adaptation": study.name, "method": method, "seed": seed}
        | {name: row[name] for name in ("step", "loss", "penalty", "utility", "kl")}
        for method, arm in study.comparison.arms.items()
        for seed, (run, _) in arm.finals.items()
        for row in histories[run]
    ]
