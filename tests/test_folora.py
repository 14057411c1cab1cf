"""FoLoRA's options: other bases, gates, starts and forms, and the gate on B."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from small import (
    BATCH,
    GROUPS,
    PROXY,
    RANK,
    SHRINKAGE,
    TASK,
    adapt,
    assert_near,
    eigh,
    layer_spectrum,
    moment,
    noise,
    optimizer,
    pairs,
    push,
    ridged,
)

from folora.gate import soft_gate, tau_of_budget
from folora.methods import method_from
from folora.methods.folora import update_filter
from folora.optimizer import Coordinates, GatedAdam
from folora.pencil import solve

if TYPE_CHECKING:
    from torch import Tensor

    from folora.adapter import AdaptedModel

UNGATED = {"gate": "hard", "open_share": 1.0}


def of_a(**options: Any) -> dict[str, Coordinates]:
    """Coordinates of A by layer input."""
    made = optimizer(adapt("folora"), "folora", **options)
    return dict(zip(GROUPS, made.coordinates, strict=False))


def moments(name: str, shrinkage: float = SHRINKAGE) -> tuple[Tensor, Tensor]:
    """C_p and C_t as the pencil sees them."""
    return ridged(PROXY[name], shrinkage), ridged(TASK[name], 0.0)


def operator(basis: Tensor, gate: Tensor) -> Tensor:
    """V diag(g) Vᵀ, which depends on no sign, and on no order among equal gates."""
    return basis.double() * gate.double() @ basis.double().mT


def share(eigenvalues: Tensor) -> Tensor:
    """The gate at τ = 1, k = 1 and no floor."""
    return eigenvalues / (eigenvalues + 1)


def moved(adapted: AdaptedModel, made: torch.optim.Optimizer, steps: range = range(4)) -> list[Tensor]:
    """How far each layer's A moves on made-up gradients."""
    factors = [layer.A for layer in adapted.layers]
    before = [A.detach().double().clone() for A in factors]
    push(made, factors, steps)
    return [A.detach().double() - start for A, start in zip(factors, before, strict=True)]


def by_adamw(adapted: AdaptedModel) -> list[Tensor]:
    clone = copy.deepcopy(adapted)
    factors = [layer.A for layer in clone.layers]
    return moved(clone, torch.optim.AdamW(factors, lr=0.02, weight_decay=0.0))


# what Adam's update is multiplied by
def test_a_gate_on_the_gradient_does_nothing() -> None:
    adapted = adapt("folora")
    clone = copy.deepcopy(adapted)
    groups = [{"params": [layer.A for layer in group.layers], "basis": group.spectrum.basis} for group in clone.groups]
    ungated = moved(clone, GatedAdam(groups, lr=0.02))
    found = moved(adapted, optimizer(adapted, "folora", gate_on="gradient", floor=0.05))
    other = adapt("folora")
    gated = moved(other, optimizer(other, "folora", floor=0.05))
    for one, expected, apart in zip(found, ungated, gated, strict=True):
        assert_near(one, expected, 1e-4)
        assert (one - apart).norm() > 0.1 * one.norm()


def test_filter_is_the_identity_for_open_gates_and_has_the_pencil_s_directions() -> None:
    for name in GROUPS:
        C_p, C_t = moments(name)
        eigenvalues, V = eigh(C_t, C_p)
        uneven = V * torch.arange(1, len(V) + 1)  # the scale of the columns does not count
        assert_near(update_filter(C_p, uneven, torch.ones(len(C_p), dtype=C_p.dtype)), torch.eye(len(C_p)), 1e-9)
        F = update_filter(C_p, uneven, share(eigenvalues))
        assert_near(V.mT @ F, (V * share(eigenvalues)).mT, 1e-9)  # vᵀ F = g vᵀ


def test_filter_form_filters_canonical_adam_s_update() -> None:
    adapted = adapt("folora", form="filter")
    plain = by_adamw(adapted)
    found = moved(adapted, optimizer(adapted, "folora", form="filter"))
    for (_, leader), step, free in zip(pairs(adapted), found, plain, strict=True):
        C_p, C_t = moments(leader)
        eigenvalues, V = eigh(C_t, C_p)
        assert_near(step, free @ C_p @ operator(V, share(eigenvalues)), 1e-4)


@pytest.mark.parametrize("options", [{"form": "filter"}, {"basis": "identity", "columns": "unit"}, {"gate_a": False}])
def test_without_a_gate_it_is_adamw(options: dict[str, Any]) -> None:
    adapted = adapt("folora", **options, **UNGATED)
    plain = by_adamw(adapted)
    found = moved(adapted, optimizer(adapted, "folora", **options, **UNGATED))
    for step, free in zip(found, plain, strict=True):
        assert_near(step, free, 1e-4)


def test_without_gate_a_the_start_is_gated_all_the_same() -> None:
    for found, expected in zip(adapt("folora", gate_a=False).layers, adapt("folora").layers, strict=True):
        assert torch.equal(found.A, expected.A)


# bases
@pytest.mark.parametrize("basis", ["penalty", "utility", "difference", "identity"])
def test_gates_of_a_basis_follow_the_quotients_of_its_directions(basis: str) -> None:
    for name, found in of_a(basis=basis, tau=0.5).items():
        C_p, C_t = moments(name)
        V = found.basis.double()
        penalties, utilities = ((v @ C * v).sum(-1) for v, C in ((V.mT, C_p), (V.mT, C_t)))
        quotients = utilities / penalties
        assert_near(found.gate, quotients / (quotients + 0.5))
        assert_near(penalties, penalties[:1].expand(len(V)), 1e-4)
        diagonal = {"penalty": C_p, "utility": C_t, "difference": C_t - C_p, "identity": C_p.diagonal().diag()}[basis]
        unit = V / V.norm(dim=0)
        assert_near(unit @ (unit.mT @ diagonal @ unit).diagonal().diag() @ unit.mT, diagonal)


@pytest.mark.parametrize("options", [{}, {"shrinkage": 0.1}])
def test_random_basis_keeps_the_gates_of_the_pencil(options: dict[str, float]) -> None:
    for name, found in of_a(basis="random", columns="unit", **options).items():
        V = found.basis.double()
        C_p, C_t = moments(name, **options)
        assert_near(V.mT @ V, torch.eye(len(V)))
        assert_near(found.gate, share(eigh(C_t, C_p)[0]))
        assert (V.abs().max(0).values < 0.99).all()


def test_unit_columns_are_the_pencil_s_directions_at_length_one() -> None:
    for name, found in of_a(columns="unit").items():
        C_p, C_t = moments(name)
        eigenvalues, V = eigh(C_t, C_p)
        assert_near(operator(found.basis, found.gate), operator(V / V.norm(dim=0), share(eigenvalues)), 1e-4)
        assert_near(found.basis.norm(dim=0), torch.ones(len(V)))


@pytest.mark.parametrize("shrinkage", [0.1, 0.5, "oas"])
def test_own_shrinkage_is_that_of_another_pencil(shrinkage: float | str) -> None:
    for name, found in of_a(shrinkage=shrinkage).items():
        S, n, d = moment(PROXY[name]), len(PROXY[name]), PROXY[name].shape[1]
        square, trace = float(S.square().sum()), float(S.trace())
        oas = ((1 - 2 / d) * square + trace**2) / ((n + 1 - 2 / d) * (square - trace**2 / d))
        used = oas if shrinkage == "oas" else float(shrinkage)
        pencil = solve(S, moment(TASK[name]), shrinkage=used, name=name)
        assert_near(operator(found.basis, found.gate), operator(pencil.basis, share(pencil.eigenvalues)), 1e-4)
        default = layer_spectrum(name)
        other = operator(default.basis, share(default.eigenvalues))
        assert (operator(found.basis, found.gate) - other).norm() > 1e-3 * other.norm()


# gates
def test_hard_gate_opens_the_directions_with_the_greatest_eigenvalues() -> None:
    for found in of_a(gate="hard", open_share=0.25, floor=0.1).values():
        count = {12: 3, 7: 2}[len(found.gate)]
        assert_near(found.gate, torch.tensor([0.1] * (len(found.gate) - count) + [1.0] * count))


def test_tau_may_be_a_quantile_or_a_budget_of_each_layer() -> None:
    for name, found in of_a(tau={"quantile": 0.75}).items():
        eigenvalues = layer_spectrum(name).eigenvalues
        tau = float(eigenvalues.quantile(0.75))
        assert_near(found.gate, soft_gate(eigenvalues, tau=tau, exponent=1, floor=0))
    for found in of_a(tau={"budget": 0.2}, exponent=2.0).values():
        assert float(found.gate.square().mean()) == pytest.approx(0.2, rel=1e-5)


# starts
def test_spectral_start_is_the_most_open_directions_at_the_norm_of_the_gated_one() -> None:
    adapted = adapt("folora", start="spectral")
    for layer, leader in pairs(adapted):
        leading = layer_spectrum(leader).basis[:, -RANK:].mT.flip(0)
        assert_near(layer.A / layer.A.norm(), leading / leading.norm())
        assert float(layer.A.detach().norm()) == pytest.approx(math.sqrt(RANK / 3))
        assert not layer.B.any()


def test_kaiming_start_is_lora_s() -> None:
    for found, expected in zip(adapt("folora", start="kaiming").layers, adapt("lora").layers, strict=True):
        assert torch.equal(found.A, expected.A)


@pytest.mark.parametrize("gate_b", ["off", "diag", "full"])
def test_frozen_a_stays_at_its_gated_start(gate_b: str) -> None:
    adapted = adapt("folora", freeze_a=True, gate_b=gate_b)
    made = optimizer(adapted, "folora", freeze_a=True, gate_b=gate_b)
    push(made, [layer.B for layer in adapted.layers])
    for layer, expected in zip(adapted.layers, adapt("folora").layers, strict=True):
        assert torch.equal(layer.A, expected.A)
        assert not layer.A.requires_grad
        assert layer.B.any()


# the gate on B
def quotients_of_rows(A: Tensor, name: str) -> Tensor:
    C_p, C_t = moments(name)
    return torch.stack([(a @ C_t @ a) / (a @ C_p @ a) for a in A.detach().double()])


@pytest.mark.parametrize("gate_a", [True, False])
def test_diagonal_gate_on_b_follows_the_quotient_of_each_row_of_a(gate_a: bool) -> None:
    options = {"gate_b": "diag", "refresh_b": 3, "gate_a": gate_a}
    adapted = adapt("folora", **options)
    made = optimizer(adapted, "folora", **options)
    for step in range(5):
        if step % 3 == 0:
            expected = [share(quotients_of_rows(layer.A, name)) for layer, name in pairs(adapted)]
        push(made, [p for layer in adapted.layers for p in (layer.A, layer.B)], range(step, step + 1))
        of_b = made.coordinates[len(GROUPS) :]
        for coordinates, gate in zip(of_b, expected, strict=True):
            assert coordinates.basis is None
            assert_near(coordinates.gate, gate)


def test_diagonal_gate_on_b_scales_adam_s_update_of_its_columns() -> None:
    adapted = adapt("folora", freeze_a=True)
    made = optimizer(adapted, "folora", freeze_a=True, gate_b="diag")
    gates = [share(quotients_of_rows(layer.A, name)) for layer, name in pairs(adapted)]
    plain = copy.deepcopy(adapted)
    push(torch.optim.AdamW([layer.B for layer in plain.layers], lr=0.02, weight_decay=0.0), [o.B for o in plain.layers])
    push(made, [layer.B for layer in adapted.layers])
    for layer, free, gate in zip(adapted.layers, plain.layers, gates, strict=True):
        assert_near(layer.B, free.B * gate, 1e-4)


def test_full_gate_on_b_works_in_the_pencil_of_a_s_rows() -> None:
    adapted = adapt("folora", gate_b="full")
    made = optimizer(adapted, "folora", gate_b="full")
    pencils = []
    for layer, name in pairs(adapted):
        A = layer.A.detach().double()
        C_p, C_t = (A @ C @ A.mT for C in moments(name))
        pencils.append((C_p, C_t, eigh(C_t, C_p)[0]))
    push(made, adapted.trained, range(1))
    for (C_p, C_t, eigenvalues), found in zip(pencils, made.coordinates[len(GROUPS) :], strict=True):
        V = found.basis.double()
        cost = (V.mT @ C_p @ V)[0, 0]
        assert_near(V.mT @ C_p @ V / cost, torch.eye(RANK), 1e-3)
        assert_near(V.mT @ C_t @ V / cost, eigenvalues.diag(), 1e-3)
        assert_near(found.gate, share(eigenvalues), 1e-3)


GATES = {
    "quantile": ({"tau": {"quantile": 0.9}}, lambda λ: float(λ.quantile(0.9))),
    "budget": ({"tau": {"budget": 0.1}}, lambda λ: tau_of_budget(λ, 0.1, exponent=1, floor=0)),
    "hard": ({"gate": "hard", "open_share": 0.25, "floor": 0.1}, lambda λ: float(λ.topk(round(len(λ) / 4)).values[-1])),
}


@pytest.mark.parametrize("gate_b", ["diag", "full"])
@pytest.mark.parametrize("gate", GATES)
def test_gates_of_b_have_the_tau_of_their_layer(gate: str, gate_b: str) -> None:
    """Solved from all λ that A has, and from r of B's it would be another."""
    options, tau_of = GATES[gate]
    adapted = adapt("folora", gate_b=gate_b)
    of_b = []
    for layer, name in pairs(adapted):
        C_p, C_t = (layer.A.detach().double() @ C @ layer.A.detach().double().mT for C in moments(name))
        tau = tau_of(layer_spectrum(name).eigenvalues)
        eigenvalues = eigh(C_t, C_p)[0] if gate_b == "full" else quotients_of_rows(layer.A, name)
        of_b.append(0.1 + 0.9 * (eigenvalues >= tau) if gate == "hard" else eigenvalues / (eigenvalues + tau))
    made = optimizer(adapted, "folora", gate_b=gate_b, **options)
    push(made, adapted.trained, range(1))
    for found, expected in zip(made.coordinates[len(GROUPS) :], of_b, strict=True):
        assert_near(found.gate, expected, 1e-3)


@pytest.mark.parametrize("gate_b", ["diag", "full"])
def test_a_gate_on_the_gradient_does_nothing_to_b_either(gate_b: str) -> None:
    ends = []
    for options in ({"gate_on": "gradient", "tau": 10.0}, UNGATED, {"tau": 10.0}):
        adapted = adapt("folora", freeze_a=True)
        factors = [layer.B for layer in adapted.layers]
        push(optimizer(adapted, "folora", freeze_a=True, gate_b=gate_b, **options), factors)
        ends.append(factors)
    for found, expected, gated in zip(*ends, strict=True):
        assert_near(found, expected, 1e-4)
        assert (found - gated).norm() > 0.1 * found.norm()


def test_the_uniform_control_has_the_same_bases_for_b_and_their_mean_gate() -> None:
    found, control = (optimizer(adapt("folora"), kind) for kind in ("folora", "uniform"))
    for made in (found, control):
        push(made, [p for group in made.param_groups for p in group["params"]], range(1))
    for own, mean in zip(found.coordinates[len(GROUPS) :], control.coordinates[len(GROUPS) :], strict=True):
        assert torch.equal(own.basis, mean.basis)
        assert_near(mean.gate, own.gate.mean().expand_as(own.gate), 1e-6)


def test_a_refresh_carries_adam_s_mean_of_b_into_the_new_coordinates() -> None:
    """The mean of G V_old becomes that of G V_new: m V⁻¹ stays what it was; the square is kept."""
    options = {"gate_b": "full", "refresh_b": 2, "freeze_a": True}
    adapted = adapt("folora", **options)
    made = optimizer(adapted, "folora", **options)
    factors = [layer.B for layer in adapted.layers]
    push(made, factors, range(2))
    before = [
        (made.state[B]["exp_avg"].double() @ torch.linalg.inv(one.basis.double()), made.state[B]["exp_avg_sq"].clone())
        for B, one in zip(factors, made.coordinates, strict=True)
    ]
    old = [one.basis for one in made.coordinates]
    with torch.no_grad():
        for layer in adapted.layers:
            layer.A.add_(0.3 * torch.randn(layer.A.shape, generator=torch.Generator().manual_seed(1)))
    for B in factors:
        B.grad = torch.zeros_like(B)
    made.step()
    for B, one, basis, (mean, square) in zip(factors, made.coordinates, old, before, strict=True):
        assert not torch.allclose(one.basis, basis, rtol=0.1)
        assert_near(made.state[B]["exp_avg"].double() @ torch.linalg.inv(one.basis.double()), 0.9 * mean, 1e-4)
        assert_near(made.state[B]["exp_avg_sq"], 0.999 * square)


def test_utility_is_measured_on_the_adapted_model() -> None:
    """After a refresh A's coordinates are those of the task's moments of the model as it stands by then."""
    adapted = adapt("folora", refresh_utility=2)
    made = optimizer(adapted, "folora", refresh_utility=2)
    factors = [layer.A for layer in adapted.layers] + [layer.B for layer in adapted.layers]
    push(made, factors, range(2))
    old = [one.basis for one in made.coordinates[: len(GROUPS)]]
    seen: dict[str, Tensor] = {}
    for group in adapted.groups:
        layer = group.layers[0]

        def remember(_: object, inputs: tuple[Tensor, ...], name: str = layer.name) -> None:
            seen[name] = inputs[0].detach().flatten(0, 1)

        adapted.linear(layer).register_forward_pre_hook(remember)
    adapted.model(**BATCH)
    tokens = dict(seen)
    first = adapted.groups[0].layers[0].A
    before = made.state[first]["exp_avg"].double() @ torch.linalg.inv(old[0].double())
    for factor in factors:
        factor.grad = torch.zeros_like(factor)
    made.step()
    for (name, x), one, basis in zip(tokens.items(), made.coordinates, old, strict=False):
        C_p, C_t = ridged(PROXY[name]), ridged(x.double(), 0.0)
        eigenvalues = eigh(C_t, C_p)[0]
        assert not torch.allclose(one.basis, basis, rtol=0.1)
        V = one.basis.double()
        cost = (V.mT @ C_p @ V)[0, 0]
        assert_near(V.mT @ C_t @ V / cost, eigenvalues.diag(), 1e-3)
        assert_near(one.gate, share(eigenvalues.clamp_min(0)), 1e-3)
    after = made.state[first]["exp_avg"].double() @ torch.linalg.inv(made.coordinates[0].basis.double())
    assert_near(after, 0.9 * before, 1e-4)
    assert adapted.model.training


def test_utility_is_measured_at_the_stated_steps() -> None:
    adapted = adapt("folora", refresh_utility=2)
    made = optimizer(adapted, "folora", refresh_utility=2)
    bases = []
    for step in range(5):
        push(made, adapted.trained, range(step, step + 1))
        bases.append(made.coordinates[0].basis)
    assert bases[0] is bases[1]
    assert bases[2] is bases[3]
    assert bases[1] is not bases[2]
    assert bases[3] is not bases[4]


def test_the_greatest_directions_alone_train_like_a_gate_that_shuts_the_others() -> None:
    kept = 5
    folora, canonical = (method_from(kind, {"kind": kind}) for kind in ("folora", "uniform-canonical"))
    adapted = adapt("folora")
    for group in adapted.groups:
        basis, eigenvalues = group.spectrum.basis, group.spectrum.eigenvalues
        some = replace(group.spectrum, basis=basis[:, -kept:], eigenvalues=eigenvalues[-kept:])
        coordinates = folora.coordinates(replace(group, spectrum=some))
        everything = folora.coordinates(group)
        assert coordinates["basis"].shape[1] == kept
        torch.testing.assert_close(coordinates["gate"], everything["gate"][-kept:])
        updates = noise(1, RANK, basis.shape[0]).float()
        shut = everything["gate"] * (torch.arange(len(eigenvalues)) >= len(eigenvalues) - kept)
        whole, part = Coordinates(basis=basis, gate=shut), Coordinates(**coordinates)
        torch.testing.assert_close(part.leave(part.enter([updates]))[0], whole.leave(whole.enter([updates]))[0])
        control = canonical.coordinates(replace(group, spectrum=some))
        zeros = torch.cat([torch.zeros(len(eigenvalues) - kept), everything["gate"][-kept:]])
        torch.testing.assert_close(control["gate"], zeros.mean())
