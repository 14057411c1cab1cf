"""How far an adapted model has moved from its base on text: KL(base ‖ adapted) per token, and perplexity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from folora.errors import FoLoRAError
from folora.layers import batches

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Divergence:
    """Means over the predicted tokens of a text.

    Attributes:
        kl: KL(base ‖ adapted) of the next-token distributions, in nats per token.
        perplexity: of the adapted model on the text.
    """

    kl: float
    perplexity: float


class HeldOutText:
    """Held-out token rows with the base model's next-token log-probabilities, computed once.

    Args:
        base: the base model; its logits are kept, so adapters may be added to the same object afterwards.
        rows: token ids, BOS first.
        batch_size: rows a forward pass.
        padding: the token that fills a row up.

    Raises:
        FoLoRAError: there is no token to predict.
    """

    def __init__(self, base: PreTrainedModel, rows: list[list[int]], batch_size: int, padding: int) -> None:
        if not any(len(row) > 1 for row in rows):
            raise FoLoRAError("the held-out proxy text has no token to predict: raise proxy.max_length")
        self._batches = [(ids, mask) for ids, mask, _ in batches(rows, batch_size, padding, base.device)]
        self._base = [log_probabilities(base, ids, mask) for ids, mask in self._batches]

    def measure(self, model: PreTrainedModel | PeftModel) -> Divergence:
        """KL to the base and perplexity of a model on the text."""
        kl = loss = 0.0
        tokens = 0
        for (ids, mask), base in zip(self._batches, self._base, strict=True):
            adapted = log_probabilities(model, ids, mask)
            predicted = mask[:, 1:]
            kl += float((base.exp() * (base - adapted)).sum(-1)[predicted].double().sum())
            loss -= float(adapted.gather(2, ids[:, 1:, None])[..., 0][predicted].double().sum())
            tokens += int(predicted.sum())
        return Divergence(kl=kl / tokens, perplexity=float(torch.tensor(loss / tokens).exp()))


@torch.inference_mode()
def log_probabilities(model: PreTrainedModel | PeftModel, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities of every token but the first, (batch, length - 1, vocabulary), float32."""
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    return torch.log_softmax(logits.float(), dim=-1)
