"""Hostile numbers from layer inputs to gates: a right result, or a mistake that is named in one line."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from folora import covariance, spectrum
from folora.errors import FoLoRAError
from folora.health import SOLVE_TOLERANCE
from folora.moments import Moments, collect
from folora.pencil import LayerSpectrum, normalise, solve_spectrum
from folora.stability import stability

PROPERTY = settings(deadline=None, derandomize=True, max_examples=150)
X = "x"
FLOAT32 = torch.finfo(torch.float32)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def measured(tokens: Tensor) -> Moments:
    """Moments of the input of a layer that reads tokens (n, d)."""
    layer = nn.Linear(tokens.shape[1], 1, bias=False)
    with torch.no_grad(), collect({X: layer}) as collector:
        collector.select(torch.ones(1, len(tokens), dtype=torch.bool))
        layer(tokens[None])
    return collector.moments


def outcome(proxy: Tensor, task: Tensor, shrinkage: Any = 0.01) -> LayerSpectrum | str:
    """The spectrum of tokens (n, d) of the proxy and of the task, or the one line that says why there is none."""
    try:
        sums = [measured(proxy), measured(task)]
        for one in sums:
            if found := covariance.defect(one.sums[X], one.widths[X], one.fourths[X], one.tokens):
                return found
        return solve_spectrum(*sums, {X: [X]}, shrinkage).inputs[X]
    except FoLoRAError as error:
        return str(error)


def check(one: LayerSpectrum) -> Tensor:
    """See that a spectrum is sound; returns its gates."""
    assert spectrum.defect(one) is None
    assert all(torch.isfinite(tensor).all() for tensor in (one.basis, one.eigenvalues, one.penalty, one.utility))
    assert all(math.isfinite(value) for value in one.health.model_dump().values())
    assert max(one.health.residual, one.health.orthonormality) <= SOLVE_TOLERANCE
    gates = one.eigenvalues / (one.eigenvalues + 1)
    assert ((gates >= 0) & (gates <= 1)).all()
    return gates


@PROPERTY
@given(
    seed=st.integers(0, 1000),
    width=st.integers(1, 9),
    counts=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    ranks=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    exponents=st.tuples(st.floats(-18, 18), st.floats(-18, 18)),
    spread=st.floats(0, 4),
    duplicated=st.booleans(),
    shrinkage=st.sampled_from([1e-4, 0.01, 0.5, "ledoit-wolf", "oas"]),
)
def test_any_tokens_of_any_scale_have_the_gates_of_their_moments(
    seed: int,
    width: int,
    counts: tuple[int, int],
    ranks: tuple[int, int],
    exponents: tuple[float, float],
    spread: float,
    duplicated: bool,
    shrinkage: Any,
) -> None:
    """One token, one direction, rank below the width, equal columns; scales of 1e±18 square to 1e±36."""
    scales = torch.logspace(-spread / 2, spread / 2, width)
    texts = []
    for side, (count, rank, exponent) in enumerate(zip(counts, ranks, exponents, strict=True)):
        tokens = noise(seed + side, count, rank) @ noise(seed + 2 + side, rank, width) * scales
        if duplicated:
            tokens[:, -1] = tokens[:, 0]
        texts.append(tokens / tokens.abs().max() * 10**exponent)
    one = outcome(*texts, shrinkage)
    if shrinkage == "ledoit-wolf" and min(counts[0], ranks[0]) == 1 and isinstance(one, str):
        assert "not positive definite" in one  # equal tokens have no spread, which is all it knows of their number
        return
    assert isinstance(one, LayerSpectrum), one
    gates = check(one)
    exact = [text.double() / 10**exponent for text, exponent in zip(texts, exponents, strict=True)]
    C_p, C_t = (normalise(x.mT @ x) for x in exact)
    C_p = (1 - one.shrinkage) * C_p + one.shrinkage * torch.eye(width, dtype=C_p.dtype)
    V = one.basis.double()
    penalty, utility = ((V * (C @ V)).sum(0) for C in (C_p, C_t))
    torch.testing.assert_close(utility / (utility + penalty), gates, rtol=0, atol=2e-3)


@PROPERTY
@given(
    values=st.lists(
        st.sampled_from([0.0, 1.0, -2.0, 1e-45, -1e-38, 1e-30, 1e30, -1e38, 3e38, math.nan, math.inf, -math.inf])
        | st.floats(width=32),
        min_size=6,
        max_size=6,
    ),
    side=st.booleans(),
)
def test_any_values_give_a_spectrum_or_one_line(values: list[float], side: bool) -> None:
    hostile, plain = torch.tensor(values).reshape(2, 3), noise(0, 5, 3)
    one = outcome(hostile, plain) if side else outcome(plain, hostile)
    if isinstance(one, LayerSpectrum):
        check(one)
        assert all(math.isfinite(value) for value in values)


@pytest.mark.parametrize("shrinkage", [0.01, "ledoit-wolf", "oas"])
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, 1e-30, 1e30, 1e-45])
def test_text_without_a_finite_energy_is_one_line(value: float, shrinkage: Any) -> None:
    found = str(outcome(torch.full((3, 4), value), noise(0, 3, 4), shrinkage))
    assert found.startswith(("x: the penalty moment is", "x: the mean of ‖x‖⁴ is"))
    assert "the utility moment" in str(outcome(noise(0, 3, 4), torch.full((3, 4), value), shrinkage))


@pytest.mark.parametrize("shrinkage", [0.01, "ledoit-wolf", "oas"])
def test_no_token_at_all_is_one_line(shrinkage: Any) -> None:
    sums = measured(noise(0, 0, 3))
    with pytest.raises(FoLoRAError, match="the penalty moments are of no token"):
        solve_spectrum(sums, measured(noise(0, 5, 3)), {X: [X]}, shrinkage)


@PROPERTY
@given(exponents=st.tuples(st.floats(-320, 300), st.floats(-320, 300)))
def test_moments_beyond_float32_are_one_line(exponents: tuple[float, float]) -> None:
    """Sums are float64, but what is stored is float32."""
    sums = [measured(noise(seed, 9, 4)) for seed in (0, 1)]
    for one, exponent in zip(sums, exponents, strict=True):
        one.sums[X] *= 10.0**exponent
        one.fourths[X] *= min(10.0 ** (2 * min(exponent, 150)), 1e300)
    if all(-36 < exponent < 36 for exponent in exponents):
        check(solve_spectrum(*sums, {X: [X]}, 0.01).inputs[X])
    elif not all(-40 < exponent < 40 for exponent in exponents):
        with pytest.raises(FoLoRAError, match=r"x: the (penalty|utility) moment is zero, not finite or beyond"):
            solve_spectrum(*sums, {X: [X]}, 0.01)


@PROPERTY
@given(seed=st.integers(0, 100), counts=st.tuples(st.integers(1, 4), st.integers(1, 4)), exponent=st.floats(-15, 15))
def test_halves_of_any_size_are_compared_or_unknown(seed: int, counts: tuple[int, int], exponent: float) -> None:
    first, second = (10**exponent * noise(seed + i, count, 5) for i, count in enumerate(counts))
    one = outcome(torch.cat([first, second]), noise(seed + 2, 3, 5))
    assume(isinstance(one, LayerSpectrum))
    found = stability(measured(torch.cat([first, second])), measured(first), X, one)
    assert found["tokens_per_width"] == sum(counts) / 5
    assert 0 <= found["gate_difference"] <= 1
    assert found["tokens_needed"] <= 400 * sum(counts)
