from __future__ import annotations

import pytest
import torch
from small import BATCH, GROUPS, adapt, assert_near, base_model, context, optimizer, seen_weight, train

from folora.adapter import add_lora
from folora.deltas import DenseLayer
from folora.errors import FoLoRAError
from folora.methods import kinds

EDITING = ["pissa", "olora", "milora", "corda", "lora-null", "sc-lora"]  # they take a part out of the base weights


@pytest.mark.parametrize("kind", kinds())
def test_every_start_is_the_base_model_and_counts_as_unmoved(kind: str) -> None:
    adapted = adapt(kind)
    base = base_model()
    with torch.no_grad():
        assert_near(adapted.model.eval()(**BATCH).logits, base(**BATCH).logits, 1e-4)
    for layer in adapted.layers:
        weight = base.get_submodule(layer.name).weight
        assert torch.equal(layer.weight, weight)
        assert_near(seen_weight(adapted, layer), weight)
    assert not adapted.moved()
    train(adapted, optimizer(adapted, kind), steps=2)
    assert adapted.moved()


@pytest.mark.parametrize("kind", kinds())
def test_factors_are_what_the_model_adds_to_the_base_weights(kind: str) -> None:
    adapted = adapt(kind)
    train(adapted, optimizer(adapted, kind))
    adapted.model.eval()
    for layer in adapted.layers:
        left, right = layer.factors()
        change = layer.scaling * left.double() @ right.double()
        assert change.abs().max() > 1e-3
        assert_near(layer.weight + change, seen_weight(adapted, layer))


@pytest.mark.parametrize("kind", EDITING)
def test_what_was_taken_out_is_the_start_of_the_adapter(kind: str) -> None:
    adapted = adapt(kind)
    for layer in adapted.layers:
        frozen = adapted.linear(layer).weight
        assert_near(frozen.double() + layer.scaling * layer.B.double() @ layer.A.double(), layer.weight)
        assert not frozen.requires_grad


@pytest.mark.parametrize("kind", ["lora", "pissa", "oplora", "dora", "osf", "full"])
@pytest.mark.parametrize("training", [True, False])
def test_base_logits_leave_the_model_as_it_was(kind: str, training: bool) -> None:
    adapted = adapt(kind)
    train(adapted, optimizer(adapted, kind))
    adapted.model.train(training)
    with torch.no_grad():
        before = adapted.model(**BATCH).logits
        found = adapted.base_logits(BATCH)
        assert torch.equal(adapted.model(**BATCH).logits, before)
        assert_near(found, base_model()(**BATCH).logits)
    assert adapted.model.training is training
    assert not torch.allclose(found, before, atol=1e-3)


def test_trained_lists_every_parameter_that_gets_a_gradient() -> None:
    for kind in kinds():
        adapted = adapt(kind)
        train(adapted, optimizer(adapted, kind), steps=1)
        with_gradient = [p for p in adapted.model.parameters() if p.grad is not None]
        assert list(map(id, adapted.trained)) == list(map(id, with_gradient)), kind


def test_groups_follow_the_spectrum() -> None:
    for kind, of in (("lora", None), ("full", DenseLayer), ("dora", DenseLayer)):
        adapted = adapt(kind)
        assert [[layer.name for layer in group.layers] for group in adapted.groups] == list(GROUPS.values())
        assert of is None or all(isinstance(layer, of) for layer in adapted.layers)


def test_a_layer_of_the_spectrum_that_the_model_lacks_is_named() -> None:
    model = base_model()
    del model.model.layers[0].mlp.down_proj
    with pytest.raises(
        FoLoRAError, match=r"layer model\.layers\.0\.mlp\.down_proj of the spectrum is not in the model"
    ):
        add_lora(model, context())
