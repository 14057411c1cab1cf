"""What a method is: how the adapter starts, how it is updated, and what the batches hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from folora.spectrum import LayerSpectrum


@dataclass(frozen=True)
class LoRALayer:
    """One adapted linear layer, y = W x + s B A x.

    Attributes:
        A: (r, d) parameter.
        B: (m, r) parameter.
        weight: (m, d) frozen W.
        scaling: s.
    """

    A: nn.Parameter
    B: nn.Parameter
    weight: Tensor
    scaling: float


@dataclass(frozen=True)
class LayerGroup:
    """The adapted layers that read one input, with the spectrum of that input."""

    layers: list[LoRALayer]
    spectrum: LayerSpectrum


class Method(BaseModel):
    """A method with its parameters, as an entry of ``methods:`` gives them.

    A subclass declares ``kind: Literal["..."]``, which registers it, its own parameters, and overrides what differs
    from plain LoRA with AdamW.

    Attributes:
        weight_decay: decoupled weight decay of A and B.
        replay: proxy sequences that join the task rows in every batch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    weight_decay: Annotated[float, Field(ge=0, le=1)]
    replay: Annotated[int, Field(ge=0, le=100_000)]

    def start(self, groups: list[LayerGroup]) -> None:
        """Set the adapter's start in place; PEFT has already drawn A at random and set B to zero."""

    def update_groups(self, groups: list[LayerGroup]) -> list[dict[str, Any]]:
        """Parameter groups for ``GatedAdam``; without basis and gate they are plain AdamW's."""
        return [{"params": [p for group in groups for layer in group.layers for p in (layer.A, layer.B)]}]

    def optimizer(self, groups: list[LayerGroup], learning_rate: float) -> torch.optim.Optimizer:
        """The optimizer that trains the adapter."""
        from folora.optimizer import GatedAdam

        return GatedAdam(self.update_groups(groups), lr=learning_rate, weight_decay=self.weight_decay)

    @classmethod
    def has_kind(cls) -> bool:
        """Whether this class is a method of its own, not a base of others."""
        return "kind" in cls.__annotations__

    @classmethod
    def kind_name(cls) -> str:
        """The word that names this method in params.yaml."""
        return get_args(cls.model_fields["kind"].annotation)[0]
