"""The registry, FoLoRA's gate and start, and its controls; its options are in test_folora.py."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from small import GROUPS, RANK, adapt, assert_near, layer_spectrum, noise, optimizer, pairs, push
from typer.testing import CliRunner

from folora.cli import app
from folora.gate import soft_gate
from folora.meter import change
from folora.methods import describe_kinds, kinds, method_from
from folora.methods.base import Method
from folora.methods.gated import gated_start
from folora.optimizer import Coordinates

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from folora.adapter import AdaptedModel

KINDS = list(kinds())
SPECTRAL = ["folora", "uniform", "uniform-canonical"]
GATE = {"tau": 0.7, "exponent": 2.0, "floor": 0.01}


def copies(adapted: AdaptedModel) -> list[Tensor]:
    return [p.detach().clone() for p in adapted.trained]


def gates(kind: str) -> list[Tensor]:
    """Of every layer input."""
    return [one.gate for one in optimizer(adapt(kind), kind, **GATE).coordinates[: len(GROUPS)]]


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_trains_every_parameter_once_at_its_rate(kind: str) -> None:
    adapted = adapt(kind)
    made = optimizer(adapted, kind, rate=0.03, weight_decay=0.25)
    held = [id(p) for group in made.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, adapted.trained))
    assert {(group["lr"], group["weight_decay"]) for group in made.param_groups} == {(0.03, 0.25)}
    before = copies(adapted)
    push(made, adapted.trained)
    assert not any(torch.equal(*pair) for pair in zip(before, adapted.trained, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_equal_seeds_give_equal_starts(kind: str) -> None:
    one, same, other = adapt(kind), adapt(kind), adapt(kind, seed=1)
    assert all(map(torch.equal, copies(one), copies(same)))
    random = kind in {*SPECTRAL, "lora", "rslora", "dora", "oplora", "ewc-lora", "adam-nscl", "sgp"}
    assert all(map(torch.equal, copies(one), copies(other))) is not random


@pytest.mark.parametrize("kind", ["lora", *SPECTRAL])
def test_start_leaves_b_at_zero_and_the_norm_of_a_at_that_of_peft(kind: str) -> None:
    adapted, plain = adapt(kind), adapt("lora")
    assert not any(layer.B.any() for layer in adapted.layers)
    canonical = kind in ("lora", "uniform-canonical")
    for layer, other in zip(adapted.layers, plain.layers, strict=True):
        assert torch.equal(layer.A, other.A) == canonical
        assert float(layer.A.detach().norm()) == pytest.approx(math.sqrt(RANK / 3), rel=0.3 if canonical else 1e-5)
    starts = [layer.A for layer in adapted.groups[0].layers]
    assert not torch.equal(*starts[:2])


def test_gated_start_has_energy_in_proportion_to_the_gates_and_none_where_closed() -> None:
    basis = layer_spectrum("model.layers.0.mlp.down_proj").basis
    gate = torch.tensor([0.0, 1.0, 0.25, 0.0, 0.5, 0.1, 0.03])
    A = torch.empty(6000, 7)
    torch.manual_seed(0)
    gated_start(A, basis, gate)
    assert float(A.norm()) == pytest.approx(math.sqrt(2000), rel=1e-5)
    energy = (A.double() @ torch.linalg.inv(basis.double()).T).square().mean(0).sqrt()
    torch.testing.assert_close(energy / energy[1], gate.double(), rtol=0.05, atol=1e-5)


def test_folora_gates_each_direction_by_its_eigenvalue() -> None:
    for name, gate in zip(GROUPS, gates("folora"), strict=True):
        torch.testing.assert_close(gate, soft_gate(layer_spectrum(name).eigenvalues, **GATE).float())
        assert gate.min() < 0.1 < 0.9 < gate.max()


@pytest.mark.parametrize("kind", ["uniform", "uniform-canonical"])
def test_controls_have_the_mean_gate_of_folora_everywhere(kind: str) -> None:
    for control, gate in zip(gates(kind), gates("folora"), strict=True):
        torch.testing.assert_close(control, gate.mean().expand_as(control))


@pytest.mark.parametrize("kind", SPECTRAL)
def test_layers_of_one_input_share_coordinates_and_b_stays_plain(kind: str) -> None:
    adapted = adapt(kind)
    made = optimizer(adapted, kind, **({} if kind == "uniform-canonical" else {"gate_b": "off"}))
    for group, held, coordinates in zip(adapted.groups, made.param_groups, made.coordinates, strict=False):
        assert list(map(id, held["params"])) == [id(layer.A) for layer in group.layers]
        assert (coordinates.filter, coordinates.gate_gradient) == (None, False)
        assert coordinates.basis is (None if kind == "uniform-canonical" else group.spectrum.basis)
    assert list(map(id, made.param_groups[-1]["params"])) == [id(layer.B) for layer in adapted.layers]
    assert made.coordinates[-1] == Coordinates()


def test_folora_moves_a_by_the_formula() -> None:
    """One step from rest, where Adam's update is the sign: A ← A - lr (sign(G V̂) ⊙ g) V̂ᵀ."""
    adapted = adapt("folora")
    before = [layer.A.detach().double().clone() for layer in adapted.layers]
    made = optimizer(adapted, "folora", rate=0.02, **GATE)
    push(made, [layer.A for layer in adapted.layers], range(1))
    for number, ((layer, leader), A) in enumerate(zip(pairs(adapted), before, strict=True)):
        spectrum = layer_spectrum(leader)
        V, lam = spectrum.basis.double(), spectrum.eigenvalues
        g = 0.01 + 0.99 * lam**2 / (lam**2 + 0.7**2)
        assert_near(layer.A, A - 0.02 * ((noise(number, *A.shape) @ V).sign() * g) @ V.mT)


def test_folora_buys_more_utility_per_penalty_than_its_controls() -> None:
    """All see the same random gradients, which prefer no direction."""

    def price(kind: str) -> float:
        adapted = adapt(kind)
        made = optimizer(adapted, kind, rate=0.05)
        for step in range(5):
            for number, p in enumerate(adapted.trained):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + number))
            made.step()
        pairs = [(layer, group.spectrum) for group in adapted.groups for layer in group.layers]
        ratios = [change(layer, spectrum.utility) / change(layer, spectrum.penalty) for layer, spectrum in pairs]
        return float(torch.stack(ratios).detach().log().mean())

    assert price("folora") > 1 + max(price(kind) for kind in ("uniform", "uniform-canonical", "lora"))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kind": "lora", "tau": 1}, r"methods\.m\.tau: "),
        ({"kind": "lora", "weight_decay": -1}, r"methods\.m\.weight_decay: .*got -1"),
        ({"kind": "folora", "tau": 0}, r"methods\.m\.tau: .*got 0"),
        ({"kind": "folora", "tau": {"quantile": 2}}, r"methods\.m\.tau\.quantile: .*less than or equal to 1 \(got 2\)"),
        ({"kind": "folora", "tau": {"budget": 0}}, r"methods\.m\.tau\.budget: .*greater than 0 \(got 0\)"),
        ({"kind": "folora", "tau": {"median": 1}}, r"methods\.m\.tau\."),
        ({"kind": "folora", "shrinkage": 0.9}, r"methods\.m\.shrinkage: .*got 0\.9"),
        (
            {"kind": "folora", "form": "filter", "basis": "random"},
            r"methods\.m\.form filter goes with basis generalised",
        ),
        ({"kind": "folora", "exponent": math.nan}, r"methods\.m\.exponent: "),
        ({"kind": "corda", "mode": "both"}, r"methods\.m\.mode: .*'knowledge' or 'instruction' \(got 'both'\)"),
        ({"kind": "sgd"}, r"methods\.m\.kind: 'sgd' is not one of .*folora.*lora.*uniform-canonical"),
        ({}, r"methods\.m\.kind: None is not one of"),
        ("lora", r"methods\.m\.kind: None is not one of"),
    ],
)
def test_a_mistake_in_a_section_is_named(section: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method_from("m", section)


def test_every_kind_describes_itself() -> None:
    described = {one.pop("kind"): one for one in describe_kinds()}
    assert sorted(described) == sorted(KINDS)
    assert all(text for one in described.values() for name, text in one.items() if name != "options")
    assert described["sc-lora"]["options"] == ["beta"]
    assert described["lora"]["options"] == []
    for kind, one in described.items():
        adapted = adapt(kind)
        assert all(name in kinds()[kind].model_fields for name in one["options"])
        rank = adapted.layers[0].factors()[0].shape[1]
        if one["export"].startswith("LoRA of rank"):
            assert rank == (2 * RANK if "2r" in one["export"] else RANK)


def test_what_goes_with_every_kind_is_listed_beside_the_kinds() -> None:
    listed = json.loads(CliRunner().invoke(app, ["methods", "--json"]).stdout)
    assert listed["kinds"] == describe_kinds()
    options = {one["option"]: one for one in listed["with_any"]}
    assert list(options) == list(Method.model_fields)
    assert all(one["meaning"] for one in options.values())
    assert {name: one["paper"] for name, one in options.items() if one["paper"]} == {"mask_target": "2605.29498"}
    assert "arXiv" not in options["mask_target"]["meaning"]
    table = CliRunner().invoke(app, ["methods"]).stdout
    _, _, below = table.partition("With any of them")
    assert all(name in below for name in options)


@pytest.fixture
def frozen_a() -> Iterator[str]:
    """A method in a few lines; no class can be unregistered, so it loses its kind afterwards."""

    class FrozenA(Method):
        """LoRA-FA: A stays at its start; B has a learning rate of its own."""

        kind: Literal["frozen-a"]
        paper = "2308.03303"
        rate_b: float

        def update_groups(self, adapted: AdaptedModel) -> list[dict[str, Any]]:
            return [{"params": [layer.B for layer in adapted.layers], "lr": self.rate_b}]

    yield "frozen-a"
    FrozenA.has_kind = classmethod(lambda _: False)
    assert "frozen-a" not in kinds()


def test_a_new_method_is_a_class_with_a_kind(frozen_a: str) -> None:
    assert set(kinds()) == {*KINDS, frozen_a}
    adapted = adapt(frozen_a, rate_b=0.5)
    before = [layer.A.detach().clone() for layer in adapted.layers]
    push(optimizer(adapted, frozen_a, rate_b=0.5), adapted.trained, range(1))
    for layer, A in zip(adapted.layers, before, strict=True):
        assert torch.equal(layer.A, A)
        torch.testing.assert_close(layer.B.abs(), torch.full_like(layer.B, 0.5))  # Adam's first step is the rate
    with pytest.raises(ValueError, match=r"methods\.mine\.rate_b"):
        method_from("mine", {"kind": frozen_a})


def test_two_methods_of_one_kind_are_refused(frozen_a: str) -> None:
    class Second(Method):
        kind: Literal["frozen-a"]
        paper = "none"

    with pytest.raises(TypeError, match=f"two methods have the kind '{frozen_a}'"):
        kinds()
    Second.has_kind = classmethod(lambda _: False)
