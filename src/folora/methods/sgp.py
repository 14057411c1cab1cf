"""Scaled gradient projection (Saha and Roy, arXiv 2302.01386) on LoRA: a soft gate that knows the penalty only.

    g_i = 1 - (α + 1) σ_i / (α σ_i + σ_max),   σ_i² the eigenvalues of C_p

Adam works in the eigenbasis of C_p, and g gates its update there, as FoLoRA's does in the pencil's: the paper scales
the gradient of SGD, which under Adam would change nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from folora.methods.gated import GatedMethod

if TYPE_CHECKING:
    from folora.deltas import LayerGroup


class SGP(GatedMethod):
    """Directions that the proxy text uses much move little.

    Attributes:
        alpha: steepness; the paper uses 1 to 25.
    """

    kind: Literal["sgp"]
    paper: ClassVar[str] = "2302.01386"
    alpha: Annotated[float, Field(ge=0)] = 5.0

    def coordinates(self, group: LayerGroup) -> dict[str, Any]:
        """Eigenbasis of C_p and its gates, float32."""
        import torch

        from folora.gate import penalty_gate

        energies, vectors = torch.linalg.eigh(group.spectrum.penalty.double())
        return {"basis": vectors.float(), "gate": penalty_gate(energies, alpha=self.alpha).float()}
