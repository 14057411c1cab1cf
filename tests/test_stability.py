from __future__ import annotations

import pytest
import torch
from torch import Tensor

from folora.health import too_many_loops
from folora.pencil import normalise, solve
from folora.stability import gate_difference, tokens_needed

WIDTH = 24
RIDGE = 0.01


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MIXING = noise(0, WIDTH, WIDTH) * torch.logspace(-1, 1, WIDTH, dtype=torch.float64)


def text(seed: int, tokens: int) -> Tensor:
    x = noise(seed, tokens, WIDTH) @ MIXING.mT
    return x.mT @ x / tokens


UTILITY = text(1, 4)


def difference(tokens: int, seed: int = 10) -> float:
    found = gate_difference(text(seed, tokens // 2), text(seed + 1, tokens // 2), UTILITY, RIDGE)
    assert found is not None
    return found


def test_is_the_share_of_gates_that_the_other_half_does_not_give() -> None:
    first, second = text(2, 60), text(3, 60)
    pencil = solve(first, UTILITY, shrinkage=RIDGE, name="x")
    gates = []
    for half in (first, second):
        penalty, utility = (
            (pencil.basis * (C @ pencil.basis)).sum(0) for C in (normalise(half, RIDGE), normalise(UTILITY))
        )
        gates.append(utility / (utility + penalty))
    expected = (gates[0] - gates[1]).abs().sum() / torch.maximum(*gates).sum()
    assert gate_difference(first, second, UTILITY, RIDGE) == pytest.approx(float(expected), rel=1e-6)


def test_equal_halves_agree_at_any_scale() -> None:
    assert gate_difference(text(2, 60), 1e9 * text(2, 60), UTILITY, RIDGE) == pytest.approx(0, abs=1e-12)


def test_text_too_short_for_the_width_does_not_pass_for_enough() -> None:
    """The directions of all of it would: what no token has seen looks free in both halves."""
    assert difference(WIDTH) > 0.2
    assert tokens_needed(WIDTH, difference(WIDTH)) > 10 * WIDTH


def test_as_many_tokens_as_are_needed_are_enough() -> None:
    for tokens in (100, 200, 400):
        needed = tokens_needed(tokens, sum(difference(tokens, seed) for seed in range(10, 30, 2)) / 10)
        found = sum(difference(2 * (needed // 2), seed) for seed in range(40, 60, 2)) / 10
        assert 0.02 < found < 0.065


def test_a_half_without_a_definite_penalty_is_unknown() -> None:
    assert gate_difference(text(2, 3), text(3, 60), UTILITY, 0.0) is None
    assert gate_difference(torch.zeros(WIDTH, WIDTH, dtype=torch.float64), text(3, 60), UTILITY, RIDGE) is None


@pytest.mark.parametrize(("count", "warned"), [(0, False), (5, False), (6, True)])
def test_proxy_text_that_loops_is_named(count: int, warned: bool) -> None:
    warning = too_many_loops(100, count)
    assert (warning is not None) == warned
    assert not warned or "6 of 100 sequences of the proxy text end in a loop" in str(warning)
