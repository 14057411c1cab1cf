from __future__ import annotations

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from folora.gate import (
    hard_gate,
    least_open,
    penalty_gate,
    soft_gate,
    step_gate,
    tau_of_budget,
    tau_of_quantile,
)
from folora.pencil import normalise, solve

PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)
eigenvalues = st.lists(st.one_of(st.just(0.0), st.floats(1e-300, 1e300), st.floats(0.01, 100)), min_size=1, max_size=8)
taus = st.floats(1e-6, 1e6)
exponents = st.floats(0.1, 16)
floors = st.floats(0, 0.99)


def of(values: list[float], tau: float = 1.0, exponent: float = 1.0, floor: float = 0.0) -> Tensor:
    return soft_gate(torch.tensor(values, dtype=torch.float64), tau=tau, exponent=exponent, floor=floor)


def energies(*values: float) -> Tensor:
    """A second moment with these energies along fixed, rotated directions."""
    noise = torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Q = torch.linalg.qr(noise).Q
    return Q * torch.tensor(values, dtype=torch.float64) @ Q.mT


@PROPERTY
@given(eigenvalues, taus, exponents, floors)
def test_is_monotone_between_floor_and_one(values: list[float], tau: float, exponent: float, floor: float) -> None:
    gates = of(sorted(values), tau, exponent, floor)
    assert (gates >= floor).all()
    assert (gates <= 1 + 1e-15).all()
    assert (gates.diff() >= -1e-14).all()


@PROPERTY
@given(st.floats(0.01, 100), taus, exponents, floors)
def test_a_greater_tau_closes_more(value: float, tau: float, exponent: float, floor: float) -> None:
    assert of([value], 1.5 * tau, exponent, floor) <= of([value], tau, exponent, floor) + 1e-14


@pytest.mark.parametrize("tau", [0.2, 1.0, 30.0])
@pytest.mark.parametrize("exponent", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_follows_the_formula(tau: float, exponent: float, floor: float) -> None:
    values = torch.logspace(-4, 4, 17, dtype=torch.float64)
    expected = floor + (1 - floor) * values**exponent / (values**exponent + tau**exponent)
    torch.testing.assert_close(of(values.tolist(), tau, exponent, floor), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 3.0])
def test_ends_are_exact_and_negative_rounding_counts_as_zero(exponent: float) -> None:
    assert of([0.0, -1e-9, 1e300], tau=2, exponent=exponent, floor=0.25).tolist() == [0.25, 0.25, 1.0]


def test_a_high_exponent_approaches_a_threshold_at_tau() -> None:
    assert of([2.0, 3.0, 4.5], tau=3, exponent=16).tolist() == pytest.approx([0, 0.5, 1], abs=2e-3)


@pytest.mark.parametrize("tau", [0.1, 1.0, 5.0])
def test_agrees_with_the_bounded_pencil(tau: float) -> None:
    """C_t v = μ (C_t + τ C_p) v has μ = λ / (λ + τ), the gate."""
    x = torch.randn(2, 30, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.3
    x *= torch.logspace(-1, 1, 6, dtype=torch.float64)
    penalty, utility = x.mT @ x
    pencil = solve(penalty, utility, shrinkage=0.01, name="x")
    C_p, C_t = normalise(penalty, 0.01), normalise(utility)
    bounded = scipy.linalg.eigh(C_t.numpy(), (C_t + tau * C_p).numpy(), eigvals_only=True)
    gates = soft_gate(pencil.eigenvalues, tau=tau, exponent=1, floor=0)
    torch.testing.assert_close(gates, torch.from_numpy(bounded), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_equal_moments_without_a_ridge_give_one_constant_gate(tau: float) -> None:
    both = energies(1e-4, 0.3, 2, 90)
    pencil = solve(both, 1e5 * both, shrinkage=0.0, name="x")
    gates = soft_gate(pencil.eigenvalues, tau=tau, exponent=1, floor=0)
    torch.testing.assert_close(gates, torch.full_like(gates, 1 / (1 + tau)), rtol=1e-8, atol=0)


@pytest.mark.parametrize("shrinkage", [0.001, 0.05])
def test_direction_of_one_side_alone(shrinkage: float) -> None:
    """Energy e ≫ a on the task alone opens the gate to e / (e + a); on the proxy alone leaves it at the floor."""
    penalty, utility = energies(0, 7, 2, 3), energies(50, 0, 10, 40)
    pencil = solve(penalty, utility, shrinkage=shrinkage, name="x")
    gates = soft_gate(pencil.eigenvalues, tau=1, exponent=1, floor=0.125)
    e = 4 * 50 / 100
    assert float(gates[-1]) == pytest.approx(0.125 + 0.875 * e / (e + shrinkage))
    assert float(gates[0]) == pytest.approx(0.125)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 5.0, 25.0])
def test_penalty_gate_follows_the_formula(alpha: float) -> None:
    """Of Scaled Gradient Projection, with the importance (α + 1) σ / (α σ + σ_max)."""
    energy = torch.tensor([1e-6, 9.0, 0.25, 4.0], dtype=torch.float64)
    expected = [1 - (alpha + 1) * s / (alpha * s + 3) for s in (1e-3, 3.0, 0.5, 2.0)]
    assert penalty_gate(energy, alpha=alpha).tolist() == pytest.approx(expected)


def test_penalty_gate_is_closed_at_the_top_and_open_without_energy() -> None:
    gates = penalty_gate(torch.tensor([0.0, -1e-9, 2.0, 50.0]), alpha=5)
    assert gates[:2].tolist() == [1, 1]
    assert gates[3] == 0
    assert 0 < gates[2] < 1
    assert (penalty_gate(torch.tensor([2.0, 50.0]), alpha=25)[0]) < gates[2]


@pytest.mark.parametrize(
    ("share", "opened"), [(1.0, [0, 1, 2, 3, 4]), (0.4, [1, 4]), (0.5, [1, 4]), (0.8, [0, 1, 2, 4]), (0.01, [4])]
)
def test_hard_gate_opens_the_greatest_eigenvalues(share: float, opened: list[int]) -> None:
    gates = hard_gate(torch.tensor([2.0, 30.0, 1.0, 0.0, 1e6]), open_share=share, floor=0.125)
    assert gates.tolist() == [1 if i in opened else 0.125 for i in range(5)]
    eigenvalues = torch.tensor([2.0, 30.0, 1.0, 0.0, 1e6])
    assert step_gate(eigenvalues, least=least_open(eigenvalues, share), floor=0.125).tolist() == gates.tolist()


def test_a_hard_gate_that_opens_a_whole_layer_opens_every_eigenvalue() -> None:
    least = least_open(torch.tensor([1.0, 2.0]), 1.0)
    assert step_gate(torch.tensor([-1e-18, 0.5]), least=least, floor=0.0).tolist() == [1, 1]


@PROPERTY
@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=40, unique=True), st.floats(0, 1), exponents)
def test_tau_of_a_quantile_leaves_that_share_less_than_half_open(
    values: list[float], quantile: float, exponent: float
) -> None:
    eigenvalues = torch.tensor(values, dtype=torch.float64)
    gates = soft_gate(eigenvalues, tau=tau_of_quantile(eigenvalues, quantile), exponent=exponent, floor=0)
    closed = int((gates < 0.5 - 1e-9).sum())
    assert abs(closed - quantile * (len(values) - 1)) <= 1


def test_tau_of_a_quantile_among_zeros_is_positive() -> None:
    assert tau_of_quantile(torch.zeros(4, dtype=torch.float64), 0.5) > 0


@PROPERTY
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20), st.floats(0.02, 0.98), st.floats(0.5, 8))
def test_tau_of_a_budget_spends_it(values: list[float], budget: float, exponent: float) -> None:
    eigenvalues = torch.tensor(values, dtype=torch.float64)
    shape = {"exponent": exponent, "floor": 0.1}
    tau = tau_of_budget(eigenvalues, budget, **shape)
    gates = soft_gate(eigenvalues, tau=tau, **shape)
    assert float(gates.square().mean()) == pytest.approx(budget, rel=1e-9)
    assert tau_of_budget(eigenvalues, budget + 0.01, **shape) < tau


def test_a_budget_out_of_reach_ends_at_the_nearest_tau() -> None:
    """Four in five directions have no utility, so gates can spend no more than a fifth."""
    eigenvalues = torch.tensor([0.0, 0, 0, 0, 3], dtype=torch.float64)
    tau = tau_of_budget(eigenvalues, 0.9, exponent=1, floor=0)
    assert soft_gate(eigenvalues, tau=tau, exponent=1, floor=0).tolist() == pytest.approx([0, 0, 0, 0, 1])
