"""SC-LoRA (Luo et al., arXiv 2505.23724): outputs that the task excites and the model's own text does not.

    Q the r leading eigenvectors of (1 - β) Cov₊ - β Cov₋ of h = W x;   B₀ = Q / s, A₀ = Qᵀ W;   W - s B₀A₀ is frozen

The output's second moment is W C Wᵀ, so no further pass over the text is needed. Both are scaled to trace one, the unit
of the sides being arbitrary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from folora.methods.factors import FactorMethod

if TYPE_CHECKING:
    from torch import Tensor

    from folora.deltas import LayerGroup, LoRALayer


class SCLoRA(FactorMethod):
    """Trains W's part in a subspace of its outputs.

    Attributes:
        beta: weight of what is to be kept against the task.
    """

    kind: Literal["sc-lora"]
    paper: ClassVar[str] = "2505.23724"
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5

    def factors(self, layer: LoRALayer, group: LayerGroup) -> tuple[Tensor, Tensor]:
        import torch

        W = layer.weight.double()
        task, kept = (W @ C.double() @ W.mT for C in (group.spectrum.utility, group.spectrum.penalty))
        contrast = (1 - self.beta) * task / task.trace() - self.beta * kept / kept.trace()
        Q = torch.linalg.eigh(contrast)[1][:, -layer.A.shape[0] :]
        return Q.mT @ W, Q / layer.scaling
