"""Second moments of layer inputs, Σ x xᵀ over the tokens that count, and Σ ‖x‖⁴, the spread of x xᵀ around its mean.

Products are float32, sums float64, and of each sum only the half is held, as ``triangle`` lays it out. Sums and token
counts of shards add exactly to those of the whole; the mean is taken over tokens, never over calls, so any batch size
and any padding give the same result.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from folora.errors import FoLoRAError
from folora.layers import Hook, hooked
from folora.triangle import blocks_of, half_size, row_blocks, whole_of

if TYPE_CHECKING:
    from collections.abc import Iterator

SINGLE, DOUBLE = 4, 8  # bytes of a number
WORKSPACE = 8_000_000  # bytes that BLAS and the allocator were seen to keep beside the products
FOURTH = "fourth/"  # what the names of Σ ‖x‖⁴ begin with among the tensors of moments


@dataclass
class Moments:
    """Sums over tokens.

    Attributes:
        widths: name of a layer input to its width d.
        sums: name of a layer input to the half of its (d, d) sum of x xᵀ, float64.
        fourths: name of a layer input to its sum of ‖x‖⁴, a float64 scalar.
        tokens: how many tokens were summed.
    """

    widths: dict[str, int]
    sums: dict[str, Tensor]
    fourths: dict[str, Tensor]
    tokens: int = 0

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All sums by the names that they are stored under."""
        return self.sums | {f"{FOURTH}{name}": value for name, value in self.fourths.items()}

    def plus(self, other: Moments) -> Moments:
        """With the sums of another shard, which must have the same layer inputs."""
        return self._joined(other, 1)

    def minus(self, other: Moments) -> Moments:
        """Without the sums of a part of the text."""
        return self._joined(other, -1)

    def _joined(self, other: Moments, sign: int) -> Moments:
        sums, fourths = (
            {name: torch.add(own[name], theirs[name], alpha=sign) for name in own}
            for own, theirs in ((self.sums, other.sums), (self.fourths, other.fourths))
        )
        return Moments(self.widths, sums, fourths, self.tokens + sign * other.tokens)

    def mean(self, name: str) -> Tensor:
        """The second moment E[x xᵀ] of one layer input, (d, d)."""
        return whole_of(self.sums[name], self.widths[name]).div_(self.tokens)


class Collector:
    """Accumulates moments while a model runs; see ``collect``."""

    def __init__(self, layers: dict[str, nn.Linear], device: torch.device) -> None:
        zero = torch.zeros((), dtype=torch.float64, device=device)
        widths = {name: layer.in_features for name, layer in layers.items()}
        # one block of memory, which the allocator gives back whole; of many it would keep some for the next pass
        sizes = [half_size(d) for d in widths.values()]
        self.moments = Moments(
            widths=widths,
            sums=dict(zip(layers, zero.new_zeros(sum(sizes)).split(sizes), strict=True)),
            fourths={name: zero.clone() for name in layers},
        )
        self._device = device
        self._selected: Tensor | None = None
        self._all_selected = False

    def select(self, mask: Tensor) -> None:
        """Say which tokens of the next forward pass count: (batch, length) of bool."""
        self._selected, self._all_selected = mask, bool(mask.all())
        self.moments.tokens += int(mask.sum())

    def hook(self, name: str) -> Hook:
        """The forward pre-hook that adds one layer input to its sum."""

        def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().to(self._device)
            assert self._selected is not None, "select(mask) comes before the forward pass"
            x = x.reshape(-1, x.shape[-1])
            if not self._all_selected:
                x = x[self._selected.reshape(-1)]
            x = x.float()
            for rows, block in blocks_of(self.moments.sums[name], x.shape[-1]):
                block += x[:, rows].mT @ x[:, : rows.stop]
            self.moments.fourths[name] += x.square().sum(1).double().square().sum()

        return add


def memory_of(widths: list[int]) -> int:
    """Bytes that the sums of layer inputs of these widths take, and on top the products of a block of rows."""
    sums = sum(DOUBLE * half_size(d) for d in widths)
    block = row_blocks(max(widths))[0].stop
    return sums + (SINGLE + DOUBLE) * block * max(widths) + WORKSPACE  # float32, and made float64 to be added


def split_passes(widths: dict[str, int], budget: int | None) -> list[list[str]]:
    """Which layer inputs are summed in each pass over the text, so that none takes more memory than the budget.

    Args:
        widths: of the layer inputs, by name.
        budget: in bytes, of ``memory_of``; None: one pass.

    Returns:
        Names in the order given; each pass has as many as fit.

    Raises:
        FoLoRAError: a single layer input does not fit.
    """
    if budget is None:
        return [list(widths)]
    widest = max(widths.values())
    if (needed := memory_of([widest])) > budget:
        raise FoLoRAError(
            f"covariance.memory_budget: {budget} bytes are too few for the moments of a layer input of width "
            f"{widest:,}: give {needed} or more"
        )
    passes: list[list[str]] = [[]]
    for name, width in widths.items():
        if memory_of([*(widths[other] for other in passes[-1]), width]) > budget:
            passes.append([])
        passes[-1].append(name)
    return passes


@contextmanager
def collect(layers: dict[str, nn.Linear], device: torch.device | None = None) -> Iterator[Collector]:
    """Collect the second moments of the inputs of ``layers`` (one layer a group) within a ``with`` block.

    The sums lie on ``device``, as what says which tokens count does; None: where the weights of the first layer lie.

    Example:
        >>> with torch.no_grad(), collect(layers) as collector:
        ...     for input_ids, mask, _ in batches(rows, 32, padding):
        ...         collector.select(mask)
        ...         model(input_ids=input_ids, attention_mask=mask)
    """
    collector = Collector(layers, device or next(iter(layers.values())).weight.device)
    with hooked(layers, collector.hook):
        yield collector
