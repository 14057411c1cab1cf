from __future__ import annotations

import pytest
import torch
from small import half_of

from folora.triangle import blocks_of, half_size, row_blocks, whole_of


@pytest.mark.parametrize("d", [1, 2, 191, 192, 193, 576, 1537, 2000])
def test_a_half_is_the_whole(d: int) -> None:
    x = torch.randn(d, 3, dtype=torch.float64)
    matrix = x @ x.mT
    half = half_of(matrix)
    assert half.shape == (half_size(d),)
    torch.testing.assert_close(whole_of(half, d), matrix, rtol=0, atol=1e-15 * float(matrix.abs().max()))
    assert [row for rows in row_blocks(d) for row in range(rows.start, rows.stop)] == list(range(d))


@pytest.mark.parametrize("d", [1536, 4096, 14_336])
def test_of_eight_blocks_it_is_little_more_than_half(d: int) -> None:
    assert half_size(d) == d * d * 9 // 16


def test_blocks_are_views() -> None:
    half = torch.zeros(half_size(400))
    for rows, block in blocks_of(half, 400):
        block += torch.ones(rows.stop - rows.start, rows.stop)
    assert torch.equal(whole_of(half, 400), torch.ones(400, 400))


def test_rounding_on_both_sides_of_the_diagonal_is_averaged() -> None:
    assert torch.equal(whole_of(torch.tensor([1.0, 2.0, 4.0, 5.0]), 2), torch.tensor([[1.0, 3.0], [3.0, 5.0]]))
