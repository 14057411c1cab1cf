"""OLoRA (Büyükakyüz, arXiv 2406.01775): the adapter starts at the QR decomposition of W.

B₀ = Q[:, :r], A₀ = R[:r] of W = Q R; W - s B₀A₀ is frozen. Computed by PEFT.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from folora.methods.base import Method


class OLoRA(Method):
    """Trains an orthonormal B."""

    kind: Literal["olora"]
    paper: ClassVar[str] = "2406.01775"
    freezes: ClassVar[str] = "W - s B₀A₀"
    export: ClassVar[str] = "LoRA of rank 2r"

    def lora_options(self) -> dict[str, Any]:
        return {"init_lora_weights": "olora"}
