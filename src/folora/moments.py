"""Second moments of layer inputs: Σ x xᵀ over the tokens that count.

Products are float32, sums float64. Sums and token counts of shards add exactly to those of the whole; the mean is
taken over tokens, never over calls, so any batch size and any padding give the same result.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from folora.layers import Hook, hooked

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class Moments:
    """Sums over tokens.

    Attributes:
        sums: name of a layer input to its (d, d) sum of x xᵀ, float64.
        tokens: how many tokens were summed.
    """

    sums: dict[str, Tensor]
    tokens: int = 0

    def add(self, other: Moments) -> None:
        """Add the sums of another shard, which must have the same layer inputs."""
        for name, value in other.sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.tokens += other.tokens

    def mean(self, name: str) -> Tensor:
        """The second moment E[x xᵀ] of one layer input, (d, d)."""
        return self.sums[name] / self.tokens


class Collector:
    """Accumulates moments while a model runs; see ``collect``."""

    def __init__(self, layers: dict[str, nn.Linear]) -> None:
        device = next(iter(layers.values())).weight.device
        self.moments = Moments(
            {
                name: torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64, device=device)
                for name, layer in layers.items()
            }
        )
        self._selected: Tensor | None = None

    def select(self, mask: Tensor) -> None:
        """Say which tokens of the next forward pass count: (batch, length) of bool."""
        self._selected = mask
        self.moments.tokens += int(mask.sum())

    def hook(self, name: str) -> Hook:
        """The forward pre-hook that adds one layer input to its sum."""

        def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            assert self._selected is not None, "select(mask) comes before the forward pass"
            x = x.reshape(-1, x.shape[-1])[self._selected.reshape(-1)].float()
            self.moments.sums[name] += x.mT @ x

        return add


@contextmanager
def collect(layers: dict[str, nn.Linear]) -> Iterator[Collector]:
    """Collect the second moments of the inputs of ``layers`` (one layer a group) within a ``with`` block.

    Example:
        >>> with torch.no_grad(), collect(layers) as collector:
        ...     for input_ids, mask, _ in batches(rows, 32, padding):
        ...         collector.select(mask)
        ...         model(input_ids=input_ids, attention_mask=mask)
    """
    collector = Collector(layers)
    with hooked(layers, collector.hook):
        yield collector
