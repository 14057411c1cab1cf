"""What this machine can do at most, for docs/performance.md: products in both precisions, eigh, and memory."""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import torch
from bench import MEASURED, Row, alternate, main

if TYPE_CHECKING:
    from collections.abc import Iterator


def rows(size: str, repeats: int) -> Iterator[Row]:
    """Operations, or bytes, a second; the ratio is to one billion."""
    d, numbers = (2048, 2**27) if size == "full" else (256, 2**20)
    single = torch.rand(d, d)
    double = single.double()
    source, target = torch.zeros(numbers), torch.zeros(numbers)
    shape, size_of = f"{d} x {d}", f"{4 * numbers / 1e6:.0f} MB"
    yield rate("operations, products in float32", shape, 2 * d**3, repeats, partial(product, single))
    yield rate("operations, products in float64", shape, 2 * d**3, repeats, partial(product, double))
    yield rate("operations, eigh in float64, as 9 d³", shape, 9 * d**3, repeats, partial(solve, double @ double.mT))
    yield rate("bytes, copied: read and written", size_of, 8 * numbers, repeats, partial(copy, target, source))


def rate(what: str, work: str, amount: int, repeats: int, run: partial[None]) -> Row:
    """A row without a bound."""
    times = alternate(repeats, run)[0]
    billions = amount / median(times) / 1e9
    return Row(what, "billions a second", work, MEASURED, holds=True, ratio=billions, ours=times, theirs=[1.0])


def product(matrix: torch.Tensor) -> None:
    """A product of large matrices."""
    matrix @ matrix


def solve(matrix: torch.Tensor) -> None:
    """All eigenvalues and vectors."""
    torch.linalg.eigh(matrix)


def copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """From memory to memory."""
    target.copy_(source)


if __name__ == "__main__":
    main(rows)
