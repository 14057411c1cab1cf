from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch
from small import half_of
from torch import Tensor

from folora.errors import FoLoRAError
from folora.gate import soft_gate
from folora.health import LEADING_TOLERANCE, breaches
from folora.moments import Moments
from folora.pencil import (
    CONVERTED,
    effective_rank,
    estimated_inverse_trace,
    extreme_eigenvalues,
    krylov_columns,
    normalise,
    normalised_product,
    solve,
    solve_spectrum,
)

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


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


@pytest.mark.parametrize("width", [1, CONVERTED, 2 * CONVERTED + 3])
def test_rows_are_multiplied_with_the_normalised_moment(width: int) -> None:
    root, A = noise(1, width, width), noise(2, 5, width)
    raw = (root @ root.mT).float()
    for shrinkage in (0.0, 0.25):
        found = normalised_product(A, raw, shrinkage)
        matrix_close(found, A @ normalise(raw.double(), shrinkage))


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
    assert pencil.health.shrinkage == pytest.approx(ridge)
    assert pencil.health.orthonormality < 1e-9


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
    assert health.width == WIDTH
    assert health.shrinkage == 0.02
    assert health.residual < 1e-12
    assert health.orthonormality < 1e-12
    assert health.top_share == pytest.approx(3 / 7)
    assert health.condition == pytest.approx(float(ridged.max() / ridged.min()))
    assert health.penalty_rank == pytest.approx(7**2 / 19)
    assert health.utility_rank == pytest.approx(1, abs=1e-6)
    assert health.left_out == 0


@pytest.mark.parametrize(
    ("spectrum", "rank"), [([2.0, 2, 2], 3), ([5.0, 0, 0], 1), ([1.0, 1, 0], 2), ([2.0, 1, 1], 16 / 6)]
)
def test_effective_rank(spectrum: list[float], rank: float) -> None:
    Q = rotation(6)[:3, :3]
    Q = torch.linalg.qr(Q)[0]
    assert effective_rank(Q * torch.tensor(spectrum, dtype=Q.dtype) @ Q.mT) == pytest.approx(rank)


@pytest.mark.parametrize("condition", [2.0, 1e3, 1e6])
def test_condition_and_inverse_trace_are_estimated_within_some_per_cent(condition: float) -> None:
    d = 200
    Q = torch.linalg.qr(noise(3, d, d))[0]
    spectrum = torch.logspace(0, -math.log10(condition), d, dtype=torch.float64)
    C = Q * spectrum @ Q.mT
    L = torch.linalg.cholesky(C)
    largest, smallest = extreme_eigenvalues(C, L)
    assert largest == pytest.approx(1, rel=0.15)
    assert smallest == pytest.approx(1 / condition, rel=0.15)
    assert float(estimated_inverse_trace(L)) == pytest.approx(float((1 / spectrum).sum()), rel=0.1)


def wide(d: int, rank: int) -> tuple[Tensor, Tensor]:
    """A penalty and a utility whose spectra fall off as those of activations do; the utility of this rank."""
    penalty, utility = (
        noise(seed, d, count) * torch.logspace(0, -2, count, dtype=torch.float64)
        for seed, count in ((1, 2 * d), (2, rank))
    )
    return penalty @ penalty.mT, utility @ utility.mT


@pytest.mark.parametrize(("rank", "count"), [(600, 60), (100, 60), (40, 60), (1, 16)])
def test_the_greatest_directions_alone_are_those_of_the_whole_spectrum(rank: int, count: int) -> None:
    penalty, utility = wide(300, rank)
    whole = solve(penalty, utility, shrinkage=0.01, name="x")
    part = solve(penalty, utility, shrinkage=0.01, directions=count, name="x")
    assert krylov_columns(count) < 300
    assert part.basis.shape == (300, count)
    torch.testing.assert_close(part.eigenvalues, whole.eigenvalues[-count:], rtol=1e-4, atol=1e-8)
    assert part.health.residual < 1e-3
    assert part.health.orthonormality < 1e-10
    left_out = float(whole.eigenvalues[-count - 1])
    assert left_out <= part.health.left_out + 1e-9 <= 1.1 * left_out + 1e-6
    # in C_p-orthonormal coordinates the gate operator is off by the gates of what was left out, and no more
    C_p = normalise(penalty, 0.01)
    L = torch.linalg.cholesky(C_p)
    operators = []
    for one in (whole, part):
        V = one.basis / (one.basis * (C_p @ one.basis)).sum(0).sqrt()
        operators.append((L.mT @ V) * soft_gate(one.eigenvalues, tau=1.0, exponent=1.0, floor=0.0) @ (V.mT @ L))
    bound = part.health.left_out / (1 + part.health.left_out)
    assert torch.linalg.matrix_norm(operators[0] - operators[1], 2) <= bound + 1e-3


def flat(d: int) -> tuple[Tensor, Tensor]:
    """A penalty and a utility of white tokens: nothing sets the greatest λ apart from the next."""
    penalty, utility = (noise(seed, d, count) for seed, count in ((1, 20 * d), (2, 4 * d)))
    return penalty @ penalty.mT, utility @ utility.mT


@pytest.mark.parametrize("d", [300, 600])  # in the end the whole spectrum, and a basis of 512 columns
def test_the_krylov_basis_grows_until_the_directions_have_converged(d: int) -> None:
    penalty, utility = flat(d)
    whole = solve(penalty, utility, shrinkage=0.01, name="x")
    part = solve(penalty, utility, shrinkage=0.01, directions=16, name="x")
    torch.testing.assert_close(part.eigenvalues, whole.eigenvalues[-16:], rtol=1e-3, atol=0)
    assert part.health.residual <= LEADING_TOLERANCE
    assert whole.eigenvalues[-17] <= part.health.left_out <= 1.05 * whole.eigenvalues[-17]


def test_directions_that_do_not_converge_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("folora.pencil.KRYLOV_DOUBLINGS", 0)
    penalty, utility = (Moments({"x": 300}, {"x": half_of(C)}, {"x": torch.tensor(1.0)}, 1) for C in flat(300))
    expected = "x: the residual of its pencil is 2e-01, more than 1e-02: raise spectrum.directions"
    with pytest.raises(FoLoRAError, match=expected):
        solve_spectrum(penalty, utility, {"x": ["x"]}, 0.01, directions=16)
    assert (
        solve_spectrum(penalty, utility, {"x": ["x"]}, 0.01, directions=200).inputs["x"].health.residual
        <= LEADING_TOLERANCE
    )


def test_a_residual_that_is_no_number_is_a_breach() -> None:
    health = solve(moment(1), moment(2), shrinkage=0.01, name="x").health
    assert breaches({"x": health}) == []
    (line,) = breaches({"x": health.model_copy(update={"residual": math.nan})})
    assert line.startswith("x: the residual of its pencil is nan, more than")


def test_a_few_of_a_narrow_input_s_directions_are_cut_off_the_whole_spectrum() -> None:
    whole = solve(moment(1), moment(2), shrinkage=0.01, name="x")
    part = solve(moment(1), moment(2), shrinkage=0.01, directions=3, name="x")
    kept = whole.basis[:, -3:]
    torch.testing.assert_close(part.basis / part.basis.norm(), kept / kept.norm())  # their scale is an estimate
    assert part.health.left_out == pytest.approx(float(whole.eigenvalues[-4]))
    everything = solve(moment(1), moment(2), shrinkage=0.01, directions=WIDTH + 1, name="x")
    torch.testing.assert_close(everything.basis, whole.basis)
