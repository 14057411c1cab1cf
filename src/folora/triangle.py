"""Half of a symmetric matrix: its rows up to the diagonal, in blocks that are wide enough for fast products.

A (d, d) matrix is a vector: its blocks of rows one after another, each with the columns up to its own last row. Of some
eight blocks that is 9/16 of d² numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

NARROWEST = 192  # rows of a block: a product of fewer would not pay
BLOCKS = 8


def row_blocks(d: int) -> list[slice]:
    """The rows of each block of a (d, d) matrix."""
    size = max(NARROWEST, -(-d // BLOCKS))
    return [slice(start, min(start + size, d)) for start in range(0, d, size)]


def half_size(d: int) -> int:
    """How many numbers the half of a (d, d) matrix has."""
    return sum((rows.stop - rows.start) * rows.stop for rows in row_blocks(d))


def blocks_of(half: Tensor, d: int) -> Iterator[tuple[slice, Tensor]]:
    """The blocks of the half of a (d, d) matrix: rows, and a view of its entries, (rows, columns up to the last)."""
    start = 0
    for rows in row_blocks(d):
        end = start + (rows.stop - rows.start) * rows.stop
        yield rows, half[start:end].view(-1, rows.stop)
        start = end


def whole_of(half: Tensor, d: int) -> Tensor:
    """The symmetric matrix (d, d) of a half.

    What a block holds on both sides of the diagonal is averaged: float32 products are not always symmetric to the last
    bit, and a Cholesky factor sees one triangle only.
    """
    whole = half.new_empty(d, d)
    for rows, block in blocks_of(half, d):
        left, diagonal = block.split([rows.start, rows.stop - rows.start], 1)
        whole[rows, : rows.start] = left
        whole[: rows.start, rows] = left.mT
        whole[rows, rows] = (diagonal + diagonal.mT) / 2
    return whole
