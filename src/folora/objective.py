"""The training objective: the task's loss, and what a method adds to it so that the model stays near its base.

    loss = (Σ_task -log p(y) + Σ_proxy ℓ) / tokens  +  w · mean_task KL(q₋y ‖ p₋y)  +  regulariser

Means are over the tokens of a whole batch, so any division of it into micro-batches has the same loss and gradient, and
any division among processes too: each divides its sums by the mean count of a process, and DDP averages the gradients.

q is the base model's distribution and p the adapted one's at a token; y is the right token, and q₋y is q without y,
renormalised. ℓ is -log p(y) for replayed text, or KL(q ‖ p) for self-distillation on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from folora.processes import means

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from folora.adapter import AdaptedModel
    from folora.methods import Method

    Batch = Mapping[str, Tensor]  # input_ids, attention_mask and labels, (batch, length) each, padded on the right


class Objective:
    """The loss of a batch under a method.

    Args:
        method: says how replayed text is learned, and the weight of the masked divergence.
        adapted: the model in training; gives the base model's logits and the regulariser.
        task_rows: rows of the task at the head of every batch; those after them are proxy text.
        micro_batch: rows a forward pass; None: all of the batch.
    """

    def __init__(self, method: Method, adapted: AdaptedModel, task_rows: int, micro_batch: int | None = None) -> None:
        self._distil = method.replay > 0 and method.replay_loss == "distillation"
        self._mask_target = method.mask_target
        self._adapted = adapted
        self._task_rows = task_rows
        self._micro_batch = micro_batch

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        """The scalar loss of a batch of ``input_ids``, ``attention_mask`` and ``labels``, each (batch, length)."""
        return torch.stack(list(self.parts(model, batch))).sum()

    def parts(self, model: Any, batch: Batch) -> Iterator[Tensor]:
        """The same as a sum of scalars, one a micro-batch: only one of their graphs need be in memory."""
        learned = batch["labels"][:, 1:] >= 0
        counts = means(learned.sum(), learned[: self._task_rows].sum())
        rows = len(learned)
        size = self._micro_batch or rows
        for start in range(0, rows, size):
            part = batch if size >= rows else _rows(batch, slice(start, start + size))
            loss = self._loss(model, part, max(self._task_rows - start, 0), *counts)
            if start == 0 and self._adapted.regulariser:
                loss = loss + self._adapted.regulariser()
            yield loss

    def _loss(self, model: Any, batch: Batch, task_rows: int, tokens: Tensor, task_tokens: Tensor) -> Tensor:
        """What some rows of a batch add to its loss, without the regulariser.

        Args:
            model: the model in training.
            batch: the rows.
            task_rows: rows of the task at their head.
            tokens: that are learned of the whole batch.
            task_tokens: likewise of the task.
        """
        logits = model(**_inputs(batch, slice(None)), use_cache=False).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        learned = labels >= 0
        targets = labels[learned]
        scores = torch.log_softmax(logits[learned].float(), dim=-1)  # (tokens, vocabulary)
        losses = -scores.gather(1, targets[:, None])[:, 0]
        # the tokens of the task come first; plain losses are spared the wait for a GPU to count them
        of_task = int(learned[:task_rows].sum()) if self._distil or self._mask_target else 0
        if self._distil and task_rows < len(learned):
            kept = divergence(self._base_scores(batch, learned, slice(task_rows, None)), scores[of_task:])
            losses = torch.cat([losses[:of_task], kept])
        loss = losses.sum() / tokens
        if self._mask_target and of_task:
            base = self._base_scores(batch, learned, slice(task_rows))
            masked = masked_divergence(base, scores[:of_task], targets[:of_task])
            loss = loss + self._mask_target * masked.sum() / task_tokens
        return loss

    def _base_scores(self, batch: Batch, learned: Tensor, rows: slice) -> Tensor:
        """The base model's log-probabilities at the learned tokens of some rows, (tokens, vocabulary)."""
        logits = self._adapted.base_logits(_inputs(batch, rows))[:, :-1]
        return torch.log_softmax(logits[learned[rows]].float(), dim=-1)


def _inputs(batch: Batch, rows: slice) -> dict[str, Tensor]:
    return {name: batch[name][rows] for name in ("input_ids", "attention_mask")}


def _rows(batch: Batch, rows: slice) -> dict[str, Tensor]:
    """Some rows of a batch, padded no further than they need."""
    length = int(batch["attention_mask"][rows].sum(1).max())
    return {name: batch[name][rows, :length] for name in ("input_ids", "attention_mask", "labels")}


def divergence(base: Tensor, adapted: Tensor) -> Tensor:
    """KL(base ‖ adapted) of log-probabilities (tokens, vocabulary): (tokens,)."""
    return (base.exp() * (base - adapted)).sum(-1)


def masked_divergence(base: Tensor, adapted: Tensor, targets: Tensor) -> Tensor:
    """KL(base ‖ adapted) over the vocabulary without each token's target, both renormalised.

    Args:
        base: (tokens, vocabulary) log-probabilities.
        adapted: likewise.
        targets: (tokens,) token ids.

    Returns:
        (tokens,).
    """
    hidden = torch.zeros_like(base, dtype=torch.bool).scatter_(1, targets[:, None], value=True)
    # a finite stand-in for minus infinity keeps 0 · (-∞ + ∞) out of the sum
    q, p = (torch.log_softmax(scores.masked_fill(hidden, -1e4), dim=-1) for scores in (base, adapted))
    return divergence(q, p)
