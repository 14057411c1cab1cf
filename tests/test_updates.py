"""Methods that differ from LoRA in their form or in their updates, each against its paper's equation, in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from small import (
    PROXY,
    RANK,
    SCALING,
    adapt,
    assert_near,
    base_model,
    eigh,
    moment,
    optimizer,
    pairs,
    product,
    push,
    ridged,
    seen_change,
    seen_weight,
    svd,
    train,
)
from torch import Tensor

from folora.adapter import AdaptedModel, DenseModel
from folora.optimizer import Coordinates


def numerical_rank(singular_values: Tensor) -> int:
    return int((singular_values > 1e-6 * singular_values[0]).sum())


@pytest.mark.parametrize("preserved", [1, 2, 16])
def test_oplora_keeps_the_leading_singular_triplets(preserved: int) -> None:
    adapted = adapt("oplora", preserved=preserved)
    push(optimizer(adapted, "oplora", weight_decay=0.3), adapted.trained)
    for layer, _ in pairs(adapted):
        U, S, V = svd(layer.weight)
        k = min(preserved, len(S) - 1, numerical_rank(S))
        moved, after = seen_change(adapted, layer), seen_weight(adapted, layer)
        assert moved.abs().max() > 1e-3
        assert_near(U[:, :k].mT @ moved, torch.zeros(k, len(V)), size=1e-1)
        assert_near(moved @ V[:, :k], torch.zeros(len(U), k), size=1e-1)
        assert_near(after @ V[:, :k], U[:, :k] * S[:k])
        assert_near(after.mT @ U[:, :k], V[:, :k] * S[:k])


def test_oplora_is_lora_between_two_projectors() -> None:
    adapted = adapt("oplora", preserved=2)
    push(optimizer(adapted, "oplora"), adapted.trained)
    for layer, _ in pairs(adapted):
        U, _, V = svd(layer.weight)
        left, right = (torch.eye(len(Q), dtype=Q.dtype) - Q[:, :2] @ Q[:, :2].mT for Q in (U, V))
        assert_near(seen_change(adapted, layer), left @ product(layer) @ right)


def test_osf_trains_r_minor_triplets_and_its_gradients_spare_the_leading_subspaces() -> None:
    """Plain descent keeps them exactly; Adam's division turns a projected gradient, so it keeps them nearly."""
    adapted = adapt("osf")
    shapes = [tuple(p.shape) for p in adapted.trained]
    assert shapes == [
        s for one in adapted.layers for m, d in [one.weight.shape] for s in [(RANK,), (m, RANK), (RANK, d)]
    ]
    train(adapted, torch.optim.SGD(adapted.trained, lr=0.1))
    for layer, _ in pairs(adapted):
        U, S, V = svd(layer.weight)
        k = min(len(S) - RANK, numerical_rank(S))
        moved = seen_change(adapted, layer)
        assert moved.abs().max() > 1e-5
        assert_near(U[:, :k].mT @ moved, torch.zeros(k, len(V)), size=1e-1)
        assert_near(moved @ V[:, :k], torch.zeros(len(U), k), size=1e-1)


def test_full_is_adamw_on_the_adapted_weights_and_on_nothing_else() -> None:
    adapted, reference = adapt("full"), base_model()
    before = {name: p.detach().clone() for name, p in adapted.model.named_parameters()}
    train(adapted, optimizer(adapted, "full", weight_decay=0.3))
    weights = [reference.get_submodule(layer.name).weight for layer in adapted.layers]
    train(DenseModel(reference, []), torch.optim.AdamW(weights, lr=0.02, weight_decay=0.3))
    for layer, weight in zip(adapted.layers, weights, strict=True):
        assert_near(layer.current(), weight)
    changed = {name for name, p in adapted.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {f"{layer.name}.weight" for layer in adapted.layers}


def test_dora_is_a_magnitude_times_a_direction_as_peft_merges_it() -> None:
    adapted = adapt("dora")
    train(adapted, optimizer(adapted, "dora"))
    merged = copy.deepcopy(adapted.model).merge_and_unload()
    for layer in adapted.layers:
        module = adapted.model.get_base_model().get_submodule(layer.name)
        A, B, m = (
            getattr(module, name)["default"].weight.detach().double()
            for name in ("lora_A", "lora_B", "lora_magnitude_vector")
        )
        direction = layer.weight.double() + SCALING * B @ A
        assert_near(layer.current(), m[:, None] * direction / direction.norm(dim=1, keepdim=True))
        assert_near(layer.current(), merged.get_submodule(layer.name).weight)
        assert (m / layer.weight.double().norm(dim=1) - 1).abs().max() > 1e-3


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    adapted = adapt("rslora")
    train(adapted, optimizer(adapted, "rslora"))
    for layer, _ in pairs(adapted):
        alpha = SCALING * RANK
        expected = alpha / math.sqrt(RANK) * layer.B.detach().double() @ layer.A.detach().double()
        assert_near(seen_change(adapted, layer), expected)


def steps_of_a(adapted: AdaptedModel, made: torch.optim.Optimizer | None = None) -> list[Tensor]:
    """How far each layer's A moves on made-up gradients; by plain Adam unless an optimizer is given."""
    of_a, of_b = ([getattr(layer, side) for layer in adapted.layers] for side in "AB")
    before = [A.detach().double().clone() for A in of_a]
    push(made or torch.optim.AdamW([*of_a, *of_b], lr=0.02, weight_decay=0.0), [*of_a, *of_b])
    return [A.detach().double() - start for A, start in zip(of_a, before, strict=True)]


@pytest.mark.parametrize("multiple", [1.0, 5.0, 50.0])
def test_adam_nscl_projects_adam_s_update_onto_the_null_space(multiple: float) -> None:
    adapted = adapt("adam-nscl", multiple=multiple)
    plain = steps_of_a(copy.deepcopy(adapted))
    found = steps_of_a(adapted, optimizer(adapted, "adam-nscl", multiple=multiple))
    for (layer, leader), moved, free in zip(pairs(adapted), found, plain, strict=True):
        values, vectors = eigh(ridged(PROXY[leader]))
        Q = vectors[:, values <= multiple * values[0]]
        assert 0 < Q.shape[1] < len(Q)
        assert_near(moved, free @ Q @ Q.mT, 1e-4)
        assert_near(layer.A.double() @ Q @ Q.mT, layer.A)


@pytest.mark.parametrize("alpha", [1.0, 5.0])
def test_sgp_gates_adam_in_the_eigenbasis_of_the_proxy_text(alpha: float) -> None:
    made = optimizer(adapt("sgp"), "sgp", alpha=alpha)
    *of_a, of_b = made.coordinates
    assert of_b == Coordinates()
    for leader, coordinates in zip(PROXY, of_a, strict=True):
        values, vectors = eigh(moment(PROXY[leader]))
        sigma = values.sqrt()
        assert_near(coordinates.gate, 1 - (alpha + 1) * sigma / (alpha * sigma + sigma[-1]))
        assert_near((coordinates.basis.double() * vectors).sum(0).abs(), torch.ones(len(values)))
        assert coordinates.filter is None
        assert not coordinates.gate_gradient


def test_sgp_moves_nothing_in_the_direction_that_the_proxy_text_uses_most() -> None:
    adapted = adapt("sgp")
    found = steps_of_a(adapted, optimizer(adapted, "sgp"))
    for (layer, leader), moved in zip(pairs(adapted), found, strict=True):
        top = eigh(moment(PROXY[leader]))[1][:, -1]
        for rows in (moved, layer.A.detach().double()):
            assert (rows @ top).norm() < 1e-5 * rows.norm()


@pytest.mark.parametrize("kind", ["adam-nscl", "sgp"])
def test_b_is_trained_by_plain_adam_where_a_is_not(kind: str) -> None:
    adapted = adapt(kind)
    plain = copy.deepcopy(adapted)
    steps_of_a(plain)
    steps_of_a(adapted, optimizer(adapted, kind))
    for layer, expected in zip(adapted.layers, plain.layers, strict=True):
        assert_near(layer.B, expected.B)
