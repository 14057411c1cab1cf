"""PiSSA (Meng et al., arXiv 2404.02948): the adapter starts at the leading singular triplets of W.

A₀ = √S_r V_rᵀ, B₀ = U_r √S_r of W = U S Vᵀ; the rest of W is frozen. Computed by PEFT.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from folora.methods.factors import SplitMethod


class PiSSA(SplitMethod):
    """Trains the principal part of W."""

    kind: Literal["pissa"]
    paper: ClassVar[str] = "2404.02948"

    def lora_options(self) -> dict[str, Any]:
        return {"init_lora_weights": "pissa"}
