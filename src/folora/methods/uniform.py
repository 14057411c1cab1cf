"""Controls of FoLoRA: the same mean gate for every direction of a layer input.

``uniform`` keeps the spectral basis, so what FoLoRA gains over it is the gate's. ``uniform-canonical`` drops the basis
too: plain Adam on A with FoLoRA's mean step size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from folora.methods.folora import SpectralMethod

if TYPE_CHECKING:
    from torch import Tensor

    from folora.methods.base import LayerGroup


class Uniform(SpectralMethod):
    """Spectral basis, the layer's mean gate in every direction."""

    kind: Literal["uniform"]

    def gates(self, group: LayerGroup) -> Tensor:
        gates = super().gates(group)
        return gates.mean().expand_as(gates)


class UniformCanonical(SpectralMethod):
    """No basis: A at PEFT's start, Adam in canonical coordinates, every update times the layer's mean gate."""

    kind: Literal["uniform-canonical"]

    def start(self, groups: list[LayerGroup]) -> None:
        """Leave PEFT's start."""

    def update_groups(self, groups: list[LayerGroup]) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in update.items() if key != "basis"}
            | ({"gate": update["gate"].mean()} if "gate" in update else {})
            for update in super().update_groups(groups)
        ]
