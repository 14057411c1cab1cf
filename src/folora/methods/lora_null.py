"""LoRA-Null (Tang et al., arXiv 2503.02659): the adapter starts in the null space of what the model's own text excites.

    U_n the r eigenvectors of C_p with the least energy;   W' = W U_n U_nᵀ = U S Vᵀ;
    A₀ = √S_r V_rᵀ, B₀ = U_r √S_r;   W - s B₀A₀ is frozen

Version 2 freezes A as well, so that the change stays in that null space.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from folora.methods.factors import FactorMethod, singular_factors

if TYPE_CHECKING:
    from torch import Tensor

    from folora.deltas import LayerGroup, LoRALayer


class LoRANull(FactorMethod):
    """Trains the part of W that the proxy text hardly uses.

    Attributes:
        freeze_a: version 2 of the paper.
    """

    kind: Literal["lora-null"]
    paper: ClassVar[str] = "2503.02659"
    export: ClassVar[str] = "LoRA of rank 2r, of rank r with A frozen"
    freeze_a: bool = False

    def factors(self, layer: LoRALayer, group: LayerGroup) -> tuple[Tensor, Tensor]:
        import torch

        rank = layer.A.shape[0]
        quiet = torch.linalg.eigh(group.spectrum.penalty.double())[1][:, :rank]
        return singular_factors(layer.weight.double() @ quiet @ quiet.mT, rank, layer.scaling)

    def initialise(self, groups: list[LayerGroup]) -> None:
        super().initialise(groups)
        for group in groups:
            for layer in group.layers:
                layer.A.requires_grad_(not self.freeze_a)
