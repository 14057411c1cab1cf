from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

import pytest
import torch
from small import BATCH, adapt, half_of
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from folora.layers import adapted_layers, batches
from folora.library import second_moments
from folora.moments import Moments, collect
from folora.triangle import whole_of

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS = [
    [3, 1, 4, 1, 5, 9, 2],
    [6],
    [5, 3, 5],
    [8, 9, 7, 9, 3, 2, 3, 8, 4],
    [6, 2],
    [6, 4, 3, 3, 8, 3],
    [2, 7, 9],
    [5, 0],
]
TOKENS = sum(map(len, ROWS))
Layers = dict[str, nn.Linear]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Grouped heads, so that layers are not square, and norms that make their inputs signed and badly scaled."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "eager"}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.data = torch.logspace(-1.5, 1.5, 8) * torch.tensor([1.0, -1.0]).repeat(4)
    return model


@pytest.fixture(scope="module")
def layers(model: LlamaForCausalLM) -> Layers:
    return adapted_layers(model, ["q_proj", "o_proj", "up_proj", "down_proj"])


def everything(_ids: Tensor, mask: Tensor) -> Tensor:
    return mask


def moments(
    model: nn.Module,
    layers: Layers,
    rows: list[list[int]] = ROWS,
    size: int = 8,
    padding: int = 0,
    counted: Callable[[Tensor, Tensor], Tensor] = everything,
) -> Moments:
    with torch.no_grad(), collect(layers) as collector:
        for ids, mask, _ in batches(rows, size, padding):
            collector.select(counted(ids, mask))
            model(input_ids=ids, attention_mask=mask)
    return collector.moments


@pytest.fixture(scope="module")
def looped(model: LlamaForCausalLM, layers: Layers) -> dict[str, list[Tensor]]:
    """Every token's x xᵀ, one at a time in float64, from unpadded rows."""
    products: dict[str, list[Tensor]] = {name: [] for name in layers}

    def remember(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda _, inputs: products[name].extend(torch.outer(x, x) for x in inputs[0][0].double())

    handles = [layer.register_forward_pre_hook(remember(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for row in ROWS:
            model(input_ids=torch.tensor([row]))
    for handle in handles:
        handle.remove()
    return products


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Relative to the scale of each pair of coordinates, so that small ones count as much as large ones."""
    scale = expected.diagonal().sqrt()
    torch.testing.assert_close(
        found / scale / scale[:, None], expected / scale / scale[:, None], rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_equal_a_loop_over_tokens_for_any_batch_size_and_padding(
    model: LlamaForCausalLM, layers: Layers, looped: dict[str, list[Tensor]], size: int, padding: int
) -> None:
    found = moments(model, layers, size=size, padding=padding)
    assert found.tokens == TOKENS
    for name, products in looped.items():
        assert found.sums[name].dtype == torch.float64
        assert_close(whole_of(found.sums[name], found.widths[name]), torch.stack(products).sum(0))
        assert_close(found.mean(name), torch.stack(products).mean(0))


def test_only_selected_tokens_count(model: LlamaForCausalLM, layers: Layers, looped: dict[str, list[Tensor]]) -> None:
    """Token 3 does not count, wherever it stands."""
    found = moments(model, layers, size=3, counted=lambda ids, mask: mask & (ids != 3))
    counts = [token != 3 for row in ROWS for token in row]
    assert found.tokens == sum(counts) < TOKENS
    for name, products in looped.items():
        lengths = torch.stack([p.trace() for p, counted in zip(products, counts, strict=True) if counted])
        assert float(found.fourths[name]) == pytest.approx(float(lengths.square().sum()), rel=1e-5)
    for name, products in looped.items():
        assert_close(
            found.mean(name), torch.stack([p for p, counted in zip(products, counts, strict=True) if counted]).mean(0)
        )


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 2, 0]])
def test_one_shard_equals_many_in_any_order(model: LlamaForCausalLM, layers: Layers, order: list[int]) -> None:
    whole = moments(model, layers, size=1)
    shards = [moments(model, layers, rows, size=1) for rows in (ROWS[:1], ROWS[1:5], ROWS[5:])]
    total = reduce(Moments.plus, [shards[number] for number in order])
    assert total.tokens == whole.tokens
    for name in layers:
        assert_close(total.mean(name), whole.mean(name), 1e-12)


def test_adding_and_taking_away_leave_the_shards_alone() -> None:
    eye, fourth = half_of(torch.eye(2).double()), {"x": torch.tensor(7.0)}
    one, two = (Moments({"x": 2}, {"x": factor * eye}, fourth, tokens) for factor, tokens in ((1, 3), (4, 5)))
    total = one.plus(two)
    total.sums["x"] += 100
    left = total.minus(one)
    assert [moments.sums["x"][0] for moments in (one, two, total, left)] == [1, 4, 105, 104]
    assert [moments.tokens for moments in (one, two, total, left)] == [3, 5, 8, 5]
    assert [moments.fourths["x"] for moments in (one, two, total, left)] == [7, 7, 14, 7]


def test_sums_are_float64() -> None:
    """A float32 sum would lose the small tokens that follow a large one."""
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad(), collect({"x": layer}) as collector:
        for value in (2.0**13, 1.0, 1.0):
            collector.select(torch.ones(1, 1, dtype=torch.bool))
            layer(torch.full((1, 1, 1), value))
    assert collector.moments.sums["x"].item() == 2**26 + 2


def test_bfloat16_inputs_are_multiplied_in_float32() -> None:
    layer = nn.Linear(2, 1, bias=False).bfloat16()
    x = torch.tensor([[[1.0078125, -3.0]]]).bfloat16()
    with torch.no_grad(), collect({"x": layer}) as collector:
        collector.select(torch.ones(1, 1, dtype=torch.bool))
        layer(x)
    assert collector.moments.mean("x").tolist() == [[1.0078125**2, -3 * 1.0078125], [-3 * 1.0078125, 9]]


def test_collecting_leaves_outputs_and_hooks_as_they_were(model: LlamaForCausalLM, layers: Layers) -> None:
    ids = torch.tensor(ROWS[:1])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with collect(layers) as collector:
            collector.select(torch.ones_like(ids, dtype=torch.bool))
            during = model(input_ids=ids).logits
            assert all(len(layer._forward_pre_hooks) == 1 for layer in layers.values())
        after = model(input_ids=ids).logits
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert collector.moments.tokens == ids.numel()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_hooks_go_after_an_exception(model: LlamaForCausalLM, layers: Layers) -> None:
    def interrupt() -> None:
        with collect(layers):
            assert all(layer._forward_pre_hooks for layer in layers.values())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("measure", ["library", "training"])
def test_activations_made_twice_are_counted_once(measure: str) -> None:
    """In training, with gradient checkpointing, and between a forward pass and its backward pass."""
    adapted = adapt("folora")
    expected = adapted.task_moments()
    adapted.model.train()
    adapted.model.activation_checkpointing_enable({"use_reentrant": False})
    loss = adapted.model(**BATCH, labels=BATCH["input_ids"]).loss
    if measure == "library":
        found = second_moments(adapted.model.get_base_model(), [BATCH]).moments
    else:
        found = adapted.task_moments()
    before = {name: found.mean(name) for name in found.sums}
    loss.backward()
    assert found.tokens == expected.tokens == BATCH["input_ids"].numel()
    for name in expected.sums:
        own = name if measure == "training" else next(key for key in found.sums if name in key)
        assert_close(found.mean(own), expected.mean(name))
        assert torch.equal(found.mean(own), before[own])
