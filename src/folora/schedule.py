"""Which rows make up which batch: a pure function of seed and step."""

from __future__ import annotations

import numpy as np


def batch_rows(*, seed: int, steps: int, task_rows: int, batch_size: int, proxy_rows: int, replay: int) -> list[int]:
    """Row numbers of all batches in a row, ``steps × (batch_size + replay)`` of them.

    A batch is ``batch_size`` task rows followed by ``replay`` proxy rows, each source in epochs that are shuffled
    anew. Proxy row i has the number ``task_rows + i``.
    """
    task = _epochs(seed, 0, task_rows, steps * batch_size).reshape(steps, batch_size)
    proxy = _epochs(seed, 1, proxy_rows, steps * replay).reshape(steps, replay) + task_rows
    return np.concatenate([task, proxy], axis=1).reshape(-1).tolist()


def _epochs(seed: int, source: int, rows: int, count: int) -> np.ndarray:
    """The first ``count`` row numbers of endless shuffled epochs."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    epochs = [np.random.default_rng([seed, source, epoch]).permutation(rows) for epoch in range(-(-count // rows))]
    return np.concatenate(epochs)[:count]


def equal_token_steps(steps: int, task: list[int], proxy: list[int], *, batch_size: int, replay: int) -> int:
    """Steps with replay that see as many tokens as ``steps`` without, at least one.

    Args:
        steps: of training on the task alone.
        task: length of every task row.
        proxy: length of every proxy row.
        batch_size: task rows a step.
        replay: proxy rows a step.
    """
    alone = batch_size * float(np.mean(task))
    together = alone + replay * float(np.mean(proxy))
    return max(1, round(steps * alone / together))


def checkpoint_steps(steps: int, checkpoints: int) -> set[int]:
    """Steps after which a checkpoint is due: evenly spaced, the last one among them."""
    return {round(steps * (i + 1) / checkpoints) for i in range(checkpoints)}
