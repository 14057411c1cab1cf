"""The gate: how much of Adam's update a direction keeps, from its generalised eigenvalue.

    g_i = g_min + (1 - g_min) λ_iᵏ / (λ_iᵏ + τᵏ)

With k = 1, τ = 1 and g_min = 0 a gate is the share of utility in utility plus penalty. The abstract of the paper
fixes direction-wise gated updates; this form of the gate is ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def soft_gate(eigenvalues: Tensor, *, tau: float, exponent: float, floor: float) -> Tensor:
    """Gates of the directions of one layer input.

    Args:
        eigenvalues: (d,), λ ≥ 0; tiny negative values from rounding count as zero.
        tau: the λ whose gate lies halfway; greater values close more directions.
        exponent: k, the steepness.
        floor: g_min, the least gate.

    Returns:
        (d,), each in [floor, 1].
    """
    # (λ / τ)ᵏ in this bounded form neither overflows for a large λ nor divides zero by zero
    share = eigenvalues.clamp_min(0) / (eigenvalues.clamp_min(0) + tau)
    power = share**exponent
    return floor + (1 - floor) * power / (power + (1 - share) ** exponent)
