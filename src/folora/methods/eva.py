"""EVA (Paischer et al., arXiv 2410.07170): A starts at the leading directions of the task's activations, B at zero.

    A₀ = the r leading eigenvectors of C_t, which are the right singular vectors of the stacked task inputs

PEFT finds them by an incremental decomposition over batches; ours come from the exact moment. Every layer keeps rank r
(the paper's ρ = 1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from folora.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor

    from folora.deltas import LayerGroup


class EVA(Method):
    """LoRA whose A starts where the task's inputs vary most."""

    kind: Literal["eva"]
    paper: ClassVar[str] = "2410.07170"

    def initialise(self, groups: list[LayerGroup]) -> None:
        import torch

        from folora.adapter import check_start

        for group in groups:
            leading = leading_directions(group.spectrum.utility)
            for layer in group.layers:
                check_start(layer, len(leading))
                with torch.no_grad():
                    layer.A.copy_(leading[: layer.A.shape[0]])


def leading_directions(moment: Tensor) -> Tensor:
    """Eigenvectors of a second moment as rows, the one with the most energy first, (d, d)."""
    import torch

    return torch.linalg.eigh(moment.double())[1].mT.flip(0)
