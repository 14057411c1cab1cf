"""The spectrum of one layer input: the generalised eigenproblem of utility and penalty.

    C_t v_i = λ_i C_p v_i,    Vᵀ C_p V = I,    Vᵀ C_t V = Λ

C_p and C_t are the second moments E[x xᵀ] of the input over proxy and task tokens. For a rank-one update w vᵀ the
generalised Rayleigh quotient (vᵀ C_t v) / (vᵀ C_p v) is utility per unit of penalty, whatever w is, so the basis of
LoRA's A is exact and static. Float64 throughout; C_p is never inverted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from folora.errors import FoLoRAError
from folora.shrinkage import shrinkage_of

if TYPE_CHECKING:
    from folora.layers import Groups
    from folora.moments import Moments
    from folora.shrinkage import ShrinkageName

RIDGE_LADDER = (1.0, 10.0, 100.0)  # multiples of the shrinkage that are tried before the solver gives up
STORED = torch.finfo(torch.float32)  # what a moment is kept as


@dataclass(frozen=True)
class Pencil:
    """The solved pencil of one layer input of width d.

    Attributes:
        basis: (d, d), V̂ = c V: columns are directions, C_p-orthogonal, under one global scale c.
        eigenvalues: (d,), λ in ascending order.
        health: how far the solution can be trusted; see ``solve``.
    """

    basis: Tensor
    eigenvalues: Tensor
    health: dict[str, Any]


@dataclass(frozen=True)
class LayerSpectrum:
    """The spectrum of one layer input of width d: everything a method may need.

    Attributes:
        basis: (d, d) V̂.
        eigenvalues: (d,) λ, ascending.
        penalty: (d, d) C_p, unnormalised.
        utility: (d, d) C_t, unnormalised.
        shrinkage: share of the identity that the pencil mixed into the normalised C_p.
        proxy_tokens: tokens that C_p is the mean of.
        proxy_fourth: mean of ‖x‖⁴ over them.
        health: how far the solution can be trusted; see ``solve``.
    """

    basis: Tensor
    eigenvalues: Tensor
    penalty: Tensor
    utility: Tensor
    shrinkage: float
    proxy_tokens: int
    proxy_fourth: float
    health: dict[str, Any]

    def to(self, device: torch.device) -> LayerSpectrum:
        """The same on a device."""
        return replace(
            self,
            basis=self.basis.to(device),
            eigenvalues=self.eigenvalues.to(device),
            penalty=self.penalty.to(device),
            utility=self.utility.to(device),
        )


@dataclass(frozen=True)
class Spectrum:
    """The spectra of all layer inputs, and which layers read each.

    Attributes:
        inputs: name of a layer input (its first layer) to its spectrum.
        groups: name of a layer input to the layers that read it.
    """

    inputs: dict[str, LayerSpectrum]
    groups: Groups

    @property
    def layers(self) -> list[str]:
        """Names of all layers."""
        return [name for names in self.groups.values() for name in names]

    def to(self, device: torch.device) -> Spectrum:
        """The same on a device."""
        return Spectrum({name: one.to(device) for name, one in self.inputs.items()}, self.groups)


def solve_spectrum(proxy: Moments, task: Moments, groups: Groups, shrinkage: float | ShrinkageName) -> Spectrum:
    """Solve the pencil of every layer input.

    Args:
        proxy: moments over text that stands for the pretraining data: the penalty.
        task: moments of the same layer inputs over the task's text: the utility.
        groups: which layers read each input.
        shrinkage: share of the identity that the penalty is mixed with, or how it is estimated.

    Raises:
        FoLoRAError: a moment is of no token, not finite or has no energy, or a penalty stays indefinite.
    """
    for side, moments in (("penalty", proxy), ("utility", task)):
        if not moments.tokens:
            raise FoLoRAError(f"the {side} moments are of no token: check the text that they were taken over")
    inputs = {
        name: layer_spectrum(
            proxy.mean(name),
            task.mean(name),
            shrinkage=shrinkage,
            proxy_tokens=proxy.tokens,
            proxy_fourth=float(proxy.fourths[name]) / proxy.tokens,
            name=name,
        )
        for name in groups
    }
    return Spectrum(inputs, groups)


def layer_spectrum(
    penalty: Tensor,
    utility: Tensor,
    *,
    shrinkage: float | ShrinkageName,
    proxy_tokens: int,
    proxy_fourth: float,
    name: str,
) -> LayerSpectrum:
    """The spectrum of one layer input from its moments; see ``LayerSpectrum`` and ``solve``."""
    if isinstance(shrinkage, str):
        if not math.isfinite(proxy_fourth):
            raise FoLoRAError(f"{name}: the mean of ‖x‖⁴ is not finite: give spectrum.shrinkage as a number")
        shrinkage = shrinkage_of(shrinkage, penalty, proxy_fourth, proxy_tokens)
    pencil = solve(penalty, utility, shrinkage=shrinkage, name=name)
    return LayerSpectrum(
        basis=pencil.basis.float(),
        eigenvalues=pencil.eigenvalues,
        penalty=penalty.float(),
        utility=utility.float(),
        shrinkage=pencil.health["shrinkage"],
        proxy_tokens=proxy_tokens,
        proxy_fourth=proxy_fourth,
        health=pencil.health,
    )


def normalise(moment: Tensor, shrinkage: float = 0.0) -> Tensor:
    """Scale a second moment to trace d, then mix with the identity: (1 - a) C + a I.

    After scaling, λ = 1 means "an equal share" in every layer. Shrinkage keeps directions that the proxy hardly
    visits from getting λ = ∞ out of under-sampling alone.
    """
    d = moment.shape[0]
    identity = torch.eye(d, dtype=moment.dtype, device=moment.device)
    return (1 - shrinkage) * moment * (d / moment.trace()) + shrinkage * identity


def solve(penalty: Tensor, utility: Tensor, *, shrinkage: float, name: str) -> Pencil:
    """Solve C_t V = C_p V Λ by Cholesky reduction.

    Args:
        penalty: (d, d), second moment over proxy tokens; any scale.
        utility: (d, d), second moment over task tokens; any scale.
        shrinkage: a of ``normalise``, for the penalty.
        name: the layer input, for errors.

    Returns:
        The pencil, in float64. Its health record holds the relative residual ‖C_t V - C_p V Λ‖ / ‖C_t V‖, the
        deviation of Vᵀ C_p V from I, effective ranks (exp of the entropy of the spectrum), the top direction's share
        of the trace, the condition of the ridged penalty and the shrinkage that was used.

    Raises:
        FoLoRAError: a moment is not finite or has no energy that float32 can hold, or the penalty stays indefinite with
            100 times the ridge.
    """
    penalty, utility = penalty.double(), utility.double()
    for side, moment in (("penalty", penalty), ("utility", utility)):
        if not STORED.tiny <= moment.abs().max() <= STORED.max or moment.trace() <= 0:
            reason = "is zero, not finite or beyond the range of float32"
            raise FoLoRAError(f"{name}: the {side} moment {reason}: check the data and run covariance again")
    C_t = normalise(utility)
    for factor in RIDGE_LADDER:
        ridge = min(shrinkage * factor, 0.5)
        C_p = normalise(penalty, ridge)
        L, failed = torch.linalg.cholesky_ex(C_p)
        if not failed:
            break
    else:
        pivot = float(torch.linalg.eigvalsh(C_p)[0])
        raise FoLoRAError(
            f"{name}: the penalty is not positive definite (smallest eigenvalue {pivot:.1e}): raise spectrum.shrinkage"
        )

    eigenvalues, V = reduced(L, C_t)
    d = V.shape[0]
    scale = math.sqrt(d) / V.norm()  # c = √(d / tr C_p⁻¹), since ‖V‖² = tr C_p⁻¹
    residual = (C_t @ V - C_p @ V * eigenvalues).norm() / (C_t @ V).norm()
    orthonormality = (V.mT @ C_p @ V - torch.eye(d, dtype=V.dtype, device=V.device)).abs().max()
    penalty_spectrum = torch.linalg.eigvalsh(normalise(penalty)).clamp_min(0)
    health = {
        "width": d,
        "shrinkage": ridge,
        "residual": float(residual),
        "orthonormality": float(orthonormality),
        "condition": float(((1 - ridge) * penalty_spectrum[-1] + ridge) / ((1 - ridge) * penalty_spectrum[0] + ridge)),
        "top_share": float(penalty_spectrum[-1] / d),
        "penalty_rank": effective_rank(penalty_spectrum),
        "utility_rank": effective_rank(torch.linalg.eigvalsh(C_t).clamp_min(0)),
    }
    return Pencil(basis=scale * V, eigenvalues=eigenvalues.clamp_min(0), health=health)


def reduced(L: Tensor, C_t: Tensor) -> tuple[Tensor, Tensor]:
    """λ (d,), ascending, and V (d, d) of C_t V = C_p V Λ with Vᵀ C_p V = I, given the factor of C_p = L Lᵀ."""
    half = torch.linalg.solve_triangular(L, C_t, upper=False)
    M = torch.linalg.solve_triangular(L, half.mT, upper=False)
    eigenvalues, U = torch.linalg.eigh((M + M.mT) / 2)
    return eigenvalues, torch.linalg.solve_triangular(L.mT, U, upper=True)


def effective_rank(spectrum: Tensor) -> float:
    """Exponential of the entropy of a non-negative spectrum: d for a flat one, 1 for a single direction."""
    share = spectrum / spectrum.sum()
    return float(torch.exp(-torch.xlogy(share, share).sum()))
