"""The spectrum of layer inputs: against SciPy's generalised eigensolver, and against the bare LAPACK calls."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import scipy.linalg
import torch
from bench import Row, alternate, faster, main, within
from threadpoolctl import threadpool_limits

from folora.gate import soft_gate
from folora.pencil import normalise, solve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

SHRINKAGE = 0.01
OFFLINE = [128, 128, 128, 256]
SMOLLM2_BLOCK = [576, 576, 576, 1536]
Pair = tuple["Tensor", "Tensor"]


def rows(size: str, repeats: int) -> Iterator[Row]:
    """Solve every layer input of one block, three ways, on one thread each, as the stage does."""
    torch.set_num_threads(1)
    threadpool_limits(1)
    for what, widths in (("offline model", OFFLINE), ("SmolLM2-135M", SMOLLM2_BLOCK), ("Llama-3-8B", [4096])):
        if size == "tiny" and what != "offline model":
            return
        pairs = [moments(width) for width in widths]
        if what != "Llama-3-8B":
            check_equal(pairs)
        ours, scipy_s, lapack = alternate(repeats, partial(whole, pairs), partial(peer, pairs), partial(bare, pairs))
        work = f"inputs of one block of {what}: {', '.join(map(str, widths))}; one thread"
        note = "ours is the same LAPACK, and a health record"
        yield faster("spectrum", "scipy.linalg.eigh(a, b)", work, ours, scipy_s, 1.5, note)
        limit = "Cholesky, two triangular solves, eigh"
        yield within("the same", limit, work, ours, lapack, 1.15, "in torch's LAPACK, which SciPy's outruns here")


def moments(width: int) -> Pair:
    """Penalty and utility with spectra that fall off as those of activations do; the utility of fewer tokens."""
    pair = []
    for seed, count in ((1, 4 * width), (2, width)):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(count, width, generator=generator, dtype=torch.float64)
        x = x * torch.logspace(0, -2, width, dtype=torch.float64)[torch.randperm(width, generator=generator)]
        pair.append(x.mT @ x)
    return pair[0], pair[1]


def whole(pairs: list[Pair]) -> None:
    """What the spectrum stage does."""
    for penalty, utility in pairs:
        solve(penalty, utility, shrinkage=SHRINKAGE, name="x")


def peer(pairs: list[Pair]) -> None:
    """SciPy's driver for the generalised problem."""
    for penalty, utility in pairs:
        scipy.linalg.eigh(normalise(utility).numpy(), normalise(penalty, SHRINKAGE).numpy())


def bare(pairs: list[Pair]) -> None:
    """The large calls alone."""
    for penalty, utility in pairs:
        L = torch.linalg.cholesky(normalise(penalty, SHRINKAGE))
        half = torch.linalg.solve_triangular(L, normalise(utility), upper=False)
        torch.linalg.eigh(torch.linalg.solve_triangular(L, half.mT, upper=False))


def check_equal(pairs: list[Pair]) -> None:
    """See that λ and gates are SciPy's."""
    for penalty, utility in pairs:
        found = solve(penalty, utility, shrinkage=SHRINKAGE, name="x").eigenvalues
        expected = torch.from_numpy(
            scipy.linalg.eigh(normalise(utility).numpy(), normalise(penalty, SHRINKAGE).numpy(), eigvals_only=True)
        )
        assert (found - expected).abs().max() <= 1e-8 * expected.max()
        gates, same = (soft_gate(values, tau=1.0, exponent=1.0, floor=0.0) for values in (found, expected))
        assert (gates - same).abs().max() <= 1e-8


if __name__ == "__main__":
    main(rows)
