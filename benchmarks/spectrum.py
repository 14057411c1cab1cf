"""The spectrum of layer inputs: against SciPy's generalised eigensolver, and against the bare LAPACK calls.

On two cores ours are two parts of a spectrum, each a process of one thread, as a runner starts them; SciPy takes one
layer input after another, with one thread or two, whichever is faster.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import scipy.linalg
import torch
from bench import Row, alternate, faster, main, within
from scipy.linalg import lapack
from threadpoolctl import threadpool_limits

from folora.gate import soft_gate
from folora.pencil import normalise, solve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

SHRINKAGE = 0.01
PARTS = 2
OFFLINE = [128, 128, 128, 256]
SMOLLM2_BLOCK = [576, 576, 576, 1536]
Pair = tuple["Tensor", "Tensor"]
PAIRS: list[Pair] = []  # of a process


def rows(size: str, repeats: int) -> Iterator[Row]:
    """Solve every layer input of a block for each part, in three ways."""
    for what, widths in (("offline model", OFFLINE), ("SmolLM2-135M", SMOLLM2_BLOCK), ("Llama-3-8B", [4096])):
        if size == "tiny" and what != "offline model":
            return
        prepare(widths)
        check_equal(PAIRS)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(PARTS, context, prepare, (widths,)) as pool:
            ours, one, two, single, least = alternate(
                repeats,
                partial(parts, pool),
                partial(peer, PARTS * PAIRS, 1),
                partial(peer, PARTS * PAIRS, 2),
                partial(whole, PAIRS),
                partial(bare, PAIRS),
            )
        inputs = f"inputs of a block of {what}: {', '.join(map(str, widths))}"
        best, threads = min((one, 1), (two, 2), key=lambda each: median(each[0]))
        note = f"ours in two processes, with a health record; SciPy's best is with threads: {threads}"
        name = "scipy.linalg.eigh(a, b) for each"
        yield faster("spectrum, on two cores", name, f"two times {inputs}", ours, best, 1.5, note)
        limit, note = "Cholesky, two triangular solves, eigh", "in SciPy's LAPACK, with the driver of ours"
        yield within("the same, on one", limit, f"{inputs}; one thread", single, least, 1.15, note)


def prepare(widths: list[int]) -> None:
    """Make the pairs of a block in this process, of one thread."""
    torch.set_num_threads(1)
    threadpool_limits(1)
    PAIRS[:] = [moments(width) for width in widths]


def parts(pool: ProcessPoolExecutor) -> None:
    """Solve the pairs of every process."""
    for done in [pool.submit(solve_own) for _ in range(PARTS)]:
        done.result()


def solve_own() -> None:
    """Solve the pairs of this process."""
    whole(PAIRS)


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


def peer(pairs: list[Pair], threads: int) -> None:
    """SciPy's driver for the generalised problem."""
    with threadpool_limits(threads):
        for penalty, utility in pairs:
            scipy.linalg.eigh(normalise(utility).numpy(), normalise(penalty, SHRINKAGE).numpy())


def bare(pairs: list[Pair]) -> None:
    """The large calls alone, in the LAPACK and by the driver that ours takes."""
    for penalty, utility in pairs:
        # symmetric, so that transposed they lie in the order that LAPACK reads
        L, _ = lapack.dpotrf(normalise(penalty, SHRINKAGE).numpy().T, lower=1, overwrite_a=1)
        half, _ = lapack.dtrtrs(L, normalise(utility).numpy().T, lower=1, overwrite_b=1)
        M, _ = lapack.dtrtrs(L, half.T, lower=1)
        lapack.dsyevd(M, lower=1, overwrite_a=1)


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
