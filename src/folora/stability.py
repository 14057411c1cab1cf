"""How far the proxy text determines the gates: directions of one half of it, judged by the other half.

    C_t v = λ C_a v,  vᵀ C_a v = 1;   g = λ / (λ + 1),  h = λ / (λ + vᵀ C_b v);   D = Σ |g - h| / Σ max(g, h)

C_a and C_b are the penalties of the two halves, ridged as in the pencil. Directions of the whole text would not do: it
is both halves, so what neither has seen looks free in both, and too little text would pass for enough. A share, and no
mean over the directions: most of them may be shut whatever the text says.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from folora.health import GATE_DIFFERENCE
from folora.pencil import greatest, normalise

if TYPE_CHECKING:
    from torch import Tensor

    from folora.moments import Moments
    from folora.pencil import LayerSpectrum


def stability(proxy: Moments, first: Moments | None, name: str, spectrum: LayerSpectrum) -> dict[str, Any]:
    """Fields of the health record of one layer input.

    Args:
        proxy: moments of the proxy text.
        first: of its first half; None where it cannot be halved.
        name: the layer input.
        spectrum: of it.

    Returns:
        ``tokens_per_width``; ``gate_difference`` D, and ``tokens_needed`` to bring it to ``GATE_DIFFERENCE``; both
        None where D is unknown.
    """
    difference = None
    if first is not None:
        halves, utility = (first.mean(name), proxy.minus(first).mean(name)), spectrum.utility.double()
        difference = gate_difference(*halves, utility, spectrum.shrinkage, len(spectrum.eigenvalues))
    return {
        "tokens_per_width": proxy.tokens / len(spectrum.basis),
        "gate_difference": difference,
        "tokens_needed": None if difference is None else tokens_needed(proxy.tokens, difference),
    }


def gate_difference(
    first: Tensor, second: Tensor, utility: Tensor, shrinkage: float, directions: int | None = None
) -> float | None:
    """D, from 0 to 1, for gates with τ = 1 and exponent 1; None where a half has no definite penalty.

    Args:
        first: (d, d) second moment of one half of the proxy text.
        second: likewise of the other.
        utility: (d, d) second moment of the task.
        shrinkage: share of the identity in both penalties.
        directions: how many are compared, those with the greatest λ; None: all.
    """
    C_a, C_b = normalise(first, shrinkage), normalise(second, shrinkage)
    L, failed = torch.linalg.cholesky_ex(C_a)
    if failed or not (torch.isfinite(L).all() and torch.isfinite(C_b).all()):
        return None
    eigenvalues, V, _ = greatest(C_a, L, normalise(utility), directions)
    eigenvalues = eigenvalues.clamp_min(0)
    penalties = (V * (C_b @ V)).sum(0).clamp_min(0)
    g = eigenvalues / (eigenvalues + 1)
    h = (eigenvalues / (eigenvalues + penalties)).nan_to_num(0)  # 0 / 0 of a direction that neither reads
    difference = float((g - h).abs().sum() / torch.maximum(g, h).sum())
    return difference if math.isfinite(difference) else None


def tokens_needed(tokens: int, difference: float) -> int:
    """How many tokens bring D to ``GATE_DIFFERENCE``, as it falls with 1 / √tokens."""
    return math.ceil(tokens * (difference / GATE_DIFFERENCE) ** 2)
