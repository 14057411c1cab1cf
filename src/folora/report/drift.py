"""Drift on texts, and scores of tasks one by one: each method at its best rate, with intervals.

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
    from folora.paired import Answers
    from folora.report.inputs import Inputs, Tokens
    from folora.storage import Record

    Array = NDArray[np.float64]
    Sample = Callable[[np.random.Generator], Array]  # of one checkpoint, (RESAMPLES,)

FIGURES = {"kl": ("KL", 3), "perplexity": ("perplexity", 2)}  # title and digits
TASK_FIGURES = ("score", "log_loss", "score_difference", "log_loss_difference")


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


def task_rows(comparison: Comparison, inputs: Inputs, tasks: list[str], subject: str) -> list[Record]:
    """One row a task and method, the base model first: ``TASK_FIGURES``, each with its ends.

    A difference is what ``subject`` has more than the method on the same items, over the seeds of the reference. None
    is what there is not: the log-loss (mean of -log score) where scores are no likelihoods, a difference without those.
    """
    ends = [f"{figure}{end}" for figure in TASK_FIGURES for end in ("", "_low", "_high")]
    rows = []
    for task in tasks:
        found = _task_figures(comparison, inputs.answers[comparison.adaptation], task, subject)
        for method, figures in found.items():
            row: Record = {"adaptation": comparison.adaptation, "method": method, "task": task, "subject": subject}
            rows.append(row | dict.fromkeys(ends) | figures)
    return rows


def _task_figures(comparison: Comparison, answers: Answers, task: str, subject: str) -> dict[str, Record]:
    """The figures of a task, by method."""
    finals, pairs = _finals(comparison), _pairs(comparison, subject)
    scores = {one: answers[one][task] for checkpoints in finals.values() for one in checkpoints}
    figures = {"score": scores}
    if 0 < min(own.min() for own in scores.values()) < 1:  # what is right or wrong, or an F1, has zeros
        figures["log_loss"] = {one: -np.log(own) for one, own in scores.items()}
    values: dict[tuple[str, str], Array] = {}  # (seeds, items) by method and figure
    for name, each in figures.items():
        values |= {(method, name): np.stack([each[one] for one in own]) for method, own in finals.items()}
        values |= {
            (method, f"{name}_difference"): np.stack([each[subjects] - each[its] for subjects, its in own])
            for method, own in pairs.items()
        }
    # in one go, since drawing takes longest
    samples = resampled_accuracy(np.concatenate(list(values.values())), np.random.default_rng(SEED + 1))
    parts = np.split(samples, np.cumsum([len(own) for own in values.values()])[:-1], axis=1)
    found: dict[str, Record] = {method: {} for method in finals}
    for ((method, name), own), part in zip(values.items(), parts, strict=True):
        found[method] |= _over_seeds(name, float(own.mean()), part)
    return found


def _pairs(comparison: Comparison, subject: str) -> dict[str, list[tuple[Checkpoint, Checkpoint]]]:
    """The subject's checkpoints beside those of every other method and the base, on the seeds that are compared."""
    if subject not in comparison.complete:
        return {}
    seeds, arms = comparison.seeds, comparison.arms
    finals = {BASE: dict.fromkeys(seeds, BASE_CHECKPOINT)} | {name: arms[name].finals for name in comparison.complete}
    own = finals.pop(subject)
    return {method: [(own[seed], its[seed]) for seed in seeds] for method, its in finals.items()}


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
    samples = np.stack([sample(np.random.default_rng(SEED + 1)) for _, sample in seeds], axis=-1)
    return _over_seeds(name, float(np.mean([value for value, _ in seeds])), samples)


def _over_seeds(name: str, value: float, samples: Array) -> Record:
    """A figure and the ends of its interval, from its samples (RESAMPLES, seeds)."""
    weights = resampled_seeds(samples.shape[1], np.random.default_rng(SEED))
    low, high = percentile_interval((samples * weights).sum(axis=-1))
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def drift_cells(rows: list[Record]) -> tuple[list[str], list[list[str]]]:
    """Head and body of a table, a row a method; an empty body without rows."""
    return _table(rows, "text", FIGURES)


def at_best_cells(rows: list[Record]) -> tuple[list[str], list[list[str]]]:
    """Likewise of the tasks that are asked at the best rate only."""
    return _table(rows, "task", {"score": ("", 2)})


def task_cells(rows: list[Record]) -> tuple[list[str], list[list[str]]]:
    """Head and body of a table, a row a task and method; an empty body where no task is scored by likelihood."""
    likelihood = any(row["log_loss"] is not None for row in rows)
    head = ["method", "task", "score", "log-loss"]
    head += [f"{rows[0]['subject']} minus it, {figure}" for figure in ("score", "log-loss")]
    cells = [[row["method"], row["task"], *(_cell(row, name, 3) for name in TASK_FIGURES)] for row in rows]
    return head, cells if likelihood else []


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
    return "–" if value is None else f"{value:z.{digits}f} [{low:z.{digits}f}, {high:z.{digits}f}]"
