from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch
from torch import Tensor

from folora.errors import FoLoRAError
from folora.pencil import effective_rank, normalise, solve

WIDTH = 7


def moment(seed: int, tokens: int = 60) -> Tensor:
    """E[x xᵀ] of shifted, mixed and badly scaled tokens; its rank is at most ``tokens``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64) - 0.4
    mixing = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    x = x @ mixing * torch.logspace(-1.5, 1.5, WIDTH, dtype=torch.float64)
    return x.mT @ x / tokens


def rotation(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)).Q


def matrix_close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("shrinkage", [1e-3, 0.01, 0.3])
@pytest.mark.parametrize(("proxy_tokens", "task_tokens"), [(60, 60), (60, 3), (4, 60), (3, 4)])
def test_agrees_with_scipy(shrinkage: float, proxy_tokens: int, task_tokens: int) -> None:
    penalty, utility = moment(1, proxy_tokens), moment(2, task_tokens)
    pencil = solve(penalty, utility, shrinkage=shrinkage, name="x")
    C_p, C_t = normalise(penalty, shrinkage), normalise(utility)
    values, vectors = map(torch.from_numpy, scipy.linalg.eigh(C_t.numpy(), C_p.numpy()))
    matrix_close(pencil.eigenvalues, values)
    # eigenvectors have free signs, and a null space free axes: compare what depends on neither
    scale = WIDTH / torch.linalg.inv(C_p).trace()
    matrix_close(pencil.basis * pencil.eigenvalues @ pencil.basis.mT, scale * vectors * values @ vectors.mT)


@pytest.mark.parametrize("tokens", [60, 3])
def test_basis_diagonalises_both_moments_under_one_scale(tokens: int) -> None:
    penalty, utility = moment(1, tokens), moment(2)
    pencil = solve(penalty, utility, shrinkage=0.02, name="x")
    C_p, C_t = normalise(penalty, 0.02), normalise(utility)
    scale = math.sqrt(WIDTH / float(torch.linalg.inv(C_p).trace()))
    V = pencil.basis / scale
    torch.testing.assert_close(V.mT @ C_p @ V, torch.eye(WIDTH, dtype=V.dtype), rtol=0, atol=1e-10)
    matrix_close(V.mT @ C_t @ V, pencil.eigenvalues.diag(), 1e-10)
    assert float(pencil.basis.norm()) == pytest.approx(math.sqrt(WIDTH))
    assert (pencil.eigenvalues.diff() >= 0).all()


def test_a_unit_step_costs_the_same_in_every_direction() -> None:
    """Only C_p-orthonormal columns do this; unit-length columns would not."""
    penalty = moment(1)
    basis = solve(penalty, moment(2), shrinkage=0.01, name="x").basis
    costs = ((basis.mT @ normalise(penalty, 0.01)) * basis.mT).sum(1)
    matrix_close(costs, costs.mean().expand(WIDTH), 1e-10)
    assert basis.norm(dim=0).max() > 2 * basis.norm(dim=0).min()


def test_eigenvalue_is_utility_per_penalty_of_any_rank_one_update() -> None:
    penalty, utility = moment(1), moment(2)
    pencil = solve(penalty, utility, shrinkage=0.05, name="x")
    C_p, C_t = normalise(penalty, 0.05), normalise(utility)
    for seed, (direction, eigenvalue) in enumerate(zip(pencil.basis.T, pencil.eigenvalues, strict=True)):
        w = torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        update = torch.outer(w, direction)
        ratio = (update @ C_t @ update.T).trace() / (update @ C_p @ update.T).trace()
        torch.testing.assert_close(ratio, eigenvalue, rtol=1e-7, atol=1e-9)


def test_scale_of_the_moments_does_not_matter() -> None:
    one = solve(moment(1), moment(2), shrinkage=0.01, name="x")
    other = solve(3e-9 * moment(1), 7e8 * moment(2), shrinkage=0.01, name="x")
    matrix_close(other.eigenvalues, one.eigenvalues)
    matrix_close(other.basis.abs(), one.basis.abs(), 1e-7)


@pytest.mark.parametrize("tokens", [60, 4])
@pytest.mark.parametrize("shrinkage", [0.01, 0.4])
def test_equal_moments_feel_only_the_ridge(tokens: int, shrinkage: float) -> None:
    """λ = p / ((1 - a) p + a) of a penalty eigenvalue p, for full and for deficient rank."""
    both = moment(1, tokens)
    pencil = solve(both, both, shrinkage=shrinkage, name="x")
    p = torch.linalg.eigvalsh(normalise(both)).clamp_min(0)
    matrix_close(pencil.eigenvalues, p / ((1 - shrinkage) * p + shrinkage), 1e-8)


def test_equal_moments_without_a_ridge_have_eigenvalues_one() -> None:
    both = moment(1)
    pencil = solve(both, 5 * both, shrinkage=0.0, name="x")
    torch.testing.assert_close(pencil.eigenvalues, torch.ones(WIDTH, dtype=torch.float64), rtol=0, atol=1e-6)


def test_float32_moments_are_solved_in_float64_and_left_alone() -> None:
    penalty, utility = moment(1).float(), moment(2).float()
    kept = penalty.clone(), utility.clone()
    pencil = solve(penalty, utility, shrinkage=0.01, name="x")
    exact = solve(penalty.double(), utility.double(), shrinkage=0.01, name="x")
    assert pencil.basis.dtype == pencil.eigenvalues.dtype == torch.float64
    assert torch.equal(pencil.eigenvalues, exact.eigenvalues)
    assert torch.equal(penalty, kept[0])
    assert torch.equal(utility, kept[1])


def test_normalise_sets_the_trace_and_mixes_the_identity() -> None:
    raw = moment(3, tokens=2)
    plain, mixed = normalise(raw), normalise(raw, 0.25)
    assert float(plain.trace()) == pytest.approx(WIDTH)
    assert float(mixed.trace()) == pytest.approx(WIDTH)
    matrix_close(plain / plain[0, 0], raw / raw[0, 0])
    spectrum = torch.linalg.eigvalsh(plain)
    matrix_close(torch.linalg.eigvalsh(mixed), 0.75 * spectrum + 0.25)


@pytest.mark.parametrize("side", ["penalty", "utility"])
@pytest.mark.parametrize("fault", ["nan", "inf", "zero"])
def test_names_a_moment_that_is_not_finite_or_has_no_energy(side: str, fault: str) -> None:
    moments = {"penalty": moment(1), "utility": moment(2)}
    if fault == "zero":
        moments[side].zero_()
    else:
        moments[side][2, 3] = float(fault)
    with pytest.raises(FoLoRAError, match=rf"layers\.3\.q: the {side} moment"):
        solve(**moments, shrinkage=0.01, name="layers.3.q")


def indefinite(least: float) -> Tensor:
    """A rotated moment of trace WIDTH whose least eigenvalue is ``least``."""
    spectrum = torch.full((WIDTH,), (WIDTH - least) / (WIDTH - 1), dtype=torch.float64)
    spectrum[0] = least
    Q = rotation(4)
    return Q * spectrum @ Q.mT


@pytest.mark.parametrize(("least", "ridge"), [(-0.005, 0.01), (-0.05, 0.1), (-0.5, 0.5)])
def test_ridge_climbs_its_ladder_until_the_penalty_is_definite(least: float, ridge: float) -> None:
    pencil = solve(indefinite(least), moment(2), shrinkage=0.01, name="x")
    assert pencil.health["shrinkage"] == pytest.approx(ridge)
    assert pencil.health["orthonormality"] < 1e-9


@pytest.mark.parametrize(("least", "shrinkage"), [(-2.0, 0.01), (-0.5, 1e-4), (-0.01, 0.0)])
def test_ladder_is_bounded_and_ends_in_a_named_error(least: float, shrinkage: float) -> None:
    with pytest.raises(FoLoRAError, match=r"layers\.0\.down: .*not positive definite.*spectrum\.shrinkage"):
        solve(indefinite(least), moment(2), shrinkage=shrinkage, name="layers.0.down")


def test_health_describes_penalty_and_solution() -> None:
    spectrum = torch.tensor([3.0, 3.0, 1.0, 0, 0, 0, 0], dtype=torch.float64)
    Q = rotation(5)
    pencil = solve(Q * spectrum @ Q.mT * 1e4, torch.outer(Q[0], Q[0]), shrinkage=0.02, name="x")
    health = pencil.health
    ridged = 0.98 * spectrum + 0.02
    assert health["width"] == WIDTH
    assert health["shrinkage"] == 0.02
    assert health["residual"] < 1e-12
    assert health["orthonormality"] < 1e-12
    assert health["top_share"] == pytest.approx(3 / 7)
    assert health["condition"] == pytest.approx(float(ridged.max() / ridged.min()))
    assert health["penalty_rank"] == pytest.approx(effective_rank(spectrum))
    assert health["utility_rank"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("spectrum", "rank"), [([2.0, 2, 2], 3), ([5.0, 0, 0], 1), ([1.0, 1, 0], 2), ([2.0, 1, 1], 2**1.5)]
)
def test_effective_rank(spectrum: list[float], rank: float) -> None:
    assert effective_rank(torch.tensor(spectrum)) == pytest.approx(rank)
