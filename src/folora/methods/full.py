"""Full fine-tuning: every adapted linear layer trains its own weight. Embeddings, norms and the head stay frozen.

The same layers as the other methods train, so that what differs is the rank of the change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from folora.methods.base import Method

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from folora.adapter import AdaptedModel, Context


class FullFineTuning(Method):
    """AdamW on W."""

    kind: Literal["full"]
    paper: ClassVar[str] = "reference"
    trains: ClassVar[str] = "W"
    freezes: ClassVar[str] = "nothing of the adapted layers"
    export: ClassVar[str] = "weights of the adapted layers"
    shardable: ClassVar[bool] = False

    def adapt(self, model: PreTrainedModel, context: Context) -> AdaptedModel:
        from folora.adapter import DenseModel
        from folora.deltas import DenseLayer, grouped

        modules: dict[str, Any] = dict(model.named_modules())
        model.requires_grad_(False)

        def layer(name: str) -> DenseLayer:
            weight = modules[name].weight.requires_grad_(True)
            return DenseLayer(name, weight.detach().clone(), lambda: weight)

        return DenseModel(model, grouped(context.spectrum, layer))
