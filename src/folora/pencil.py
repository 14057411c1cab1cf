"""The spectrum of one layer input: the generalised eigenproblem of utility and penalty.

    C_t v_i = λ_i C_p v_i,    Vᵀ C_p V = I,    Vᵀ C_t V = Λ

C_p and C_t are the second moments E[x xᵀ] of the input over proxy and task tokens. For a rank-one update w vᵀ the
generalised Rayleigh quotient (vᵀ C_t v) / (vᵀ C_p v) is utility per unit of penalty, whatever w is, so the basis of
LoRA's A is exact and static. Float64 throughout; C_p is never inverted.

Of a wide input the directions with the greatest λ may be enough: those left out are as good as shut, and the greatest
λ among them says how good.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from folora.errors import FoLoRAError
from folora.health import LEADING_TOLERANCE, PencilHealth, breaches
from folora.shrinkage import shrinkage_of

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

    from folora.layers import Groups
    from folora.moments import Moments
    from folora.shrinkage import ShrinkageName

RIDGE_LADDER = (1.0, 10.0, 100.0)  # multiples of the shrinkage that are tried before the solver gives up
CHECKED = 64  # directions of a solution whose residual is taken: to check all would cost as much as to solve
POWER_STEPS = 15  # of the power iteration for the extreme eigenvalues of the penalty; some per cent are enough
KRYLOV_BLOCK = 64
KRYLOV_SHARE = 2.5  # columns of the first Krylov basis for each direction that is asked for
KRYLOV_DOUBLINGS = 2  # of its width, as long as the directions have not converged
CONVERTED = 256  # rows of a moment that are made float64 at once: they are read while they are in the cache
STORED = torch.finfo(torch.float32)  # what a moment is kept as


@dataclass(frozen=True)
class Pencil:
    """The solved pencil of one layer input of width d.

    Attributes:
        basis: (d, q), V̂ = c V: columns are directions, C_p-orthogonal, under one global scale c; q = d unless
            fewer were asked for.
        eigenvalues: (q,), λ in ascending order.
        health: how far the solution can be trusted; see ``solve``.
    """

    basis: Tensor
    eigenvalues: Tensor
    health: PencilHealth


@dataclass(frozen=True)
class LayerSpectrum:
    """The spectrum of one layer input of width d: everything a method may need.

    Attributes:
        basis: (d, q) V̂; q = d, or the directions with the greatest λ alone.
        eigenvalues: (q,) λ, ascending.
        penalty: (d, d) C_p, unnormalised.
        utility: (d, d) C_t, unnormalised.
        shrinkage: share of the identity that the pencil mixed into the normalised C_p.
        proxy_tokens: tokens that C_p is the mean of.
        proxy_fourth: mean of ‖x‖⁴ over them.
        health: how far the solution can be trusted; see ``solve``.
    """

    basis: Tensor
    eigenvalues: Tensor
    penalty: Tensor
    utility: Tensor
    shrinkage: float
    proxy_tokens: int
    proxy_fourth: float
    health: PencilHealth

    @property
    def every_eigenvalue(self) -> Tensor:
        """(d,) λ, ascending, with zeros for the directions that were left out."""
        left_out = self.basis.shape[0] - len(self.eigenvalues)
        return torch.cat([self.eigenvalues.new_zeros(left_out), self.eigenvalues])

    def to(self, device: torch.device) -> LayerSpectrum:
        """The same on a device."""
        return replace(
            self,
            basis=self.basis.to(device),
            eigenvalues=self.eigenvalues.to(device),
            penalty=self.penalty.to(device),
            utility=self.utility.to(device),
        )


@dataclass(frozen=True)
class Spectrum:
    """The spectra of all layer inputs, and which layers read each.

    Attributes:
        inputs: name of a layer input (its first layer) to its spectrum.
        groups: name of a layer input to the layers that read it.
    """

    inputs: dict[str, LayerSpectrum]
    groups: Groups

    @property
    def layers(self) -> list[str]:
        """Names of all layers."""
        return [name for names in self.groups.values() for name in names]

    def to(self, device: torch.device) -> Spectrum:
        """The same on a device."""
        return Spectrum({name: one.to(device) for name, one in self.inputs.items()}, self.groups)


def solve_spectrum(
    proxy: Moments,
    task: Moments,
    groups: Groups,
    shrinkage: float | ShrinkageName,
    directions: int | None = None,
) -> Spectrum:
    """Solve the pencil of every layer input.

    Args:
        proxy: moments over text that stands for the pretraining data: the penalty.
        task: moments of the same layer inputs over the task's text: the utility.
        groups: which layers read each input.
        shrinkage: share of the identity that the penalty is mixed with, or how it is estimated.
        directions: the most of a layer input, those with the greatest λ; None: all.

    Raises:
        FoLoRAError: a moment is of no token, not finite or has no energy, or a penalty stays indefinite.
    """
    for side, moments in (("penalty", proxy), ("utility", task)):
        if not moments.tokens:
            raise FoLoRAError(f"the {side} moments are of no token: check the text that they were taken over")
    names = tqdm(groups, "spectrum", unit="input", disable=None)
    return Spectrum({name: input_spectrum(proxy, task, name, shrinkage, directions) for name in names}, groups)


def input_spectrum(
    proxy: Moments, task: Moments, name: str, shrinkage: float | ShrinkageName, directions: int | None = None
) -> LayerSpectrum:
    """Solve the pencil of one layer input, as ``solve_spectrum`` does for all."""
    return layer_spectrum(
        proxy.mean(name),
        task.mean(name),
        shrinkage=shrinkage,
        proxy_tokens=proxy.tokens,
        proxy_fourth=float(proxy.fourths[name]) / proxy.tokens,
        directions=directions,
        name=name,
    )


def layer_spectrum(
    penalty: Tensor,
    utility: Tensor,
    *,
    shrinkage: float | ShrinkageName,
    proxy_tokens: int,
    proxy_fourth: float,
    directions: int | None = None,
    name: str,
) -> LayerSpectrum:
    """The spectrum of one layer input from its moments; see ``LayerSpectrum`` and ``solve``.

    Raises:
        FoLoRAError: as ``solve`` does; or the pencil is not solved well enough to be trusted.
    """
    if isinstance(shrinkage, str):
        if not math.isfinite(proxy_fourth):
            raise FoLoRAError(f"{name}: the mean of ‖x‖⁴ is not finite: give spectrum.shrinkage as a number")
        shrinkage = shrinkage_of(shrinkage, penalty, proxy_fourth, proxy_tokens)
    pencil = solve(penalty, utility, shrinkage=shrinkage, directions=directions, name=name)
    if found := breaches({name: pencil.health}):
        raise FoLoRAError(found[0])
    return LayerSpectrum(
        basis=pencil.basis.float(),
        eigenvalues=pencil.eigenvalues,
        penalty=penalty.float(),
        utility=utility.float(),
        shrinkage=pencil.health.shrinkage,
        proxy_tokens=proxy_tokens,
        proxy_fourth=proxy_fourth,
        health=pencil.health,
    )


def normalise(moment: Tensor, shrinkage: float = 0.0) -> Tensor:
    """Scale a second moment to trace d, then mix with the identity: (1 - a) C + a I.

    After scaling, λ = 1 means "an equal share" in every layer. Shrinkage keeps directions that the proxy hardly
    visits from getting λ = ∞ out of under-sampling alone.
    """
    d = moment.shape[0]
    mixed = moment * ((1 - shrinkage) * d / moment.trace())
    mixed.diagonal().add_(shrinkage)
    return mixed


def normalised_product(A: Tensor, moment: Tensor, shrinkage: float = 0.0) -> Tensor:
    """A @ normalise(moment, shrinkage), (n, d) as A and of its type, without a copy of the moment in that type."""
    scale = (1 - shrinkage) * len(moment) / moment.diagonal().to(A).sum()
    product = shrinkage * A
    for columns, rows in zip((scale * A).split(CONVERTED, 1), moment.split(CONVERTED), strict=True):
        product += columns @ rows.to(A)
    return product


def solve(penalty: Tensor, utility: Tensor, *, shrinkage: float, directions: int | None = None, name: str) -> Pencil:
    """Solve C_t V = C_p V Λ by Cholesky reduction.

    Args:
        penalty: (d, d), second moment over proxy tokens; any scale.
        utility: (d, d), second moment over task tokens; any scale.
        shrinkage: a of ``normalise``, for the penalty.
        directions: how many to find at most, those with the greatest λ; None: all.
        name: the layer input, for errors.

    Returns:
        The pencil, in float64. Its health record holds the relative residual ‖C_t V - C_p V Λ‖ / ‖C_t V‖ and the
        deviation of Vᵀ C_p V from I, both over up to 64 directions; effective ranks (tr C)² / ‖C‖_F²; the top
        direction's share of the trace, the condition of the ridged penalty (both by power iteration) and the shrinkage
        that was used; and ``left_out``, a bound on the λ of the directions that were not asked for.

    Raises:
        FoLoRAError: a moment is not finite or has no energy that float32 can hold, or the penalty stays indefinite with
            100 times the ridge.
    """
    penalty, utility = penalty.double(), utility.double()
    for side, moment in (("penalty", penalty), ("utility", utility)):
        if not STORED.tiny <= torch.linalg.vector_norm(moment, math.inf) <= STORED.max or moment.trace() <= 0:
            reason = "is zero, not finite or beyond the range of float32"
            raise FoLoRAError(f"{name}: the {side} moment {reason}: check the data and run covariance again")
    C_t = normalise(utility)
    C_p, L, ridge = ridged(penalty, shrinkage, name)
    d = len(L)
    eigenvalues, V, left_out = greatest(C_p, L, C_t, directions)
    inverse_trace = V.square().sum() if V.shape[1] == d else estimated_inverse_trace(L)
    checked = checked_of(V)
    penalised, used = C_p @ V[:, checked], C_t @ V[:, checked]
    overlap = V.mT @ penalised
    overlap[checked, torch.arange(len(checked), device=V.device)] -= 1
    largest, smallest = extreme_eigenvalues(C_p, L)
    health = PencilHealth.model_construct(  # unchecked: a figure that is not finite is a breach, with its layer's name
        width=d,
        shrinkage=ridge,
        residual=relative_residual(penalised, used, eigenvalues[checked]),
        orthonormality=float(overlap.abs().max()),
        condition=largest / smallest,
        top_share=max(0.0, (largest - ridge) / (1 - ridge) / d),
        penalty_rank=effective_rank(penalty),
        utility_rank=effective_rank(utility),
        left_out=float(left_out),
    )
    scale = (d / inverse_trace).sqrt()  # c = √(d / tr C_p⁻¹), so that all of V̂ has the Frobenius norm √d
    return Pencil(basis=scale * V, eigenvalues=eigenvalues.clamp_min(0), health=health)


def checked_of(V: Tensor) -> Tensor:
    """Which of the directions (d, q) are checked, from the first to the last."""
    return torch.linspace(0, V.shape[1] - 1, min(V.shape[1], CHECKED), device=V.device).long()


def relative_residual(penalised: Tensor, used: Tensor, eigenvalues: Tensor) -> float:
    """‖C_t V - C_p V Λ‖ / ‖C_t V‖ of some directions, given C_p V and C_t V, (d, n) each."""
    return float((used - penalised * eigenvalues).norm() / used.norm())


def directions_of(penalty: Tensor, utility: Tensor, *, shrinkage: float, name: str) -> tuple[Tensor, Tensor]:
    """λ and V̂ of a small pencil, as ``solve`` finds them, without a record of its health."""
    _, L, _ = ridged(penalty, shrinkage, name)
    eigenvalues, V = reduced(L, normalise(utility))
    return eigenvalues.clamp_min(0), V * (math.sqrt(len(V)) / V.norm())


def ridged(penalty: Tensor, shrinkage: float, name: str) -> tuple[Tensor, Tensor, float]:
    """The normalised penalty C_p (d, d), its Cholesky factor L (d, d), and the shrinkage that it took.

    Raises:
        FoLoRAError: it stays indefinite with 100 times the shrinkage.
    """
    for factor in RIDGE_LADDER:
        ridge = min(shrinkage * factor, 0.5)
        C_p = normalise(penalty, ridge)
        L, failed = torch.linalg.cholesky_ex(C_p)
        if not failed:
            return C_p, L, ridge
    pivot = float(torch.linalg.eigvalsh(C_p)[0])
    raise FoLoRAError(
        f"{name}: the penalty is not positive definite (smallest eigenvalue {pivot:.1e}): raise spectrum.shrinkage"
    )


def reduced(L: Tensor, C_t: Tensor) -> tuple[Tensor, Tensor]:
    """λ (d,), ascending, and V (d, d) of C_t V = C_p V Λ with Vᵀ C_p V = I, given the factor of C_p = L Lᵀ."""
    M = torch.linalg.solve_triangular(L, C_t, upper=False)
    M = torch.linalg.solve_triangular(L, M.mT, upper=False)
    eigenvalues, U = torch.linalg.eigh(M)  # reads one triangle, so M need not be symmetric to the last bit
    return eigenvalues, torch.linalg.solve_triangular(L.mT, U, upper=True)


def greatest(C_p: Tensor, L: Tensor, C_t: Tensor, directions: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """So many directions with the greatest λ, or all: as ``leading`` returns them, by whichever way is shorter."""
    if directions is not None and (found := leading(C_p, L, C_t, directions)):
        return found
    eigenvalues, V = whole(L, C_t)
    if directions is None or directions >= len(L):
        return eigenvalues, V, V.new_zeros(())
    return eigenvalues[-directions:], V[:, -directions:].contiguous(), eigenvalues[-directions - 1]


def whole(L: Tensor, C_t: Tensor) -> tuple[Tensor, Tensor]:
    """As ``reduced``; on a CPU by the LAPACK of SciPy's build, which is faster than that of torch's."""
    if C_t.device.type == "cpu":
        from scipy.linalg import lapack

        with _blas().limit(limits=torch.get_num_threads()):
            factor = L.numpy()
            M, _ = lapack.dsygst(C_t.numpy().T, factor, lower=1)  # transposed, it lies in the order that LAPACK reads
            eigenvalues, U, failed = lapack.dsyevd(M, lower=1, overwrite_a=1)
            if not failed:
                V, _ = lapack.dtrtrs(factor, U, lower=1, trans=1, overwrite_b=1)
                return torch.from_numpy(eigenvalues), torch.from_numpy(V)
    return reduced(L, C_t)


@cache
def _blas() -> ThreadpoolController:
    """What sets the threads of SciPy's BLAS, which torch does not."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


def krylov_columns(directions: int) -> int:
    """Width of the Krylov basis in which ``leading`` looks for so many directions first."""
    return math.ceil(KRYLOV_SHARE * directions / KRYLOV_BLOCK + 1) * KRYLOV_BLOCK


def leading(C_p: Tensor, L: Tensor, C_t: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The greatest λ and their directions, by block Lanczos with full reorthogonalisation.

    Golub and Underwood (1977), on M = L⁻¹ C_t L⁻ᵀ, which is applied and never formed. Where λ falls slowly the first
    basis is too narrow, and is widened until the residual is within its limit, or ``KRYLOV_DOUBLINGS`` times.

    Args:
        C_p: (d, d), ridged.
        L: (d, d), its Cholesky factor.
        C_t: (d, d).
        count: q.

    Returns:
        λ (q,), ascending; V (d, q) with Vᵀ C_p V = I; and a bound on the λ of all other directions: the next
        Ritz value plus the norm of its residual. None where such a basis would not be narrower than the input.
    """
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(len(L), KRYLOV_BLOCK, dtype=L.dtype, generator=generator).to(L.device)
    basis = images = L.new_zeros(len(L), 0)
    found = None
    for columns in (krylov_columns(count) << doubled for doubled in range(KRYLOV_DOUBLINGS + 1)):
        if columns >= len(L):
            return None
        done = basis.shape[1]
        basis, images = (torch.nn.functional.pad(part, (0, columns - done)) for part in (basis, images))
        for start in range(done, columns, KRYLOV_BLOCK):
            for _ in range(2):  # once more after scaling: where the Krylov space is exhausted, only noise is left
                block = torch.linalg.qr(block - basis @ (basis.mT @ block))[0]
            basis[:, start : start + KRYLOV_BLOCK] = block
            block = torch.linalg.solve_triangular(L.mT, block, upper=True)
            block = torch.linalg.solve_triangular(L, C_t @ block, upper=False)
            images[:, start : start + KRYLOV_BLOCK] = block
        ritz, coefficients = torch.linalg.eigh(basis.mT @ images)
        beyond = coefficients[:, -count - 1]
        left_out = ritz[-count - 1] + (images @ beyond - ritz[-count - 1] * (basis @ beyond)).norm()
        V = torch.linalg.solve_triangular(L.mT, basis @ coefficients[:, -count:], upper=True)
        found = ritz[-count:], V, left_out
        checked = checked_of(V)
        if relative_residual(C_p @ V[:, checked], C_t @ V[:, checked], found[0][checked]) <= LEADING_TOLERANCE:
            break
    return found


def estimated_inverse_trace(L: Tensor) -> Tensor:
    """The trace of C_p⁻¹, E‖L⁻¹ z‖² over 64 vectors z of random signs (Hutchinson 1990), within a few per cent."""
    signs = torch.randint(0, 2, (len(L), 64), generator=torch.Generator().manual_seed(0)).to(L) * 2 - 1
    return torch.linalg.solve_triangular(L, signs, upper=False).square().sum() / signs.shape[1]


def extreme_eigenvalues(C: Tensor, L: Tensor) -> tuple[float, float]:
    """The greatest and the smallest eigenvalue of C = L Lᵀ, by power iteration with C and with its inverse."""
    norm = torch.linalg.vector_norm  # a tensor's own takes three calls to get there
    largest = smallest = torch.randn(len(C), 1, dtype=C.dtype, generator=torch.Generator().manual_seed(0)).to(C.device)
    for _ in range(POWER_STEPS):
        largest = C @ (largest / norm(largest))
        half = torch.linalg.solve_triangular(L, smallest / norm(smallest), upper=False)
        smallest = torch.linalg.solve_triangular(L.mT, half, upper=True)
    return float(norm(largest)), 1 / float(norm(smallest))


def effective_rank(moment: Tensor) -> float:
    """Participation ratio (tr C)² / ‖C‖_F² of the eigenvalues: d for a flat spectrum, 1 for a single direction."""
    return float(moment.trace() / torch.linalg.vector_norm(moment)) ** 2  # without a square in memory
