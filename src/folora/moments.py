"""Second moments of layer inputs, Σ x xᵀ over the tokens that count, and Σ ‖x‖⁴, the spread of x xᵀ around its mean.

Products are float32, sums float64. Sums and token counts of shards add exactly to those of the whole; the mean is
taken over tokens, never over calls, so any batch size and any padding give the same result.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from folora.errors import FoLoRAError
from folora.layers import Hook, hooked

if TYPE_CHECKING:
    from collections.abc import Iterator

SINGLE, DOUBLE = 4, 8  # bytes of a number
FOURTH = "fourth/"  # what the names of Σ ‖x‖⁴ begin with among the tensors of moments


@dataclass
class Moments:
    """Sums over tokens.

    Attributes:
        sums: name of a layer input to its (d, d) sum of x xᵀ, float64.
        fourths: name of a layer input to its sum of ‖x‖⁴, a float64 scalar.
        tokens: how many tokens were summed.
    """

    sums: dict[str, Tensor]
    fourths: dict[str, Tensor]
    tokens: int = 0

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All sums by the names that they are stored under."""
        return self.sums | {f"{FOURTH}{name}": value for name, value in self.fourths.items()}

    def add(self, other: Moments) -> None:
        """Add the sums of another shard, which must have the same layer inputs."""
        for name in other.sums:
            self.sums[name] = self.sums.get(name, 0) + other.sums[name]
            self.fourths[name] = self.fourths.get(name, 0) + other.fourths[name]
        self.tokens += other.tokens

    def mean(self, name: str) -> Tensor:
        """The second moment E[x xᵀ] of one layer input, (d, d).

        Float32 products are not always symmetric to the last bit, and a Cholesky factor sees one triangle only.
        """
        mean = self.sums[name] / self.tokens
        return (mean + mean.mT) / 2


class Collector:
    """Accumulates moments while a model runs; see ``collect``. Until ``finish`` the sums lack their upper half."""

    def __init__(self, layers: dict[str, nn.Linear], device: torch.device) -> None:
        zero = torch.zeros((), dtype=torch.float64, device=device)
        widths = [layer.in_features for layer in layers.values()]
        # one block of memory, which the allocator gives back whole; of many it would keep some for the next pass
        blocks = zero.new_zeros(sum(d * d for d in widths)).split([d * d for d in widths])
        self.moments = Moments(
            sums={name: block.view(d, d) for name, block, d in zip(layers, blocks, widths, strict=True)},
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
            total = self.moments.sums[name]
            for rows in _row_blocks(len(total)):  # what lies right of the diagonal blocks is mirrored by `finish`
                total[rows, : rows.stop] += x[:, rows].mT @ x[:, : rows.stop]
            self.moments.fourths[name] += x.square().sum(1).double().square().sum()

        return add

    def finish(self) -> None:
        """Make the sums whole, once every batch has been read."""
        for total in self.moments.sums.values():
            for rows in _row_blocks(len(total)):
                total[: rows.start, rows] = total[rows, : rows.start].mT


def _row_blocks(d: int) -> list[slice]:
    """Rows of a (d, d) matrix in some eight blocks, none so small that a product would not pay."""
    size = max(192, -(-d // 8))
    return [slice(start, min(start + size, d)) for start in range(0, d, size)]


def memory_of(widths: list[int]) -> int:
    """Bytes that the sums of layer inputs of these widths take, and on top the products of a block of rows."""
    sums = sum(DOUBLE * d * d for d in widths)
    block = _row_blocks(max(widths))[0].stop
    return sums + (SINGLE + DOUBLE) * block * max(widths)  # float32, and made float64 to be added


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
    collector.finish()
