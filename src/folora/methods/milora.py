"""MiLoRA (Wang et al., arXiv 2406.09044): the adapter starts at the smallest singular triplets of W.

A₀ = √S_m V_mᵀ, B₀ = U_m √S_m of the last r of W = U S Vᵀ; the principal part is frozen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from folora.methods.factors import FactorMethod, singular_factors

if TYPE_CHECKING:
    from torch import Tensor

    from folora.deltas import LayerGroup, LoRALayer


class MiLoRA(FactorMethod):
    """Trains the minor part of W."""

    kind: Literal["milora"]
    paper: ClassVar[str] = "2406.09044"

    def factors(self, layer: LoRALayer, group: LayerGroup) -> tuple[Tensor, Tensor]:
        del group
        return singular_factors(layer.weight, layer.A.shape[0], layer.scaling, last=True)
