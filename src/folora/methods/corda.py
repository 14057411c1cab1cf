"""CorDA (Yang et al., arXiv 2406.05223): singular triplets of W seen through the second moment of its input.

    W C = U S Vᵀ,   W = U S (Vᵀ C⁻¹):   A₀ = √S_r (Vᵀ C⁻¹)_r, B₀ = U_r √S_r

The knowledge-preserving mode takes the last r triplets for C over the model's own text, the instruction-previewed mode
the first r for C over the task. PEFT's CorDA divides the moments of every call by its greatest entry and counts
padding; here C is the mean over tokens, scaled to trace d and ridged as for the pencil, so that it has an inverse.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from folora.methods.factors import FactorMethod

if TYPE_CHECKING:
    from torch import Tensor

    from folora.deltas import LayerGroup, LoRALayer


class CorDA(FactorMethod):
    """Trains the part of W that matters least for what is to be kept, or most for the task.

    Attributes:
        mode: ``knowledge`` (preserving) or ``instruction`` (previewed).
    """

    kind: Literal["corda"]
    paper: ClassVar[str] = "2406.05223"
    mode: Literal["knowledge", "instruction"] = "knowledge"

    def factors(self, layer: LoRALayer, group: LayerGroup) -> tuple[Tensor, Tensor]:
        """(B₀ (m, r), A₀ (r, d)) of the module's equation, from the moment of the mode."""
        import torch

        from folora.pencil import normalise

        spectrum = group.spectrum
        moment = spectrum.penalty if self.mode == "knowledge" else spectrum.utility
        C = normalise(moment.double(), spectrum.shrinkage)
        U, S, Vh = torch.linalg.svd(layer.weight.double() @ C, full_matrices=False)
        rank = layer.A.shape[0]
        chosen = slice(-rank, None) if self.mode == "knowledge" else slice(0, rank)
        right = torch.linalg.solve(C, Vh[chosen].mT).mT  # Vᵀ C⁻¹, C being symmetric
        root = (S[chosen] / layer.scaling).sqrt()
        return root[:, None] * right, U[:, chosen] * root
