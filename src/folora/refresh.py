"""Coordinates that follow the training: read again every few steps, by pre-hooks of the optimizer.

When coordinates change, Adam's mean is carried over; its square is kept as it is, as SOAP (arXiv 2409.11321) does,
since it has no exact transport.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from folora.deltas import LayerGroup
from folora.errors import diverged
from folora.optimizer import Coordinates
from folora.pencil import directions_of, layer_spectrum

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from folora.adapter import AdaptedModel
    from folora.moments import Moments
    from folora.pencil import LayerSpectrum


def carry_over(optimizer: Any, parameters: list[Tensor], old: Tensor | None, new: Tensor | None) -> None:
    """Make the mean of the gradients G V_old that of G V_new, for parameters that share (d, q) bases.

    Exact for q = d; of fewer directions, what both spans have in common is carried over. A mean of gated gradients
    keeps the gates that they had.
    """
    if old is None or new is None:
        return
    transport = torch.linalg.lstsq(old.double(), new.double()).solution.float()
    for state in (optimizer.state.get(parameter) for parameter in parameters):
        if state:
            state["exp_avg"] = state["exp_avg"] @ transport


class UtilityRefresh:
    """Measures C_t on the adapted model and solves A's coordinates again: its layer inputs move while it learns.

    Args:
        adapted: the model in training.
        every: steps between two measurements.
        coordinates: of a group with the spectrum that it has now, as ``Coordinates`` takes them.
    """

    def __init__(
        self, adapted: AdaptedModel, *, every: int, coordinates: Callable[[LayerGroup], dict[str, Any]]
    ) -> None:
        self._adapted, self._every, self._coordinates = adapted, every, coordinates

    @torch.no_grad()
    def __call__(self, optimizer: Any, *_: Any) -> None:
        if optimizer.steps and optimizer.steps % self._every == 0:
            self._refresh(optimizer)

    def _refresh(self, optimizer: Any) -> None:
        groups = self._adapted.groups
        moments = self._adapted.task_moments()
        for position, group in enumerate(groups):
            old = optimizer.coordinates[position]
            new = Coordinates(**self._coordinates(LayerGroup(group.layers, self._solved(group, moments))))
            carry_over(optimizer, optimizer.param_groups[position]["params"], old.basis, new.basis)
            optimizer.turn(position, new)

    @staticmethod
    def _solved(group: LayerGroup, moments: Moments) -> LayerSpectrum:
        name, old = group.layers[0].name, group.spectrum
        return layer_spectrum(
            old.penalty,
            _finite(moments.mean(name), name),
            shrinkage=old.shrinkage,
            proxy_tokens=old.proxy_tokens,
            proxy_fourth=old.proxy_fourth,
            directions=len(old.eigenvalues),
            name=name,
        )


class ColumnGates:
    """Reads the λ of A's rows every few steps and gates the columns of B by them; a pre-hook of the optimizer.

    Column j has λ_j = (a_j C_t a_jᵀ) / (a_j C_p a_jᵀ), or else the r × r pencil (A C_t Aᵀ, A C_p Aᵀ) gives coordinates
    for B's columns as well.

    Args:
        groups: the adapted layers.
        first: place of the first layer's B among the parameter groups; the others follow in order.
        every: steps between two readings.
        products: A C_p and A C_t of any rows A (n, d), for each group.
        gates: of any λ, likewise.
        rotated: whether B's columns get coordinates.
        gate_gradient: whether the gate multiplies the gradient instead of the update.
    """

    def __init__(
        self,
        groups: list[LayerGroup],
        first: int,
        *,
        every: int,
        products: list[Callable[[Tensor], tuple[Tensor, Tensor]]],
        gates: list[Callable[[Tensor], Tensor]],
        rotated: bool,
        gate_gradient: bool,
    ) -> None:
        self._groups, self._first, self._every = list(zip(groups, products, gates, strict=True)), first, every
        self._rotated, self._gate_gradient = rotated, gate_gradient

    @torch.no_grad()
    def __call__(self, optimizer: Any, *_: Any) -> None:
        if optimizer.steps % self._every == 0:
            position = self._first
            for group, products, gates_of in self._groups:
                ranks = [len(layer.A) for layer in group.layers]
                rows = torch.cat([_finite(layer.A, layer.name) for layer in group.layers]).double()
                each = zip(group.layers, *(part.split(ranks) for part in (rows, *products(rows))), strict=True)
                for layer, *parts in each:
                    old = optimizer.coordinates[position].basis
                    basis, eigenvalues = self._read(layer.name, *parts)
                    carry_over(optimizer, [layer.B], old, basis)
                    new = {"basis": None if basis is None else basis.float(), "gate": gates_of(eigenvalues).float()}
                    optimizer.turn(position, Coordinates(**new, gate_gradient=self._gate_gradient))
                    position += 1

    def _read(self, name: str, A: Tensor, A_penalty: Tensor, A_utility: Tensor) -> tuple[Tensor | None, Tensor]:
        """Coordinates (r, r) of the columns of a layer's B, if they get any, and their λ (r,).

        Args:
            name: of the layer.
            A: (r, d).
            A_penalty: A C_p, (r, d).
            A_utility: A C_t, (r, d).
        """
        if not self._rotated:
            return None, (A_utility * A).sum(1) / (A_penalty * A).sum(1)
        penalty, utility = A_penalty @ A.mT, A_utility @ A.mT
        eigenvalues, basis = directions_of(penalty, utility, shrinkage=1e-6, name=name)
        return basis, eigenvalues * (utility.trace() / penalty.trace())  # both traces were taken out


def _finite(values: Tensor, name: str) -> Tensor:
    if not values.isfinite().all():
        raise diverged(f"what {name} computes is not finite")
    return values
