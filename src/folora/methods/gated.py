"""What the methods share that gate Adam's update of A in coordinates of their own; B's is theirs to gate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from folora.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor

    from folora.adapter import AdaptedModel
    from folora.deltas import LayerGroup
    from folora.optimizer import GatedAdam


class GatedMethod(Method, ABC):
    """A in the coordinates of each layer input, started there too: the first steps of B write into A₀'s row space."""

    @abstractmethod
    def coordinates(self, group: LayerGroup) -> dict[str, Any]:
        """Fields of ``Coordinates`` for the A of a group."""

    def noise(self, group: LayerGroup) -> tuple[Tensor, Tensor]:
        """Directions (d, n) of A₀ and the weight (n,) of each."""
        coordinates = self.coordinates(group)
        return coordinates["basis"], coordinates["gate"]

    def initialise(self, groups: list[LayerGroup]) -> None:
        for group in groups:
            directions, weights = self.noise(group)
            for layer in group.layers:
                gated_start(layer.A, directions, weights)

    def update_groups(self, adapted: AdaptedModel) -> list[dict[str, Any]]:
        of_a = [{"params": [layer.A for layer in group.layers], **self.coordinates(group)} for group in adapted.groups]
        return [*of_a, {"params": [layer.B for group in adapted.groups for layer in group.layers]}]

    def optimizer(self, adapted: AdaptedModel, learning_rate: float) -> GatedAdam:
        from folora.optimizer import GatedAdam

        return GatedAdam(self.update_groups(adapted), lr=learning_rate, weight_decay=self.weight_decay)


def gated_start(A: Tensor, directions: Tensor, weights: Tensor) -> None:
    """Set A₀ = (N ⊙ g) V̂ᵀ in place, N standard normal, rescaled to ‖A₀‖_F = √(r / 3), the norm of PEFT's start.

    Args:
        A: (r, d) parameter.
        directions: (d, n) V̂, n ≤ d.
        weights: (n,) g.
    """
    import torch

    with torch.no_grad():
        noise = torch.randn(A.shape[0], len(weights)).to(weights.device)  # drawn alike on every device
        start = (noise * weights) @ directions.mT
        A.copy_(start * math.sqrt(A.shape[0] / 3) / start.norm())
