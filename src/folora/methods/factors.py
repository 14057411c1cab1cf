"""Starts that take a part of W into the adapter: W = (W - s B₀A₀) + s B₀A₀. Shared by the methods that do so."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from folora.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from folora.adapter import AdaptedModel, Context
    from folora.deltas import LayerGroup, LoRALayer


class SplitMethod(Method):
    """A start (A₀, B₀) that is a part of W; W - s B₀A₀ is frozen, and the export undoes the split."""

    freezes: ClassVar[str] = "W - s B₀A₀"
    export: ClassVar[str] = "LoRA of rank 2r"
    shardable: ClassVar[bool] = False

    def adapt(self, model: PreTrainedModel, context: Context) -> AdaptedModel:
        from folora.adapter import check_rank

        check_rank(model, context)
        return super().adapt(model, context)


class FactorMethod(SplitMethod, ABC):
    """A split whose factors are computed here, from W and the moments."""

    def initialise(self, groups: list[LayerGroup]) -> None:
        import torch

        for group in groups:
            for layer in group.layers:
                A, B = self.factors(layer, group)
                with torch.no_grad():
                    layer.A.copy_(A)
                    layer.B.copy_(B)

    @abstractmethod
    def factors(self, layer: LoRALayer, group: LayerGroup) -> tuple[Tensor, Tensor]:
        """(A₀ (r, d), B₀ (m, r)) of one layer."""


def singular_factors(matrix: Tensor, rank: int, scaling: float, *, last: bool = False) -> tuple[Tensor, Tensor]:
    """A = √(S/s) Vᵀ and B = U √(S/s) of the first or the last ``rank`` singular triplets, so that s B A = U S Vᵀ.

    Args:
        matrix: (m, d).
        rank: r.
        scaling: s.
        last: whether the smallest singular values are taken.

    Returns:
        (A (r, d), B (m, r)), float32 at least.
    """
    import torch

    precise = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    U, S, Vh = torch.linalg.svd(precise, full_matrices=False)
    chosen = slice(-rank, None) if last else slice(0, rank)
    root = (S[chosen] / scaling).sqrt()
    return root[:, None] * Vh[chosen], U[:, chosen] * root
