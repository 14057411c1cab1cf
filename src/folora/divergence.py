"""How far an adapted model has moved from its base on text: KL(base ‖ adapted) per token, and perplexity."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from folora.errors import FoLoRAError
from folora.layers import batches

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from peft import PeftModel
    from transformers import PreTrainedModel

    BaseLogits = Callable[[Mapping[str, Tensor]], Tensor]

KEPT_BYTES = 2**30  # of log-probabilities of the base model; where there are more, every reading computes them again


@dataclass(frozen=True)
class Divergence:
    """Means over the predicted tokens of a text.

    Attributes:
        kl: KL(base ‖ adapted) of the next-token distributions, in nats per token.
        perplexity: of the adapted model on the text.
    """

    kl: float
    perplexity: float


@dataclass(frozen=True)
class TokenDivergence:
    """The same of every predicted token: for each row of the text one value a token, (length - 1,) float32.

    Attributes:
        kl: KL(base ‖ adapted) in nats.
        loss: of the adapted model, in nats.
    """

    kl: list[Tensor]
    loss: list[Tensor]

    def mean(self) -> Divergence:
        """The means over all tokens."""
        kl, loss = (torch.cat(rows).double().mean() for rows in (self.kl, self.loss))
        return Divergence(kl=float(kl), perplexity=float(loss.exp()))


class HeldOutText:
    """Held-out token rows with the base model's next-token log-probabilities, computed once if they are few enough.

    Args:
        base: the base model; adapters may be added to the same object afterwards.
        rows: token ids, BOS first.
        batch_size: rows a forward pass.
        padding: the token that fills a row up.

    Raises:
        FoLoRAError: there is no token to predict.
    """

    def __init__(self, base: PreTrainedModel, rows: list[list[int]], batch_size: int, padding: int) -> None:
        if not any(len(row) > 1 for row in rows):
            raise FoLoRAError("a text to measure drift on has no token to predict: raise proxy.max_length or its own")
        self._batches = [(ids, mask) for ids, mask, _ in batches(rows, batch_size, padding, base.device)]
        positions = sum(mask.numel() for _, mask in self._batches)
        self._base: list[Tensor] | None = None
        if 4 * positions * base.config.get_text_config().vocab_size <= KEPT_BYTES:
            self._base = [log_probabilities(base, ids, mask) for ids, mask in self._batches]

    def measure(self, model: PreTrainedModel | PeftModel, base_logits: BaseLogits | None = None) -> Divergence:
        """KL to the base and perplexity of a model on the text; see ``read``."""
        return self.read(model, base_logits).mean()

    @torch.no_grad()
    def read(self, model: PreTrainedModel | PeftModel, base_logits: BaseLogits | None = None) -> TokenDivergence:
        """KL to the base and loss of a model at every token of the text.

        Args:
            model: the adapted model.
            base_logits: the base model's logits of a batch, (batch, length, vocabulary); None: those of ``model``
                without its adapter, which then must not have edited the base weights.
        """
        found = TokenDivergence([], [])
        base_logits = base_logits or partial(without_adapter, model)
        for number, (ids, mask) in enumerate(self._batches):
            if self._base is not None:
                base = self._base[number]
            else:
                base = next_token(base_logits({"input_ids": ids, "attention_mask": mask}))
            adapted = log_probabilities(model, ids, mask)
            kl = (base.exp() * (base - adapted)).sum(-1)
            loss = -adapted.gather(2, ids[:, 1:, None])[..., 0]
            for row, predicted in enumerate(mask[:, 1:]):
                found.kl.append(kl[row][predicted])
                found.loss.append(loss[row][predicted])
        return found


@torch.no_grad()
def log_probabilities(model: PreTrainedModel | PeftModel, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities of every token but the first, (batch, length - 1, vocabulary), float32."""
    return next_token(model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits)


def next_token(logits: Tensor) -> Tensor:
    """The log-probabilities of logits (batch, length, vocabulary), without those after the last token."""
    return torch.log_softmax(logits[:, :-1].float(), dim=-1)


@torch.no_grad()
def without_adapter(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits of a PEFT model's base."""
    with model.disable_adapter():
        logits: Tensor = model(**batch, use_cache=False).logits
    return logits
