"""DoRA (Liu et al., arXiv 2402.09353): magnitude and direction of W apart.

W' = m ⊙ (W + s B A) / ‖W + s B A‖_row,   m a trained vector that starts at the row norms of W. Computed by PEFT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from folora.methods.base import Method

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from folora.adapter import AdaptedModel, Context


class DoRA(Method):
    """LoRA on the direction, and a magnitude for every output."""

    kind: Literal["dora"]
    paper: ClassVar[str] = "2402.09353"
    trains: ClassVar[str] = "A, B, m"
    export: ClassVar[str] = "DoRA of rank r"
    shardable: ClassVar[bool] = False

    def lora_options(self) -> dict[str, Any]:
        return {"use_dora": True}

    def adapt(self, model: PreTrainedModel, context: Context) -> AdaptedModel:
        """PEFT's DoRA, whose layers also change by a magnitude, as dense layers."""
        from folora.adapter import NAME
        from folora.deltas import DenseLayer, grouped

        adapted = super().adapt(model, context)
        modules = dict(adapted.model.get_base_model().named_modules())
        lora = {layer.name: layer for layer in adapted.layers}

        def weight_of(name: str) -> Callable[[], Tensor]:
            module: Any = modules[name]

            def current() -> Tensor:
                layer = lora[name]
                moved = layer.weight + layer.scaling * layer.B @ layer.A
                magnitude = module.lora_magnitude_vector[NAME].weight
                return (magnitude / moved.norm(dim=1))[:, None] * moved

            return current

        adapted.groups = grouped(context.spectrum, lambda name: DenseLayer(name, lora[name].weight, weight_of(name)))
        return adapted
