"""How much of the identity a second moment needs: (1 - a) C + a (tr C / d) I, from the tokens it is the mean of.

With few tokens for its width, the small eigenvalues of a moment are too small, and directions of the proxy text look
free that are only unseen. Both estimates minimise the expected error ‖·‖_F² for independent samples; the tokens of one
text are not quite independent, so both shrink too little rather than too much.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

ShrinkageName = Literal["ledoit-wolf", "oas"]


def shrinkage_of(name: ShrinkageName, moment: Tensor, fourth: float, tokens: int) -> float:
    """The share of the identity under a named estimate, in [0, 1].

    Args:
        name: ``ledoit-wolf`` or ``oas``.
        moment: (d, d), mean of x xᵀ.
        fourth: mean of ‖x‖⁴.
        tokens: n, how many tokens both are the mean of.
    """
    return ledoit_wolf(moment, fourth, tokens) if name == "ledoit-wolf" else oracle_approximating(moment, tokens)


def ledoit_wolf(moment: Tensor, fourth: float, tokens: int) -> float:
    """Ledoit and Wolf (2004): β² / δ², with β² = (E‖x‖⁴ - ‖C‖²) / n and δ² = ‖C - (tr C / d) I‖²."""
    square = float(moment.square().sum())
    distance = square - float(moment.trace()) ** 2 / moment.shape[0]
    spread = (fourth - square) / tokens
    return 1.0 if distance <= 0 else min(1.0, max(0.0, spread / distance))


def oracle_approximating(moment: Tensor, tokens: int) -> float:
    """Chen et al. (arXiv 0907.4698), eq. 23: the closed form of the oracle's iteration for Gaussian samples."""
    d = moment.shape[0]
    squared_trace, square = float(moment.trace()) ** 2, float(moment.square().sum())
    numerator = (1 - 2 / d) * square + squared_trace
    denominator = (tokens + 1 - 2 / d) * (square - squared_trace / d)
    return 1.0 if denominator <= 0 else min(1.0, numerator / denominator)
