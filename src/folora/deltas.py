"""The change ΔW of one linear layer as a product of two factors, and the layers that share an input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from folora.pencil import LayerSpectrum, Spectrum


@dataclass
class LoRALayer:
    """One adapted linear layer, y = W x + s B A x.

    Attributes:
        name: module name in the base model.
        A: (r, d) parameter.
        B: (m, r) parameter.
        weight: (m, d), W of the base model.
        scaling: s.
        taken: (A₀, B₀), whose product s B₀A₀ was taken out of the base weights, or None.
        projectors: (m, m) on the left of B and (d, d) on the right of A, or None.
    """

    name: str
    A: nn.Parameter
    B: nn.Parameter
    weight: Tensor
    scaling: float
    taken: tuple[Tensor, Tensor] | None = None
    projectors: tuple[Tensor, Tensor] | None = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """(left (m, k), right (k, d)) with ΔW = s · left · right; k is r, or 2r where a part was taken out."""
        left: Tensor = self.B
        right: Tensor = self.A
        if self.projectors is not None:
            left, right = self.projectors[0] @ left, right @ self.projectors[1]
        if self.taken is None:
            return left, right
        A0, B0 = self.taken
        if not self.A.requires_grad:  # a frozen A keeps its row space, so rank r is enough
            return left - B0, right
        return torch.cat([left, -B0], dim=1), torch.cat([right, A0])

    def moved(self) -> bool:
        """Whether the layer differs from the base model's."""
        if self.taken is not None:  # rounding keeps B₀A₀ - B₀A₀ off zero
            return not (torch.equal(self.A, self.taken[0]) and torch.equal(self.B, self.taken[1]))
        left, right = self.factors()
        return bool((left @ right).any())


class Projected(nn.Module):
    """A weight seen through projectors on its left or its right."""

    def __init__(self, *, left: Tensor | None = None, right: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        seen = weight if self.left is None else self.left @ weight
        return seen if self.right is None else seen @ self.right

    left: Tensor | None
    right: Tensor | None


@dataclass
class DenseLayer:
    """One linear layer whose weight changes as a whole.

    Attributes:
        name: module name in the base model.
        weight: (m, d), W of the base model.
        current: returns the weight as it stands, (m, d).
    """

    name: str
    weight: Tensor
    current: Callable[[], Tensor]
    scaling: float = 1.0

    def factors(self) -> tuple[Tensor, Tensor]:
        """(ΔW, I)."""
        change = (self.current() - self.weight).float()
        return change, torch.eye(change.shape[1], dtype=change.dtype, device=change.device)

    def moved(self) -> bool:
        """Whether the layer differs from the base model's."""
        return not torch.equal(self.current(), self.weight)


Layer = LoRALayer | DenseLayer


@dataclass(frozen=True)
class LayerGroup:
    """The adapted layers that read one input, with the spectrum of that input."""

    layers: list[Any]  # of LoRALayer, or all of DenseLayer
    spectrum: LayerSpectrum


def grouped(spectrum: Spectrum, layer: Callable[[str], Layer]) -> list[LayerGroup]:
    """Make the layers of the spectrum, grouped by the input they read."""
    return [
        LayerGroup([layer(name) for name in names], spectrum.inputs[leader])
        for leader, names in spectrum.groups.items()
    ]
