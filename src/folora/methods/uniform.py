"""Controls of FoLoRA: the same mean gate for every direction of a layer input.

``uniform`` keeps the spectral bases, of A and of B, so what FoLoRA gains over it is the gate's. ``uniform-canonical``
drops them too: plain Adam, on A with FoLoRA's mean step size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from folora.methods.folora import FoLoRA, SpectralMethod

if TYPE_CHECKING:
    from torch import Tensor

    from folora.deltas import LayerGroup


class Uniform(FoLoRA):
    """FoLoRA with the mean gate of a layer's directions in each of them; its other options are FoLoRA's."""

    kind: Literal["uniform"]  # type: ignore[assignment]
    paper: ClassVar[str] = "control"

    def gates_of(self, eigenvalues: Tensor, tau: float | None = None) -> Tensor:
        gates = super().gates_of(eigenvalues, tau)
        return gates.mean().expand_as(gates)


class UniformCanonical(SpectralMethod):
    """No basis: A at PEFT's start, canonical Adam; A's updates times the layer's mean gate, B's whole."""

    kind: Literal["uniform-canonical"]
    paper: ClassVar[str] = "control"

    def initialise(self, groups: list[LayerGroup]) -> None:
        """Leave PEFT's start."""

    def coordinates(self, group: LayerGroup) -> dict[str, Any]:
        return {"gate": self.gates_for(group).mean()}
