"""Drift on texts, and what is asked at the best rate only: each method at its best rate, with intervals.

Rows of a text and items of a task are resampled, and seeds where there are several.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from folora.paired import BASE_CHECKPOINT
from folora.report.inputs import read_tokens
from folora.rows import HELDOUT
from folora.selection import BASE
from folora.significance import SEED, percentile_interval, resampled_accuracy, resampled_mean, resampled_seeds

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from folora.comparison import Checkpoint, Comparison
    from folora.report.inputs import Inputs, Tokens
    from folora.storage import Record

    Array = NDArray[np.float64]
    Sample = Callable[[np.random.Generator], Array]  # of one checkpoint, (RESAMPLES,)

FIGURES = {"kl": ("KL", 3), "perplexity": ("perplexity", 2)}  # title and digits


def drift_rows(comparison: Comparison, inputs: Inputs) -> list[Record]:
    """One row a method and text: ``kl`` and ``perplexity``, each with ``_low`` and ``_high``; the base model first."""
    rows = []
    for method, checkpoints in _finals(comparison).items():
        tokens = [read_tokens(inputs.evaluations / method, checkpoint) for checkpoint in checkpoints]
        for text in tokens[0]:
            row: Record = {"adaptation": comparison.adaptation, "method": method, "text": text}
            for figure in FIGURES:
                row |= _interval(figure, [_sampling(one[text], figure) for one in tokens])
            rows.append(row)
    return rows


def kl_interval(inputs: Inputs, method: str, checkpoint: Checkpoint) -> tuple[float, float]:
    """The 95 % interval of one checkpoint's KL on the held-out text, over its rows."""
    _, sample = _sampling(read_tokens(inputs.evaluations / method, checkpoint)[HELDOUT], "kl")
    return percentile_interval(sample(np.random.default_rng(SEED + 1)))


def at_best_rows(comparison: Comparison, inputs: Inputs, tasks: list[str]) -> list[Record]:
    """One row a method and task asked at the best rate only: ``score`` with its ends; the base model first."""
    answers = inputs.answers[comparison.adaptation]
    rows = []
    for method, checkpoints in _finals(comparison).items():
        for task in tasks:
            samplings = [_sampling_items(answers[checkpoint][task]) for checkpoint in checkpoints]
            row: Record = {"adaptation": comparison.adaptation, "method": method, "task": task}
            rows.append(row | _interval("score", samplings))
    return rows


def _finals(comparison: Comparison) -> dict[str, list[Checkpoint]]:
    arms = comparison.arms.values()
    return {BASE: [BASE_CHECKPOINT]} | {arm.method: list(arm.finals.values()) for arm in arms}


def _sampling(tokens: Tokens, figure: str) -> tuple[float, Sample]:
    """A figure of a text, and how to sample it."""
    sums = tokens.kl if figure == "kl" else tokens.loss
    scale = np.exp if figure == "perplexity" else np.asarray
    value = float(scale(sums.sum() / tokens.counts.sum()))
    return value, lambda generator: scale(resampled_mean(sums, tokens.counts, generator))


def _sampling_items(scores: Array) -> tuple[float, Sample]:
    return float(scores.mean()), lambda generator: resampled_accuracy(scores[None], generator)[:, 0]


def _interval(name: str, seeds: list[tuple[float, Sample]]) -> Record:
    """The mean over seeds and the ends of its interval; all methods see the same resamples."""
    weights = resampled_seeds(len(seeds), np.random.default_rng(SEED))
    samples = np.stack([sample(np.random.default_rng(SEED + 1)) for _, sample in seeds], axis=-1)
    low, high = percentile_interval((samples * weights).sum(axis=-1))
    return {name: float(np.mean([value for value, _ in seeds])), f"{name}_low": low, f"{name}_high": high}


def drift_cells(rows: list[Record]) -> tuple[list[str], list[list[str]]]:
    """Head and body of a table, a row a method; an empty body without rows."""
    return _table(rows, "text", FIGURES)


def at_best_cells(rows: list[Record]) -> tuple[list[str], list[list[str]]]:
    """Likewise of the tasks that are asked at the best rate only."""
    return _table(rows, "task", {"score": ("", 2)})


def _table(rows: list[Record], by: str, figures: dict[str, tuple[str, int]]) -> tuple[list[str], list[list[str]]]:
    """Figures (columns) of everything that ``by`` names, a row a method."""
    cells = {
        (row["method"], row[by]): [_cell(row, name, digits) for name, (_, digits) in figures.items()] for row in rows
    }
    names = list(dict.fromkeys(row[by] for row in rows))
    head = [f"{title}, {name}" if title else name for name in names for title, _ in figures.values()]
    methods = dict.fromkeys(row["method"] for row in rows)
    return ["method", *head], [
        [method, *(cell for name in names for cell in cells[method, name])] for method in methods
    ]


def _cell(row: Record, name: str, digits: int) -> str:
    value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
