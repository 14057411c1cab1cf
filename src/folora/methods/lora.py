"""LoRA (Hu et al., arXiv 2106.09685) with AdamW, optionally with weight decay and replayed proxy text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from folora.methods.base import LayerGroup, Method

if TYPE_CHECKING:
    import torch


class LoRA(Method):
    """A at PEFT's Kaiming start, B at zero; torch's AdamW on both."""

    kind: Literal["lora"]

    def optimizer(self, groups: list[LayerGroup], learning_rate: float) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW(self.update_groups(groups), lr=learning_rate, weight_decay=self.weight_decay)
