"""The greatest directions of a wide layer input, against all of its spectrum."""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import torch
from bench import Row, alternate, faster, main, peak_memory

from folora.gate import soft_gate
from folora.pencil import solve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

DIRECTIONS = 512
RANK = 1024  # of the moments, beside a diagonal
LLAMA_DOWN = 14_336


def rows(size: str, repeats: int) -> Iterator[Row]:
    """Time the greatest directions at the width of Llama-3-8B's down_proj; the whole solution is extrapolated."""
    measured, wide = ([1024, 2048, 4096], LLAMA_DOWN) if size == "full" else ([128, 256], 1024)
    directions = DIRECTIONS if size == "full" else 64
    check_gates(measured[-1], directions // 2)
    whole = {d: median(alternate(repeats, partial(run, *moments(d), None))[0]) for d in measured}
    cubic = whole[measured[-1]] * (wide / measured[-1]) ** 3
    some = alternate(1 if size == "full" else repeats, partial(run, *moments(wide), directions))[0]
    what, peer = f"{directions} directions of an input of width {wide:,}", "all directions, extrapolated"
    times = ", ".join(f"{d:,}: {seconds:.2g} s" for d, seconds in whole.items())
    note = (
        f"by d³ from the last of {times}; repeats: {len(some)} of ours, {repeats} of each whole solution; "
        f"moments of rank {RANK:,} plus a diagonal"
    )
    yield faster(what, peer, "one input", some, [cubic], 5, note)
    memory = peak_memory(partial(prepare, wide, directions))
    square = peak_memory(partial(prepare, measured[-1], None)) * (wide / measured[-1]) ** 2
    row = faster("the same, memory beyond the moments", peer, "one input", [memory], [square], 2, "by d²")
    row.unit = "bytes"
    yield row


def prepare(width: int, directions: int | None) -> Callable[[], None]:
    """A solution whose moments are there."""
    return partial(run, *moments(width), directions)


def run(penalty: Tensor, utility: Tensor, directions: int | None) -> None:
    """What the spectrum stage does for one input."""
    solve(penalty, utility, shrinkage=0.01, directions=directions, name="x")


def moments(width: int) -> tuple[Tensor, Tensor]:
    """Second moments with spectra that fall off: a diagonal and fewer tokens than channels, to be made quickly."""
    pair = []
    for seed, count in ((1, RANK), (2, RANK)):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(min(count, width), width, generator=generator)
        x *= torch.logspace(0, -2, width)[torch.randperm(width, generator=generator)]
        moment = (x.mT @ x).double()
        moment.diagonal().add_(1e-3 * moment.diagonal().mean())
        pair.append(moment)
    return pair[0], pair[1]


def check_gates(width: int, directions: int) -> None:
    """See that no gate is further off than the bound says."""
    penalty, utility = moments(width)
    whole = solve(penalty, utility, shrinkage=0.01, name="x")
    part = solve(penalty, utility, shrinkage=0.01, directions=directions, name="x")
    bound, expected, found = (
        soft_gate(values, tau=1.0, exponent=1.0, floor=0.0)
        for values in (torch.tensor([part.health.left_out]), whole.eigenvalues, part.eigenvalues)
    )
    assert (expected[:-directions] <= bound + 1e-9).all()
    assert (expected[-directions:] - found).abs().max() < 1e-3


if __name__ == "__main__":
    main(rows)
