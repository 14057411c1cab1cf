"""FoLoRA (Kim et al., arXiv 2606.00132): Adam on A in the spectral basis, gated direction by direction.

    A ← A - lr (Ũ ⊙ g) V̂ᵀ,   Ũ Adam's update of G_A V̂

A₀ is gated too, because the first steps of B write into its row space. B is trained by plain AdamW. The paper's
abstract fixes the spectral coordinates and the direction-wise gate; the gate's form, the start and the treatment of
B are ours.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from folora.methods.base import LayerGroup, Method

if TYPE_CHECKING:
    from torch import Tensor


class SpectralMethod(Method):
    """What FoLoRA and its controls share: the gate's parameters, and A in the spectral basis."""

    tau: Annotated[float, Field(gt=0, description="the λ whose gate lies halfway")]
    exponent: Annotated[float, Field(gt=0, le=16, description="steepness k of the gate")]
    floor: Annotated[float, Field(ge=0, lt=1, description="least gate g_min")]

    def gates(self, group: LayerGroup) -> Tensor:
        """(d,) float32 gates of the group's input directions."""
        from folora.gate import soft_gate

        gates = soft_gate(group.spectrum.eigenvalues, tau=self.tau, exponent=self.exponent, floor=self.floor)
        return gates.float()

    def start(self, groups: list[LayerGroup]) -> None:
        for group in groups:
            for layer in group.layers:
                gated_start(layer.A, group.spectrum.basis, self.gates(group))

    def update_groups(self, groups: list[LayerGroup]) -> list[dict[str, Any]]:
        spectral = [
            {
                "params": [layer.A for layer in group.layers],
                "basis": group.spectrum.basis,
                "gate": self.gates(group),
            }
            for group in groups
        ]
        return [*spectral, {"params": [layer.B for group in groups for layer in group.layers]}]


class FoLoRA(SpectralMethod):
    """The gate of each direction follows its generalised eigenvalue."""

    kind: Literal["folora"]


def gated_start(A: Tensor, basis: Tensor, gates: Tensor) -> None:
    """Set A₀ = (N ⊙ g) V̂ᵀ in place, N standard normal, rescaled to ‖A₀‖_F = √(r / 3), the norm of PEFT's start.

    Args:
        A: (r, d) parameter.
        basis: (d, d) V̂.
        gates: (d,).
    """
    import torch

    with torch.no_grad():
        start = (torch.randn(A.shape) * gates) @ basis.mT
        A.copy_(start * math.sqrt(A.shape[0] / 3) / start.norm())
