"""Text whose tokens are counted in moments, and the sums of a text that was not read to its end."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from folora.errors import FoLoRAError
from folora.layers import batches
from folora.moments import Moments, collect
from folora.scratch import save_seconds
from folora.storage import TensorFiles, write_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor, nn

    from folora.params import Covariance
    from folora.rows import MaskedRow

SUMS = "sums"  # the artefact that unfinished sums are


@dataclass(frozen=True)
class CountedText:
    """Rows of tokens, and which of their positions count in a moment.

    Attributes:
        token_ids: rows of any length.
        loss_masks: true on the response, a row each; None for text without one.
        positions: ``all``, ``without_first`` or ``response``.
        batch_size: rows a forward pass.
        padding: token id.
    """

    token_ids: list[list[int]]
    loss_masks: list[list[bool]] | None
    positions: str
    batch_size: int
    padding: int

    @property
    def batch_count(self) -> int:
        """How many forward passes it takes."""
        return -(-len(self.token_ids) // self.batch_size)

    @property
    def tokens(self) -> int:
        """How many tokens count."""
        return sum(int(counted.sum()) for _, _, counted in self._batches("cpu"))

    @torch.no_grad()
    def moments(self, model: Any, layers: dict[str, nn.Linear], sums: Sums | None = None) -> Moments:
        """Second moments of the inputs of ``layers`` (by name of the layer input) while ``model`` reads the text.

        Args:
            model: a causal language model.
            layers: of the model.
            sums: where unfinished work is kept, and taken up.
        """
        with collect(layers, model.device) as collector:
            begun = sums.take_up(collector.moments) if sums else 0
            made = tqdm(self._batches(model.device), "covariance", self.batch_count)
            for number, (input_ids, mask, counted) in enumerate(made):
                if number < begun:
                    continue
                collector.select(counted)
                model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False)
                if sums:
                    sums.save_at_times(collector.moments, number + 1)
        return collector.moments

    def _batches(self, device: torch.device | str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Token ids, which of them are no padding, and which of those count."""
        for input_ids, mask, rows in batches(self.token_ids, self.batch_size, self.padding, device):
            yield input_ids, mask, mask & self._counted(mask, rows)

    def _counted(self, mask: Tensor, rows: range) -> Tensor:
        counted = torch.ones_like(mask)
        if self.positions == "without_first":
            counted[:, 0] = False
        elif self.positions == "response":
            assert self.loss_masks is not None, "params.py allows response positions for the task only"
            length = mask.shape[1]
            padded = [self.loss_masks[row] + [False] * (length - len(self.loss_masks[row])) for row in rows]
            counted = torch.tensor(padded, device=mask.device)
        return counted


def proxy_text(token_ids: list[list[int]], settings: Covariance, padding: int) -> CountedText:
    """Rows of proxy text, as the covariance stage counts their tokens."""
    return CountedText(token_ids, None, settings.proxy_positions, settings.batch_size, padding)


def task_text(rows: list[MaskedRow], settings: Covariance, padding: int) -> CountedText:
    """The rows of a task that the utility is taken over, as the covariance stage counts their tokens."""
    counted = rows[: settings.task_rows]
    ids, learned = [row[0] for row in counted], [row[1] for row in counted]
    return CountedText(ids, learned, settings.task_positions, settings.batch_size, padding)


class Sums:
    """Moments over the first batches of a text, saved every few minutes for the stage to go on from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._saved = time.monotonic()

    def take_up(self, moments: Moments) -> int:
        """Fill moments with the saved sums; returns the number of batches they are over."""
        try:
            saved = TensorFiles(self.path, artefact=SUMS)
        except FoLoRAError:  # there are none, or a power cut has damaged them
            return 0
        for name, value in moments.tensors.items():
            value.copy_(saved[name])
        moments.tokens = saved.manifests[0]["tokens"]
        return int(saved.manifests[0]["batches"])

    def save_at_times(self, moments: Moments, batches: int) -> None:
        """Save sums over so many batches, when the last ones saved are old."""
        if time.monotonic() - self._saved >= save_seconds():
            self.save(moments, batches)
            self._saved = time.monotonic()

    def save(self, moments: Moments, batches: int) -> None:
        """Save sums over so many batches."""
        about = {"artefact": SUMS, "tokens": moments.tokens, "batches": batches}
        write_tensors(self.path, moments.tensors, about)
