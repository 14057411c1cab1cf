"""Adam-NSCL (Wang et al., arXiv 2103.07113) on LoRA: Adam's step first, then a hard projector.

    A ← A - lr U Q Qᵀ,   Q the eigenvectors of C_p with eigenvalues at most ``multiple`` times the smallest

The paper projects every layer's weight update; here it is A's, whose row space is what the inputs see. A₀ is projected
too, since the first steps of B write into its row space.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from folora.methods.gated import GatedMethod

if TYPE_CHECKING:
    from torch import Tensor

    from folora.deltas import LayerGroup


class AdamNSCL(GatedMethod):
    """Updates of A in the approximate null space of the proxy text.

    Attributes:
        multiple: of the smallest eigenvalue, up to which a direction counts as null (the paper's a).
    """

    kind: Literal["adam-nscl"]
    paper: ClassVar[str] = "2103.07113"
    multiple: Annotated[float, Field(ge=1)] = 50.0

    def null_space(self, group: LayerGroup) -> Tensor:
        """Q (d, n), float32, of the ridged moment, so that no direction counts as null for want of tokens alone."""
        import torch

        from folora.pencil import normalise

        spectrum = group.spectrum
        eigenvalues, vectors = torch.linalg.eigh(normalise(spectrum.penalty.double(), spectrum.shrinkage))
        return vectors[:, eigenvalues <= self.multiple * eigenvalues[0]].float()

    def coordinates(self, group: LayerGroup) -> dict[str, Any]:
        Q = self.null_space(group)
        return {"filter": Q @ Q.mT}

    def noise(self, group: LayerGroup) -> tuple[Tensor, Tensor]:
        import torch

        Q = self.null_space(group)
        return Q, torch.ones(Q.shape[1], device=Q.device)
