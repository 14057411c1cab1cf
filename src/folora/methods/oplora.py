"""OPLoRA (Xiong and Xie, arXiv 2510.13003): LoRA outside the leading singular subspaces of W, on both sides.

ΔW = s (I - U_k U_kᵀ) B A (I - V_k V_kᵀ),   U_k, V_k the k leading singular vectors of W
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from folora.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from folora.adapter import AdaptedModel, Context


class OPLoRA(Method):
    """Keeps the k leading singular triplets of W exactly.

    Attributes:
        preserved: k, at most one less than the rank of the smallest layer.
    """

    kind: Literal["oplora"]
    paper: ClassVar[str] = "2510.13003"
    shardable: ClassVar[bool] = False
    preserved: Annotated[int, Field(ge=1)] = 16

    def adapt(self, model: PreTrainedModel, context: Context) -> AdaptedModel:
        """LoRA between projectors off the k leading singular directions of W, on both sides."""
        import torch
        from torch.nn.utils.parametrize import register_parametrization

        from folora.adapter import NAME
        from folora.deltas import Projected

        adapted = super().adapt(model, context)
        modules: dict[str, Any] = dict(adapted.model.get_base_model().named_modules())
        for layer in adapted.layers:
            U, _, Vh = torch.linalg.svd(layer.weight.detach().float(), full_matrices=False)
            k = min(self.preserved, len(Vh) - 1)
            layer.projectors = _complement(U[:, :k]), _complement(Vh[:k].mT)
            lora = modules[layer.name]
            left, right = layer.projectors
            for factor, projected in (
                (lora.lora_B[NAME], Projected(left=left)),
                (lora.lora_A[NAME], Projected(right=right)),
            ):
                register_parametrization(factor, "weight", projected)  # the parameter itself stays the same object
        return adapted


def _complement(columns: Tensor) -> Tensor:
    """I - Q Qᵀ of orthonormal columns Q (n, k): (n, n)."""
    import torch

    return torch.eye(columns.shape[0], dtype=columns.dtype, device=columns.device) - columns @ columns.mT
