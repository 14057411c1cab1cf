from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from folora.muon import Muon, orthogonalise

SHAPES = ((6, 6), (9, 4), (4, 9), (6, 6))


def matrix(seed: int, rows: int, columns: int, rank: int | None = None, scale: float = 1.0) -> Tensor:
    """Signed, with singular values from 1 to 0.05 times ``scale``, the rest zero."""
    generator = torch.Generator().manual_seed(seed)
    rank = rank or min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, rank, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, rank, generator=generator)).Q
    return left * torch.logspace(0, -1.3, rank) * scale @ right.mT


@pytest.mark.parametrize(("rows", "columns"), SHAPES[:3])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("rank", [None, 2])
def test_keeps_singular_vectors_and_levels_singular_values(
    rows: int, columns: int, scale: float, rank: int | None
) -> None:
    given = matrix(1, rows, columns, rank, scale)
    found = orthogonalise(given[None])[0]
    left, values, right = torch.linalg.svd(given, full_matrices=False)
    kept = values > 1e-3 * values[0]
    core = left.mT @ found @ right.mT
    levels = core.diagonal()
    assert ((levels[kept] > 0.65) & (levels[kept] < 1.25)).all()
    torch.testing.assert_close(core, torch.where(kept, levels, 0).diag(), rtol=0, atol=1e-3)
    torch.testing.assert_close(found, left @ core @ right, rtol=0, atol=1e-3)


def test_matrices_of_a_batch_do_not_mix() -> None:
    batch = torch.stack([matrix(seed, 4, 9, scale=10.0**seed) for seed in range(4)])
    alone = torch.cat([orthogonalise(one[None]) for one in batch])
    torch.testing.assert_close(orthogonalise(batch), alone, rtol=1e-5, atol=1e-6)


def test_zero_stays_zero() -> None:
    assert torch.equal(orthogonalise(torch.zeros(1, 3, 5)), torch.zeros(1, 3, 5))


def trained(optimizer_type: type[torch.optim.Optimizer], **options: object) -> list[Tensor]:
    parameters = [nn.Parameter(matrix(number, *shape)) for number, shape in enumerate(SHAPES)]
    optimizer = optimizer_type(parameters, lr=0.05, weight_decay=0.2, **options)
    for step in range(4):
        for number, parameter in enumerate(parameters):
            parameter.grad = matrix(100 * step + number, *parameter.shape, scale=10.0**number)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("momentum", [0.6, 0.95])
def test_agrees_with_torch_within_its_bfloat16(momentum: float) -> None:
    expected = trained(torch.optim.Muon, momentum=momentum, adjust_lr_fn="match_rms_adamw")
    for start, found, other in zip(range(len(SHAPES)), trained(Muon, momentum=momentum), expected, strict=True):
        moved = (other - matrix(start, *SHAPES[start])).norm()
        assert (found - other).norm() < 0.02 * moved


def test_first_step_follows_the_formula() -> None:
    parameter = nn.Parameter(matrix(1, 9, 4))
    gradient = matrix(2, 9, 4, scale=300)
    parameter.grad = gradient.clone()
    Muon([parameter], lr=0.1, weight_decay=0.5).step()
    expected = 0.95 * matrix(1, 9, 4) - 0.1 * 0.2 * 3 * orthogonalise(gradient[None])[0]
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(parameter.grad, gradient)
