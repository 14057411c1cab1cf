"""LoRA (Hu et al., arXiv 2106.09685) with AdamW, and its variants whose start is LoRA's."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from folora.methods.base import Method


class LoRA(Method):
    """A at PEFT's Kaiming start, B at zero; AdamW on both."""

    kind: Literal["lora"]
    paper: ClassVar[str] = "2106.09685"


class RsLoRA(Method):
    """Rank-stabilised LoRA (Kalajdzievski, arXiv 2312.03732): s = alpha / √r."""

    kind: Literal["rslora"]
    paper: ClassVar[str] = "2312.03732"

    def lora_options(self) -> dict[str, Any]:
        return {"use_rslora": True}
