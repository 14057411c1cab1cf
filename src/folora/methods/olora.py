"""OLoRA (Büyükakyüz, arXiv 2406.01775): the adapter starts at the QR decomposition of W.

B₀ = Q[:, :r], A₀ = R[:r] of W = Q R; W - s B₀A₀ is frozen. Computed by PEFT.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from folora.methods.factors import SplitMethod


class OLoRA(SplitMethod):
    """Trains an orthonormal B."""

    kind: Literal["olora"]
    paper: ClassVar[str] = "2406.01775"

    def lora_options(self) -> dict[str, Any]:
        return {"init_lora_weights": "olora"}
