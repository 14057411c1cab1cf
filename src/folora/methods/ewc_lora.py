"""EWC-LoRA (arXiv 2602.17559; EWC: Kirkpatrick et al., arXiv 1612.00796): a price on moving what mattered.

    loss + (strength / 2) Σ F ⊙ ΔW²,   F = E[(∂ log p(x) / ∂W)²] over text x

The Fisher information is that of the full weights, the change that of the adapter, ΔW = s B A. The text is sampled from
the model itself, so F is the Fisher information proper, not its empirical stand-in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from folora.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from folora.adapter import AdaptedModel, Context


class EWCLoRA(Method):
    """LoRA with a quadratic penalty, weighted by the diagonal Fisher information.

    Attributes:
        strength: of the penalty, per token of text.
        sequences: sampled sequences that the Fisher information is measured on.
    """

    kind: Literal["ewc-lora"]
    paper: ClassVar[str] = "2602.17559"
    shardable: ClassVar[bool] = False
    strength: Annotated[float, Field(ge=0)] = 1.0
    sequences: Annotated[int, Field(ge=1)] = 256

    def adapt(self, model: PreTrainedModel, context: Context) -> AdaptedModel:
        fisher = fisher_information(model, context.spectrum.layers, context.proxy[: self.sequences])
        adapted = super().adapt(model, context)
        adapted.regulariser = lambda: (
            self.strength
            / 2
            * sum((fisher[layer.name] * (layer.scaling * layer.B @ layer.A).square()).sum() for layer in adapted.layers)
        )
        return adapted


def fisher_information(model: PreTrainedModel, names: list[str], rows: list[list[int]]) -> dict[str, Tensor]:
    """Diagonal Fisher information of linear layers, (m, d) each, per predicted token.

    Args:
        model: the base model.
        names: its linear layers.
        rows: token ids sampled from the model, BOS first.
    """
    import torch

    weights: dict[str, Any] = {name: model.get_submodule(name).weight for name in names}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    totals = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    tokens = 0
    for row in rows:
        ids = torch.tensor([row], device=weights[names[0]].device)
        loss = model(input_ids=ids, labels=ids).loss * (len(row) - 1)  # the log-likelihood of the whole sequence
        gradients = torch.autograd.grad(loss, list(weights.values()))
        tokens += len(row) - 1
        for total, gradient in zip(totals.values(), gradients, strict=True):
            total.add_(gradient.float().square())
    for weight in weights.values():
        weight.requires_grad_(False)
    return {name: total / tokens for name, total in totals.items()}
