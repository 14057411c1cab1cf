"""A forgetting budget: the KL to the base model, per token of its own text, that training may not exceed.

No spectrum predicts the KL, so it is measured. Near the base it grows with the square of the change, so a model beyond
its budget is drawn back by ΔW ← √(budget / KL) ΔW, and measured again until it is inside.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from folora.errors import FoLoRAError, diverged

if TYPE_CHECKING:
    from collections.abc import Callable

    from folora.adapter import AdaptedModel

ATTEMPTS = 50
LEAST_STEP = 0.98  # the square root alone would creep up on the budget without crossing it


def keep_inside(adapted: AdaptedModel, measure: Callable[[], float], budget: float) -> float:
    """Draw a model back until it is inside its budget.

    Args:
        adapted: the model; its change is scaled in place.
        measure: returns its KL to the base, in nats per token.
        budget: the greatest KL allowed.

    Returns:
        The KL that it ends at, at most ``budget``.

    Raises:
        FoLoRAError: the budget is not reached, or the KL is not finite.
    """
    for _ in range(ATTEMPTS):
        kl = measure()
        if not math.isfinite(kl):
            raise diverged(f"its KL is {kl}")
        if kl <= budget:
            return kl
        adapted.shrink(min((budget / kl) ** 0.5, LEAST_STEP))
    raise FoLoRAError(f"kl_budget: {budget:g} nats per token is not reached (at {kl:g}): raise it")
