"""The gate: how much of Adam's update a direction keeps, from its generalised eigenvalue.

    g_i = g_min + (1 - g_min) λ_iᵏ / (λ_iᵏ + τᵏ)

With k = 1, τ = 1 and g_min = 0 a gate is the share of utility in utility plus penalty. The abstract of the paper
fixes direction-wise gated updates; this form of the gate is ours, and so are the others here, for comparison.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BISECTIONS = 100  # halve the bracket of log τ to below float64's resolution


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
    share = eigenvalues.clip(0) / (eigenvalues.clip(0) + tau)
    power = share**exponent
    return floor + (1 - floor) * power / (power + (1 - share) ** exponent)


def hard_gate(eigenvalues: Tensor, *, open_share: float, floor: float) -> Tensor:
    """One for the directions with the greatest λ, the floor for the others.

    Args:
        eigenvalues: (d,).
        open_share: share q of the directions that stay open, at least one of them.
        floor: gate of the closed ones.
    """
    gates = eigenvalues.new_full(eigenvalues.shape, floor)
    gates[eigenvalues.topk(_open_count(eigenvalues, open_share)).indices] = 1.0
    return gates


def _open_count(eigenvalues: Tensor, open_share: float) -> int:
    return max(1, round(open_share * len(eigenvalues)))


def least_open(eigenvalues: Tensor, open_share: float) -> float:
    """The least λ that ``hard_gate`` opens among those of a layer; zero where it opens them all."""
    count = _open_count(eigenvalues, open_share)
    return 0.0 if count == len(eigenvalues) else float(eigenvalues.topk(count).values[-1])


def step_gate(eigenvalues: Tensor, *, least: float, floor: float) -> Tensor:
    """One for every λ of at least ``least``, the floor for the others; tiny negative values count as zero."""
    return floor + (1 - floor) * (eigenvalues.clip(0) >= least).to(eigenvalues.dtype)


def penalty_gate(energies: Tensor, *, alpha: float) -> Tensor:
    """The soft gate of Scaled Gradient Projection (arXiv 2302.01386), which knows no utility.

        g_i = 1 - (α + 1) σ_i / (α σ_i + σ_max),    σ_i² the energy of the proxy text in direction i

    Args:
        energies: (d,), eigenvalues of the penalty's second moment.
        alpha: α ≥ 0; greater values close more directions.

    Returns:
        (d,), from 0 for the direction with the most energy to 1 for one without.
    """
    sigma = energies.clamp_min(0).sqrt()
    return 1 - (alpha + 1) * sigma / (alpha * sigma + sigma.max())


def tau_of_quantile(eigenvalues: Tensor, quantile: float) -> float:
    """The τ that leaves this share of the layer's directions less than half open."""
    return max(float(eigenvalues.quantile(quantile)), 1e-12)


def tau_of_budget(eigenvalues: Tensor, budget: float, *, exponent: float, floor: float) -> float:
    """The τ at which gated steps cost this share of the penalty of ungated ones.

    At unit Adam steps in C_p-orthonormal coordinates the share is Σ g_i² / d, which falls as τ rises: bisect log τ.

    Args:
        eigenvalues: (d,).
        budget: the share, between floor² and 1; beyond what the gate can reach the nearest τ is returned.
        exponent: k of ``soft_gate``.
        floor: g_min of ``soft_gate``.
    """
    low, high = 1e-9, 1e9
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5
        share = float(soft_gate(eigenvalues, tau=middle, exponent=exponent, floor=floor).square().mean())
        low, high = (middle, high) if share > budget else (low, middle)
    return (low * high) ** 0.5
