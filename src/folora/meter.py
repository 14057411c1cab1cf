"""The forgetting meter: penalty and utility of the adapter as it stands, read while it trains.

    P = tr(ΔW C_p ΔWᵀ) = E‖ΔW x_p‖²,    U = tr(ΔW C_t ΔWᵀ),    ΔW = s B A

Layers have different scales, so each is divided by tr(W C Wᵀ), the energy of the layer's own output on the same text,
before the mean over layers is taken: the relative change of the layers' outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from folora.processes import gathered

if TYPE_CHECKING:
    from folora.deltas import Layer, LayerGroup


def change(layer: Layer, moment: Tensor) -> Tensor:
    """tr(ΔW C ΔWᵀ) of one layer, a scalar, in O(k d² + k² (d + m)) for factors of rank k."""
    left, right = layer.factors()
    inner = right @ moment.to(right.device) @ right.mT  # (k, k)
    return layer.scaling**2 * ((left.mT @ left) * inner).sum()


def output_energy(layer: Layer, moment: Tensor) -> Tensor:
    """tr(W C Wᵀ) = E‖W x‖² of one layer, a scalar."""
    weight = gathered(layer.weight).float()
    return ((weight @ moment.to(weight.device)) * weight).sum()


class ForgettingMeter:
    """Reads relative penalty and utility of all adapted layers."""

    @torch.no_grad()
    def __init__(self, groups: list[LayerGroup]) -> None:
        self._layers = [
            (layer, moment, output_energy(layer, moment))
            for group in groups
            for layer in group.layers
            for moment in (group.spectrum.penalty, group.spectrum.utility)
        ]

    @torch.no_grad()
    def read(self) -> dict[str, float]:
        """Mean over layers of the relative change on proxy (``penalty``) and on task text (``utility``)."""
        relative = torch.stack([change(layer, moment) / energy for layer, moment, energy in self._layers])
        penalty, utility = relative.reshape(-1, 2).mean(0).tolist()
        return {"penalty": penalty, "utility": utility}
