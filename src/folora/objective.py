"""The training objective: the task's loss, and what a method adds to it so that the model stays near its base.

    loss = (Σ_task -log p(y) + Σ_proxy ℓ) / tokens  +  w · mean_task KL(q₋y ‖ p₋y)  +  regulariser

q is the base model's distribution and p the adapted one's at a token; y is the right token, and q₋y is q without y,
renormalised. ℓ is -log p(y) for replayed text, or KL(q ‖ p) for self-distillation on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from folora.adapter import AdaptedModel
    from folora.methods import Method


class Objective:
    """The loss of a batch under a method.

    Args:
        method: says how replayed text is learned, and the weight of the masked divergence.
        adapted: the model in training; gives the base model's logits and the regulariser.
        task_rows: rows of the task at the head of every batch; those after them are proxy text.
    """

    def __init__(self, method: Method, adapted: AdaptedModel, task_rows: int) -> None:
        self._distil = method.replay > 0 and method.replay_loss == "distillation"
        self._mask_target = method.mask_target
        self._adapted = adapted
        self._task_rows = task_rows

    def __call__(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The scalar loss of a batch of ``input_ids``, ``attention_mask`` and ``labels``, each (batch, length)."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        learned = labels >= 0
        targets = labels[learned]
        scores = torch.log_softmax(logits[learned].float(), dim=-1)  # (tokens, vocabulary)
        losses = -scores.gather(1, targets[:, None])[:, 0]
        extra = self._adapted.regulariser() if self._adapted.regulariser else 0.0
        # the tokens of the task come first; plain losses are spared the wait for a GPU to count them
        of_task = int(learned[: self._task_rows].sum()) if self._distil or self._mask_target else 0
        if self._distil:
            kept = divergence(self._base_scores(batch, learned, slice(self._task_rows, None)), scores[of_task:])
            losses = torch.cat([losses[:of_task], kept])
        if self._mask_target:
            base = self._base_scores(batch, learned, slice(self._task_rows))
            masked = masked_divergence(base, scores[:of_task], targets[:of_task])
            extra = extra + self._mask_target * masked.mean()
        return losses.mean() + extra

    def _base_scores(self, batch: Mapping[str, Tensor], learned: Tensor, rows: slice) -> Tensor:
        """The base model's log-probabilities at the learned tokens of some rows, (tokens, vocabulary)."""
        some = {name: batch[name][rows] for name in ("input_ids", "attention_mask")}
        logits = self._adapted.base_logits(some)[:, :-1]
        return torch.log_softmax(logits[learned[rows]].float(), dim=-1)


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
