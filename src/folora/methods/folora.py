"""FoLoRA (Kim et al., arXiv 2606.00132): Adam on A in the spectral basis, gated direction by direction.

    A ← A - lr (Ũ ⊙ g) V̂ᵀ,   Ũ Adam's update of G_A V̂

A₀ is gated too, because the first steps of B write into its row space. Each column of B acts in the direction of a row
of A, so B is gated as well, in the r × r pencil of A's rows. The paper's abstract fixes the spectral coordinates and
the direction-wise gate; the gate's form, the start and the treatment of B are ours, and each is an option here.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from folora.methods.gated import GatedMethod
from folora.shrinkage import ShrinkageName

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from folora.adapter import AdaptedModel
    from folora.deltas import LayerGroup
    from folora.optimizer import GatedAdam


class Quantile(BaseModel):
    """τ as a quantile of the layer's λ: this share of the directions is less than half open."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    quantile: Annotated[float, Field(ge=0, le=1)]


class Budget(BaseModel):
    """τ solved from a budget: gated steps cost this share of the penalty of ungated ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    budget: Annotated[float, Field(gt=0, le=1)]


class SpectralMethod(GatedMethod):
    """What FoLoRA and its controls share: coordinates of A, a gate for each, and the start they imply.

    Attributes:
        tau: the λ whose gate lies halfway.
        exponent: steepness k of the gate.
        floor: least gate g_min.
    """

    tau: Annotated[float, Field(gt=0)] | Quantile | Budget = 1.0
    exponent: Annotated[float, Field(gt=0, le=16)] = 1.0
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def basis_for(self, group: LayerGroup) -> Tensor:
        """(d, q) float32: the coordinates of A."""
        return group.spectrum.basis

    def gates_for(self, group: LayerGroup) -> Tensor:
        """(d,) float32 gates of all directions, ascending; those of the basis are the last."""
        return self.gates_of(self.eigenvalues_for(group)).float()

    def eigenvalues_for(self, group: LayerGroup) -> Tensor:
        """(d,) λ of all directions, in the order of their gates."""
        return group.spectrum.every_eigenvalue

    def tau_of(self, eigenvalues: Tensor) -> float:
        """τ as it was given, or solved from all λ of a layer input."""
        from folora.gate import tau_of_budget, tau_of_quantile

        if isinstance(self.tau, Quantile):
            return tau_of_quantile(eigenvalues, self.tau.quantile)
        if isinstance(self.tau, Budget):
            return tau_of_budget(eigenvalues, self.tau.budget, exponent=self.exponent, floor=self.floor)
        return self.tau

    def gates_of(self, eigenvalues: Tensor, tau: float | None = None) -> Tensor:
        """Gates of all λ of a layer input, in float64; of any λ where ``tau_of`` of the layer's is given."""
        from folora.gate import soft_gate

        tau = self.tau_of(eigenvalues) if tau is None else tau
        return soft_gate(eigenvalues, tau=tau, exponent=self.exponent, floor=self.floor)

    def coordinates(self, group: LayerGroup) -> dict[str, Any]:
        basis = self.basis_for(group)
        return {"basis": basis, "gate": self.gates_for(group)[-basis.shape[1] :]}


class FoLoRA(SpectralMethod):
    """The gate of each direction follows its generalised eigenvalue.

    Attributes:
        basis: the coordinates; a random orthogonal basis keeps the gates of the pencil's.
        columns: their scale: one penalty each, or length one.
        shrinkage: of the penalty's moment in this method only; null takes the spectrum stage's basis as it is.
        gate: soft, or hard: open for the directions with the greatest λ, shut for the others.
        open_share: share of the directions that a hard gate opens.
        gate_on: the update, or the gradient (which Adam's division undoes).
        form: Adam in rotated coordinates, or canonical Adam with the filter F = C_p V diag(g) Vᵀ on its update.
        start: gated noise, the leading directions themselves, or PEFT's.
        gate_a: whether A is gated, or trained by plain AdamW.
        gate_b: whether B is trained by plain AdamW (off), each column gated by the λ of its row of A (diag), or in
            the r × r pencil of A's rows (full).
        refresh_b: steps between two readings of the λ of B's columns.
        refresh_utility: steps between two measurements of C_t on the adapted model, after each of which A's
            coordinates are solved again; null keeps those of the base model.
        freeze_a: leave A at its start.
    """

    kind: Literal["folora"]
    paper: ClassVar[str] = "2606.00132"

    basis: Literal["generalised", "penalty", "utility", "difference", "random", "identity"] = "generalised"
    columns: Literal["penalty", "unit"] = "penalty"
    shrinkage: Annotated[float, Field(gt=0, le=0.5)] | ShrinkageName | None = None
    gate: Literal["soft", "hard"] = "soft"
    open_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    gate_on: Literal["update", "gradient"] = "update"
    form: Literal["rotated", "filter"] = "rotated"
    start: Literal["gated", "spectral", "kaiming"] = "gated"
    gate_a: bool = True
    gate_b: Literal["off", "diag", "full"] = "full"
    refresh_b: Annotated[int, Field(ge=1)] = 10
    refresh_utility: Annotated[int, Field(ge=1)] | None = None
    freeze_a: bool = False

    @model_validator(mode="after")
    def _refresh_has_coordinates(self) -> FoLoRA:
        if self.refresh_utility is not None and (self.freeze_a or not self.gate_a):
            raise ValueError("refresh_utility goes with a gated A in training: remove it, or freeze_a and gate_a")
        return self

    @model_validator(mode="after")
    def _filter_is_the_pencils(self) -> FoLoRA:
        if self.form == "filter" and (self.basis, self.gate_on) != ("generalised", "update"):
            raise ValueError("form filter goes with basis generalised and gate_on update: change those or the form")
        return self

    def basis_for(self, group: LayerGroup) -> Tensor:
        if (self.basis, self.columns, self.shrinkage) == ("generalised", "penalty", None):
            return group.spectrum.basis
        from folora.directions import directions, scaled

        penalty, utility = self.moments(group)
        return scaled(directions(self.basis, penalty, utility), penalty, self.columns).float()

    def eigenvalues_for(self, group: LayerGroup) -> Tensor:
        if self.shrinkage is None and self.basis in ("generalised", "random"):
            return super().eigenvalues_for(group)
        from folora.directions import directions, quotients

        penalty, utility = self.moments(group)
        name = "generalised" if self.basis == "random" else self.basis
        return quotients(directions(name, penalty, utility), penalty, utility)

    def tau_of(self, eigenvalues: Tensor) -> float:
        """Of a hard gate the least λ that it opens."""
        if self.gate == "hard":
            from folora.gate import least_open

            return least_open(eigenvalues, self.open_share)
        return super().tau_of(eigenvalues)

    def gates_of(self, eigenvalues: Tensor, tau: float | None = None) -> Tensor:
        if self.gate == "hard":
            from folora.gate import hard_gate, step_gate

            if tau is None:
                return hard_gate(eigenvalues, open_share=self.open_share, floor=self.floor)
            return step_gate(eigenvalues, least=tau, floor=self.floor)
        return super().gates_of(eigenvalues, tau)

    def column_gates(self, group: LayerGroup) -> Callable[[Tensor], Tensor]:
        """Gates of the λ of B's columns, by the τ of their layer: ranks among r values would say nothing of it."""
        if self.gate == "soft" and isinstance(self.tau, float):
            return self.gates_of
        return partial(self.gates_of, tau=self.tau_of(self.eigenvalues_for(group)))

    def moments(self, group: LayerGroup) -> tuple[Tensor, Tensor]:
        """C_p and C_t as the pencil sees them, float64."""
        from folora.pencil import normalise

        penalty, utility = group.spectrum.penalty.double(), group.spectrum.utility.double()
        return normalise(penalty, self.shrinkage_for(group)), normalise(utility)

    def shrinkage_for(self, group: LayerGroup) -> float:
        """Share of the identity in C_p."""
        from folora.shrinkage import shrinkage_of

        spectrum, share = group.spectrum, self.shrinkage
        if isinstance(share, str):
            return shrinkage_of(share, spectrum.penalty.double(), spectrum.proxy_fourth, spectrum.proxy_tokens)
        return spectrum.shrinkage if share is None else share

    def products(self, group: LayerGroup) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """A C_p and A C_t of any rows A (n, d), the moments as in ``moments``."""
        from folora.pencil import normalised_product

        spectrum, share = group.spectrum, self.shrinkage_for(group)
        return lambda A: (normalised_product(A, spectrum.penalty, share), normalised_product(A, spectrum.utility))

    def initialise(self, groups: list[LayerGroup]) -> None:
        from folora.adapter import check_start

        if self.start == "gated":
            super().initialise(groups)
        for group in groups:
            for layer in group.layers:
                if self.start == "spectral":
                    check_start(layer, self.basis_for(group).shape[1])
                    spectral_start(layer.A, *self.noise(group))
                layer.A.requires_grad_(not self.freeze_a)

    def noise(self, group: LayerGroup) -> tuple[Tensor, Tensor]:
        coordinates = super().coordinates(group)
        return coordinates["basis"], coordinates["gate"]

    def coordinates(self, group: LayerGroup) -> dict[str, Any]:
        if not self.gate_a:
            return {}
        if self.form == "filter":
            basis, gates = (part.double() for part in self.noise(group))
            return {"filter": update_filter(self.moments(group)[0], basis, gates).float()}
        return {**super().coordinates(group), "gate_gradient": self.gate_on == "gradient"}

    def update_groups(self, adapted: AdaptedModel) -> list[dict[str, Any]]:
        *of_a, of_b = super().update_groups(adapted)
        each_b = [of_b] if self.gate_b == "off" else [{"params": [B]} for B in of_b["params"]]
        return each_b if self.freeze_a else [*of_a, *each_b]

    def optimizer(self, adapted: AdaptedModel, learning_rate: float) -> GatedAdam:
        """Gated Adam, with the hooks that measure C_t again and read the gates of B."""
        from folora.refresh import ColumnGates, UtilityRefresh

        optimizer = super().optimizer(adapted, learning_rate)
        if self.refresh_utility is not None:
            optimizer.register_step_pre_hook(
                UtilityRefresh(adapted, every=self.refresh_utility, coordinates=self.coordinates)
            )
        if self.gate_b != "off":
            first = len(optimizer.coordinates) - len(adapted.layers)
            of_columns = ColumnGates(
                adapted.groups,
                first,
                every=self.refresh_b,
                products=[self.products(group) for group in adapted.groups],
                gates=[self.column_gates(group) for group in adapted.groups],
                rotated=self.gate_b == "full",
                gate_gradient=self.gate_on == "gradient",
            )
            optimizer.register_step_pre_hook(of_columns)
        return optimizer


def spectral_start(A: Tensor, basis: Tensor, gates: Tensor) -> None:
    """Set the rows of A₀ to the r directions with the greatest gates, in place, at the norm of ``gated_start``."""
    import torch

    with torch.no_grad():
        start = basis[:, gates.topk(A.shape[0]).indices].mT
        A.copy_(start * math.sqrt(A.shape[0] / 3) / start.norm())


def update_filter(penalty: Tensor, basis: Tensor, gates: Tensor) -> Tensor:
    """F = C_p V diag(g) Vᵀ, (d, d): its right eigen-directions are the pencil's; of all of them it is I for g = 1.

    Args:
        penalty: (d, d) C_p, ridged.
        basis: (d, q) the pencil's directions, columns of any scale.
        gates: (q,) of the columns.
    """
    from folora.directions import energies

    V = basis / energies(basis, penalty).sqrt()
    return penalty @ (V * gates) @ V.mT
