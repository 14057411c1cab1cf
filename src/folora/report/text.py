"""The comparison as text: cells of tables, one screen for the terminal, Markdown to paste."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folora.errors import redacted
from folora.report.drift import at_best_cells, drift_cells, task_cells
from folora.report.tables import arm_row, mean_rows
from folora.report.verdict import verdict
from folora.selection import BASE

if TYPE_CHECKING:
    from pathlib import Path

    from folora.comparison import Match
    from folora.methods import Method
    from folora.params import Params
    from folora.report.study import Study
    from folora.storage import Record

Columns = dict[str, tuple[str, int]]  # title to key of ``arm_row`` and digits

ARMS: Columns = {
    "method": ("method", 0),
    "rate": ("learning_rate", 0),
    "target": ("target", 2),
    "kept": ("kept", 2),
    "KL": ("kl", 3),
    "perplexity": ("perplexity", 2),
    "area": ("hypervolume", 2),
    "target*": ("matched_target", 2),
    "kept*": ("matched_kept", 2),
    "gain*": ("matched_kept_gain", 2),
    "KL*": ("matched_kl", 3),
    "ratio*": ("matched_kl_ratio", 1),
}
TERMINAL: Columns = {title: column for title, column in ARMS.items() if title not in ("perplexity", "kept*")}
MEANS: Columns = {title: ARMS[title] for title in ("method", "target", "kept", "KL", "perplexity", "gain*")}
MEANS_NOTE = "Means over the adaptations, of the methods that ran on each of them, at the best rate of each."
DRIFT_NOTE = (
    "KL to the base model and perplexity, at the best rate, on text that the base model wrote (heldout) and on others; "
    "95 % bootstrap intervals over the rows of the text."
)
TASKS_NOTE = (
    "The target and every kept task, at the best rate: the mean score, where that is a likelihood its log-loss (mean "
    "of -log score, in nats a token; less is better), and differences on the same items; 95 % bootstrap intervals over "
    "the items."
)
BUDGETS = ["method", "kl_budget", "KL", "greatest KL"]
BUDGETS_NOTE = (
    "Budgets of KL to the base model, and what was measured on the same held-out text: at the best rate (mean over "
    "seeds), and at most over all runs and checkpoints of the method."
)
COSTS_NOTE = (
    "The checkpoint at the best rate. Base weights, of the adapted layers while training: unchanged; trained; or "
    "W - s B₀A₀, without the part that the adapter starts as. An adapter is for the untouched base model all the same; "
    "weights replace its own. Step time and memory depend on the machine: folora cost shows them where the runs were "
    "trained."
)
COSTS_HEAD = ["method", "trained parameters", "base weights", "checkpoint", "rank", "size"]
DIFFERENCES_HEAD = ["method", "kept", "p", "target", "p"]
RATE_NOTE = (
    "↑ (↓): the highest (lowest) rate that was tried was the best, so where the method's best rate lies is not known"
)
AT_BEST_NOTE = "Asked at the best rate only; 95 % bootstrap intervals over the items."
MARKS = {"highest": " ↑", "lowest": " ↓"}  # of a rate, by where it lies among those tried
SHOWN = 10  # methods on the terminal and in the columns of pairs, beside the reference
WIDTH = 100


def matched_note(reference: str) -> str:
    """What the starred columns mean."""
    return (
        f"on the frontier over rates and checkpoints, at the target accuracy of {reference} or the highest that the "
        f"method also reaches: kept accuracy and what it gains over {reference}'s, KL and how many times smaller it is"
    )


def rate_note(study: Study) -> str:
    """What the marks at rates mean; empty where no method has one."""
    return RATE_NOTE if any(arm_row(study, method)["rate_is"] for method in study.comparison.arms) else ""


def differences_note(reference: str) -> str:
    """What the table of ``difference_cells`` shows."""
    return (
        f"Differences from {reference} at the best rates, with 95 % bootstrap intervals; p: McNemar's exact test on "
        "the items, corrected for the number of methods (Holm)."
    )


def area_note(study: Study) -> str:
    """What the column ``area`` means."""
    return (
        f"the hypervolume: what a method's checkpoints dominate in the plane of target and kept accuracy, right of the "
        f"base model's target accuracy ({study.base['target']:.2f}) and above a kept accuracy of 0; mean over seeds. "
        f"More rates or checkpoints can only add to it"
    )


def cells(row: Record, columns: Columns, *, intervals: bool = False) -> list[str]:
    """A row of ``arm_row`` as text.

    Args:
        row: the values.
        columns: which of them.
        intervals: with those over seeds (±) and that of the gain, and a mark at a rate that ``RATE_NOTE`` is about.
    """
    return [_cell(row, key, digits, intervals=intervals) for key, digits in columns.values()]


def _cell(row: Record, key: str, digits: int, *, intervals: bool) -> str:
    value = row.get(key)
    if value is None:
        return "–"
    if key == "learning_rate":
        return f"{value:g}{MARKS.get(row['rate_is'], '') if intervals else ''}"
    if isinstance(value, str):
        return value
    text = f"{value:{'+' if key.endswith('gain') else ''}z.{digits}f}"
    if not intervals:
        return text
    if row.get(f"{key}_half_width") is not None:
        text += f" ± {row[f'{key}_half_width']:.{digits}f}"
    if row.get(f"{key}_low") is not None:
        text += f" [{row[f'{key}_low']:z.{digits}f}, {row[f'{key}_high']:z.{digits}f}]"
    return text


def arm_cells(study: Study) -> list[list[str]]:
    """The base model and every method as cells, after ``ARMS``."""
    return [cells(arm_row(study, method), ARMS, intervals=True) for method in (BASE, *study.comparison.arms)]


def mean_cells(studies: list[Study]) -> list[list[str]]:
    """The base model and the methods that ran on every adaptation as cells, after ``MEANS``; none of one adaptation."""
    return [cells(row, MEANS) for row in mean_rows(studies)] if len(studies) > 1 else []


def difference_cells(study: Study) -> list[list[str]]:
    """Differences from the reference at the best rates as cells: kept and its p, target and its p."""
    columns = {"kept": ("kept_gain", 2), "target": ("target_gain", 2)}
    made = []
    for method in study.comparison.arms:
        row = arm_row(study, method)
        if row["kept_gain"] is not None:
            kept, target = cells(row, columns, intervals=True)
            made.append([method, kept, _p(row["kept_gain_p"]), target, _p(row["target_gain_p"])])
    return made


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def cost_cells(study: Study, params: Params) -> list[list[str]]:
    """What a method trains and what its checkpoint is, as cells, after ``COSTS_HEAD``."""
    made = []
    for method in study.comparison.arms:
        row = arm_row(study, method)
        size = f"{row['bytes'] / 1000:,.0f} kB"
        weights = _base_weights(params.methods[method])
        made.append([method, f"{row['trainable']:,}", weights, row["export"], str(row["rank"] or "–"), size])
    return made


def budget_cells(study: Study) -> list[list[str]]:
    """The methods with a KL budget as cells, after ``BUDGETS``."""
    rows = [arm_row(study, method) for method in study.budgets]
    return [[row["method"], *(f"{row[name]:.3g}" for name in ("kl_budget", "kl", "greatest_kl"))] for row in rows]


def _base_weights(method: Method) -> str:
    """What the base weights are while a method trains, from what its kind declares."""
    if method.export.startswith("weights"):
        return "trained"
    return "unchanged" if method.freezes == "W" else method.freezes


def kept_cells(study: Study) -> list[list[str]]:
    """Accuracy of each kept task as cells, one row a method."""
    figures = {BASE: study.comparison.base} | {name: arm.figures for name, arm in study.comparison.arms.items()}
    return [[method, *(f"{row[f'kept/{task}']:.2f}" for task in study.kept)] for method, row in figures.items()]


def pairs_note(study: Study) -> str:
    """What the table of ``pair_cells`` shows."""
    fit = len(shown_methods(study)) == len(study.comparison.arms)
    others = "every other" if fit else f"{study.reference} and the {SHOWN} best by area"
    return (
        f"Every method (row) against {others} (column) where both have the same target accuracy, that of the "
        "reference or the highest that both reach: what it keeps more, and how many times smaller its KL is."
        f"{'' if fit else ' All pairs: matches.csv.'}"
    )


def pair_cells(study: Study) -> list[list[str]]:
    """Every method (row) against those that fit in the columns, ``shown_methods``, as cells."""
    columns = shown_methods(study)
    return [
        [name, *(_pair(arm.matches[other]) if other in arm.matches else "" for other in columns)]
        for name, arm in study.comparison.arms.items()
    ]


def _pair(match: Match) -> str:
    ratio = "–" if match.kl_ratio is None else f"{match.kl_ratio:.1f}×"
    return f"{match.kept_gain:+z.2f}, {ratio}"


def shown_methods(study: Study, limit: int = SHOWN) -> list[str]:
    """The methods that fit on a screen: all of them, or the reference and those with the most hypervolume."""
    arms = study.comparison.arms
    if len(arms) <= limit + 1:
        return list(arms)
    best = sorted((m for m in arms if m != study.reference), key=lambda method: -arms[method].hypervolume)[:limit]
    return [study.reference, *best]


def summary(studies: list[Study], params: Params, output: Path) -> str:
    """The comparison on one screen of a terminal, and where to look next."""
    from io import StringIO

    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    file = StringIO()
    console = Console(file=file, width=WIDTH)
    for study in studies:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title_justify="left")
        table.title = f"{study.name}: each method at its best learning rate"
        for column in TERMINAL:
            name = column == "method"
            table.add_column(column, justify="left" if name else "right", no_wrap=True, min_width=0 if name else 6)
        methods = shown_methods(study, max(3, SHOWN // len(studies)))
        for method in (BASE, *methods):
            table.add_row(*cells(arm_row(study, method), TERMINAL))
        console.print(table)
        more = len(study.comparison.arms) - len(methods)
        if more:
            console.print(f"The best by area; {more} more in {output / 'summary.csv'}", soft_wrap=True)
        console.print(verdict(study), markup=False)
    console.print(f"* at the target accuracy of {params.report.reference}, or the highest that the method also reaches")
    console.print(f"The page: {output / 'index.html'}   The figure: {output / 'frontier.png'}", soft_wrap=True)
    runs = f"mlflow ui --backend-store-uri {redacted(params.tracking.uri)}"
    console.print(f"Every run: {runs}   Figures: dvc metrics show", soft_wrap=True)
    return file.getvalue()


def markdown(studies: list[Study], params: Params) -> str:
    """The tables of the comparison in Markdown, to paste where results are discussed."""
    parts = []
    for study in studies:
        parts += [f"### {study.name}\n", f"{verdict(study)}\n", _table(list(ARMS), arm_cells(study))]
        parts += [f"\\* {matched_note(study.reference)}\n", f"area: {area_note(study)}\n"]
        marks = rate_note(study)
        parts += [f"{marks}\n"] if marks else []
        parts += [f"{BUDGETS_NOTE}\n", _table(BUDGETS, budget_cells(study))] if study.budgets else []
        parts += [_table(["method", *study.kept], kept_cells(study))]
        differences, note = difference_cells(study), differences_note(study.reference)
        parts += [f"{note}\n", _table(DIFFERENCES_HEAD, differences)] if differences else []
        parts += [f"{COSTS_NOTE}\n", _table(COSTS_HEAD, cost_cells(study, params))]
        tasks = task_cells(study.tasks)
        parts += [f"{TASKS_NOTE}\n", _table(*tasks)] if tasks[1] else []
        parts += [f"{DRIFT_NOTE}\n", _table(*drift_cells(study.drift))]
        parts += [f"{AT_BEST_NOTE}\n", _table(*at_best_cells(study.at_best))] if study.at_best else []
        parts += [f"{pairs_note(study)}\n", _table(["method", *shown_methods(study)], pair_cells(study))]
    if len(studies) > 1:
        parts += ["### Mean\n", f"{MEANS_NOTE}\n", _table(list(MEANS), mean_cells(studies))]
    return "\n".join(parts)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
