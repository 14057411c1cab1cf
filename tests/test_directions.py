from __future__ import annotations

import math

import pytest
import torch
from small import GROUPS, PROXY, SHRINKAGE, TASK, WIDTHS, assert_near, eigh, moment, noise, ridged
from torch import Tensor

from folora.directions import BasisName, directions, energies, quotients, scaled
from folora.pencil import solve

ORTHOGONAL: list[BasisName] = ["penalty", "utility", "difference", "random", "identity"]
BASES: list[BasisName] = ["generalised", *ORTHOGONAL]
NAMES = pytest.mark.parametrize("name", GROUPS)


def moments(name: str, *, few: bool = True) -> tuple[Tensor, Tensor]:
    """C_p and C_t as the pencil sees them; C_t of full rank unless ``few``."""
    return ridged(PROXY[name]), ridged(TASK[name] if few else noise(40, 30, WIDTHS[name]), 0.0)


@NAMES
def test_generalised_directions_are_the_pencil_s_up_to_signs(name: str) -> None:
    penalty, utility = moments(name, few=False)
    pencil = solve(moment(PROXY[name]), utility, shrinkage=SHRINKAGE, name="x")
    basis = directions("generalised", penalty, utility)
    found = scaled(basis, penalty, "penalty")
    assert_near(found * (found * pencil.basis).sum(0).sign(), pencil.basis, 1e-6)
    assert_near(basis.norm(dim=0), torch.ones(WIDTHS[name]))
    assert_near(quotients(basis, penalty, utility), pencil.eigenvalues, 1e-9)


@NAMES
@pytest.mark.parametrize("few", [True, False])
def test_generalised_directions_diagonalise_both_moments(name: str, few: bool) -> None:
    penalty, utility = moments(name, few=few)
    V = scaled(directions("generalised", penalty, utility), penalty, "penalty")
    cost = (V.mT @ penalty @ V)[0, 0]
    assert_near(V.mT @ penalty @ V / cost, torch.eye(len(V)), 1e-8)
    assert_near(V.mT @ utility @ V / cost, eigh(utility, penalty)[0].diag(), 1e-8)


@NAMES
@pytest.mark.parametrize("basis", ORTHOGONAL)
def test_other_bases_are_orthogonal(name: str, basis: BasisName) -> None:
    V = directions(basis, *moments(name))
    assert_near(V.mT @ V, torch.eye(len(V)), 1e-12)


@NAMES
def test_bases_of_one_moment_are_its_eigenvectors(name: str) -> None:
    penalty, utility = moments(name)
    for basis, moment_of_it in (("penalty", penalty), ("utility", utility), ("difference", utility - penalty)):
        V = directions(basis, penalty, utility)
        assert_near(V.mT @ moment_of_it @ V, eigh(moment_of_it)[0].diag(), 1e-12)


def test_random_basis_follows_its_seed_alone() -> None:
    (name, *_), others = GROUPS, ({"seed": 1}, {})
    penalty, utility = moments(name)
    first = directions("random", penalty, utility)
    torch.manual_seed(5)
    other, same = (directions("random", utility, penalty, **options) for options in others)
    assert torch.equal(same, first)
    assert not torch.allclose(other, first, atol=0.1)
    assert directions("identity", penalty, utility).equal(torch.eye(WIDTHS[name], dtype=torch.float64))


@pytest.mark.parametrize("basis", BASES)
def test_quotients_are_utility_per_penalty_of_each_column(basis: BasisName) -> None:
    penalty, utility = moments(next(iter(GROUPS)))
    V = directions(basis, penalty, utility)
    for v, energy, quotient in zip(V.T, energies(V, penalty), quotients(V, penalty, utility), strict=True):
        assert float(energy) == pytest.approx(float(v @ penalty @ v))
        assert float(quotient) == pytest.approx(float(v @ utility @ v) / float(v @ penalty @ v), abs=1e-9)


@pytest.mark.parametrize("basis", BASES)
def test_columns_cost_the_same_penalty_or_have_length_one(basis: BasisName) -> None:
    penalty, utility = moments(next(iter(GROUPS)))
    V = directions(basis, penalty, utility)
    even, unit = scaled(V, penalty, "penalty"), scaled(3 * V, penalty, "unit")
    costs = (even.mT @ penalty @ even).diagonal()
    assert_near(costs, costs[:1].expand(len(V)), 1e-9)
    assert_near(unit.norm(dim=0), torch.ones(len(V)), 1e-9)
    assert float(even.norm()) == pytest.approx(math.sqrt(len(V)))
    assert_near(even / even.norm(dim=0), V / V.norm(dim=0), 1e-9)
