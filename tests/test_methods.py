from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from torch import Tensor, nn

from folora.gate import soft_gate
from folora.meter import change
from folora.methods import kinds, method_from
from folora.methods.base import LayerGroup, LoRALayer, Method
from folora.methods.folora import gated_start
from folora.pencil import LayerSpectrum, solve

if TYPE_CHECKING:
    from collections.abc import Iterator

RANK = 3
SETTINGS = {"weight_decay": 0.25, "replay": 2, "tau": 0.7, "exponent": 2.0, "floor": 0.01}
KINDS = list(kinds())
SPECTRAL = ["folora", "uniform", "uniform-canonical"]


def method(kind: str, **changes: Any) -> Method:
    fields = kinds()[kind].model_fields
    return method_from("m", {"kind": kind} | {key: SETTINGS[key] for key in SETTINGS if key in fields} | changes)


def moment(seed: int, width: int, tokens: int = 30) -> Tensor:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.3
    x = x * torch.logspace(-1, 1, width, dtype=torch.float64).roll(seed)
    return x.mT @ x / tokens


def group(seed: int, width: int, *rows: int) -> LayerGroup:
    """Layers with PEFT's start, and a utility that is rank-deficient."""
    penalty, utility = moment(seed, width), moment(seed + 2, width, 4)
    pencil = solve(penalty, utility, shrinkage=0.01, name="x")
    spectrum = LayerSpectrum(pencil.basis.float(), pencil.eigenvalues, penalty.float(), utility.float())
    layers = []
    for height in rows:
        A, B = nn.Parameter(torch.empty(RANK, width)), nn.Parameter(torch.zeros(height, RANK))
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        layers.append(LoRALayer(A, B, torch.randn(height, width), 2.0))
    return LayerGroup(layers, spectrum)


@pytest.fixture
def groups() -> list[LayerGroup]:
    torch.manual_seed(0)
    return [group(0, 6, 4, 2, 2), group(1, 9, 5)]


def factors(groups: list[LayerGroup]) -> list[nn.Parameter]:
    return [p for one in groups for layer in one.layers for p in (layer.A, layer.B)]


def copies(groups: list[LayerGroup]) -> list[Tensor]:
    return [p.detach().clone() for p in factors(groups)]


def step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_trains_every_factor_once_at_its_rate(kind: str, groups: list[LayerGroup]) -> None:
    optimizer = method(kind).optimizer(groups, 0.03)
    held = [id(p) for update in optimizer.param_groups for p in update["params"]]
    assert sorted(held) == sorted(map(id, factors(groups)))
    assert {(update["lr"], update["weight_decay"]) for update in optimizer.param_groups} == {(0.03, 0.25)}
    assert (type(optimizer) is torch.optim.AdamW) == (kind == "lora")
    before = copies(groups)
    step(optimizer, factors(groups))
    assert not any(torch.equal(*pair) for pair in zip(before, factors(groups), strict=True))


@pytest.mark.parametrize(
    ("kind", "gated"), [("folora", True), ("uniform", True), ("uniform-canonical", False), ("lora", False)]
)
def test_start_leaves_b_at_zero_and_the_norm_of_a_at_that_of_peft(
    kind: str, gated: bool, groups: list[LayerGroup]
) -> None:
    before = copies(groups)
    method(kind).start(groups)
    changed = [not torch.equal(*pair) for pair in zip(before, factors(groups), strict=True)]
    assert changed == [gated, False] * 4
    if gated:
        starts = copies(groups)[::2]
        assert [start.norm().item() for start in starts] == pytest.approx([math.sqrt(RANK / 3)] * 4)
        assert not torch.equal(starts[1], starts[2])


def test_gated_start_has_energy_in_proportion_to_the_gates_and_none_where_closed() -> None:
    spectrum = group(0, 6, 1).spectrum
    gates = torch.tensor([0.0, 1.0, 0.25, 0.0, 0.5, 0.1])
    A = torch.empty(6000, 6)
    torch.manual_seed(0)
    gated_start(A, spectrum.basis, gates)
    assert float(A.norm()) == pytest.approx(math.sqrt(2000), rel=1e-5)
    energy = (A.double() @ torch.linalg.inv(spectrum.basis.double()).T).square().mean(0).sqrt()
    torch.testing.assert_close(energy / energy[1], gates.double(), rtol=0.05, atol=1e-5)


def spectral_gates(kind: str, groups: list[LayerGroup]) -> list[Tensor]:
    return [update["gate"] for update in method(kind).update_groups(groups) if update.get("gate") is not None]


def test_folora_gates_each_direction_by_its_eigenvalue(groups: list[LayerGroup]) -> None:
    for one, gate in zip(groups, spectral_gates("folora", groups), strict=True):
        torch.testing.assert_close(gate, soft_gate(one.spectrum.eigenvalues, tau=0.7, exponent=2, floor=0.01).float())
        assert gate.min() < 0.1 < 0.9 < gate.max()


@pytest.mark.parametrize("kind", ["uniform", "uniform-canonical"])
def test_controls_have_the_mean_gate_of_folora_everywhere(kind: str, groups: list[LayerGroup]) -> None:
    for control, gate in zip(spectral_gates(kind, groups), spectral_gates("folora", groups), strict=True):
        torch.testing.assert_close(control, gate.mean().expand_as(control))


@pytest.mark.parametrize("kind", SPECTRAL)
def test_layers_of_one_input_share_an_update_group_and_b_stays_plain(kind: str, groups: list[LayerGroup]) -> None:
    *spectral, plain = method(kind).update_groups(groups)
    assert set(plain) == {"params"}
    for one, update in zip(groups, spectral, strict=True):
        assert all(p is layer.A for p, layer in zip(update["params"], one.layers, strict=True))
        assert update.get("basis") is (None if kind == "uniform-canonical" else one.spectrum.basis)


def test_folora_buys_more_utility_per_penalty_than_its_controls(groups: list[LayerGroup]) -> None:
    """All see the same random gradients, which prefer no direction."""

    def price(kind: str) -> float:
        made = copy.deepcopy(groups)
        chosen = method(kind, weight_decay=0.0, **({} if kind == "lora" else {"tau": 1.0, "exponent": 1.0}))
        chosen.start(made)
        optimizer = chosen.optimizer(made, 0.05)
        for seed in range(5):
            step(optimizer, factors(made), seed)
        pairs = [(layer, one.spectrum) for one in made for layer in one.layers]
        ratios = [change(layer, spectrum.utility) / change(layer, spectrum.penalty) for layer, spectrum in pairs]
        return float(torch.stack(ratios).detach().log().mean())

    assert price("folora") > 1 + max(price(kind) for kind in ("uniform", "uniform-canonical", "lora"))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kind": "lora", "weight_decay": 0}, r"methods\.m\.replay: "),
        ({"kind": "lora", "weight_decay": 0, "replay": 0, "tau": 1}, r"methods\.m\.tau: "),
        ({"kind": "folora"} | SETTINGS | {"tau": 0}, r"methods\.m\.tau: .*got 0"),
        ({"kind": "folora"} | SETTINGS | {"exponent": math.nan}, r"methods\.m\.exponent: "),
        ({"kind": "dora"}, r"methods\.m\.kind: 'dora' is not one of .*folora.*lora.*uniform-canonical"),
        ("lora", r"methods\.m\.kind: None is not one of"),
    ],
)
def test_a_mistake_in_a_section_is_named(section: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method_from("m", section)


@pytest.fixture
def frozen_a() -> Iterator[str]:
    """A method in a few lines; no class can be unregistered, so it loses its kind afterwards."""

    class FrozenA(Method):
        """LoRA-FA: A stays at its start; B has a learning rate of its own."""

        kind: Literal["frozen-a"]
        rate: float

        def update_groups(self, groups: list[LayerGroup]) -> list[dict[str, Any]]:
            return [{"params": [layer.B for one in groups for layer in one.layers], "lr": self.rate}]

    yield "frozen-a"
    FrozenA.has_kind = classmethod(lambda _: False)
    assert "frozen-a" not in kinds()


def test_a_new_method_is_a_class_with_a_kind(frozen_a: str, groups: list[LayerGroup]) -> None:
    assert set(kinds()) == {*KINDS, frozen_a}
    section = {"kind": frozen_a, "weight_decay": 0.0, "replay": 0}
    optimizer = method_from("mine", section | {"rate": 0.5}).optimizer(groups, 0.1)
    before = copies(groups)
    step(optimizer, factors(groups))
    assert all(torch.equal(*pair) for pair in zip(before[::2], factors(groups)[::2], strict=True))
    for b in factors(groups)[1::2]:
        torch.testing.assert_close(b.abs(), torch.full_like(b, 0.5))  # Adam's first step from zero is the rate
    with pytest.raises(ValueError, match=r"methods\.mine\.rate"):
        method_from("mine", section)
