from __future__ import annotations

import pytest
import torch
from torch import Tensor

from folora.shrinkage import ledoit_wolf, oracle_approximating, shrinkage_of


def samples(count: int, width: int = 6, seed: int = 0) -> Tensor:
    """Signed, badly scaled, not centred."""
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.2
    return x * torch.logspace(-1, 1, width, dtype=torch.float64)


def statistics(x: Tensor) -> tuple[Tensor, float]:
    return x.mT @ x / len(x), float(x.square().sum(1).square().mean())


@pytest.mark.parametrize("count", [4, 30, 400])
def test_ledoit_wolf_is_its_sum_over_samples(count: int) -> None:
    x = samples(count)
    moment, fourth = statistics(x)
    spread = sum(float((torch.outer(one, one) - moment).square().sum()) for one in x) / count**2
    distance = float((moment - moment.trace() / 6 * torch.eye(6)).square().sum())
    assert ledoit_wolf(moment, fourth, count) == pytest.approx(min(1.0, spread / distance))


@pytest.mark.parametrize("count", [4, 30, 400])
def test_oracle_approximating_is_the_fixed_point_of_the_oracle(count: int) -> None:
    """Eqs. 18 and 19 of the paper, iterated from the sample moment."""
    moment, _ = statistics(samples(count))
    target = moment.trace() / 6 * torch.eye(6, dtype=torch.float64)
    share = 0.5
    for _ in range(10_000):
        estimate = (1 - share) * moment + share * target
        top = (1 - 2 / 6) * (estimate @ moment).trace() + estimate.trace() ** 2
        bottom = (count + 1 - 2 / 6) * (estimate @ moment).trace() + (1 - count / 6) * estimate.trace() ** 2
        share = min(float(top / bottom), 1.0)
    assert oracle_approximating(moment, count) == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize("name", ["ledoit-wolf", "oas"])
def test_more_tokens_need_less_and_an_even_moment_any(name: str) -> None:
    shares = []
    for count in (5, 50, 500, 50_000):
        moment, fourth = statistics(samples(count))
        shares.append(shrinkage_of(name, moment, fourth, count))  # type: ignore[arg-type]
    assert sorted(shares, reverse=True) == shares
    assert shares[-1] < 1e-3
    assert shrinkage_of(name, torch.eye(3).double(), 9.0, 10) == 1.0  # type: ignore[arg-type]
