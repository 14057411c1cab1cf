from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from folora.errors import FoLoRAError
from folora.layers import adapted_layers, batches, input_groups

PROPERTY = settings(deadline=None, derandomize=True, max_examples=50)
IDS = torch.tensor([[3, 1, 4, 1]])
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMED = "layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "eager"}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


class Block(nn.Module):
    """Layers whose names say nothing about what they read."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.beta, self.gamma = nn.Linear(4, 3), nn.Linear(4, 2), nn.Linear(4, 4)
        self.delta, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.nn.functional.one_hot(input_ids, 4).float()
        y = self.gamma(x)
        return self.beta(x).sum() + self.alpha(x.clone()).sum() + self.delta(x).sum() + y.sum()


def test_all_linear_is_every_linear_layer_but_the_head(model: LlamaForCausalLM) -> None:
    layers = adapted_layers(model, "all-linear")
    assert [name.rpartition(".")[2] for name in layers] == NAMES * 2
    assert all(layer is model.get_submodule(name) for name, layer in layers.items())


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj"], 2),
        (["down_proj", "q_proj"], 4),
        (["self_attn.q_proj", "q_proj"], 2),
        (["model.layers.1.mlp.up_proj"], 1),
        (["lm_head"], 1),
    ],
)
def test_targets_match_the_end_of_a_name(model: LlamaForCausalLM, targets: list[str], count: int) -> None:
    layers = adapted_layers(model, targets)
    assert len(layers) == count
    assert all(name.endswith(tuple(targets)) for name in layers)
    order = [name for name, _ in model.named_modules()]
    assert list(layers) == sorted(layers, key=order.index)


@pytest.mark.parametrize("target", ["proj", "_proj", "q", "mlp", "query", "layers.0", ""])
def test_a_target_without_a_layer_is_named_beside_what_there_is(model: LlamaForCausalLM, target: str) -> None:
    with pytest.raises(FoLoRAError, match=rf"target_modules: '{target}' matches no .* down_proj, .*, q_proj") as error:
        adapted_layers(model, ["q_proj", target])
    assert all(name in str(error.value) for name in NAMES)


def test_a_target_that_some_blocks_lack_is_to_be_named_in_each(model: LlamaForCausalLM) -> None:
    mixed = deepcopy(model)
    mixed.model.layers[0].self_attn = nn.Identity()
    with pytest.raises(FoLoRAError) as error:
        adapted_layers(mixed, ["up_proj", "q_proj"])
    some = "'q_proj' is in 1 of the 2 model.layers only"
    assert str(error.value) == f"adapter.target_modules: {some}: name each that is meant, as in {NAMED!r}"
    assert list(adapted_layers(mixed, ["up_proj", NAMED])) == [
        "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"
    ]  # fmt: skip


def test_a_model_without_linear_layers_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=5, n_positions=4, n_embd=4, n_layer=1, n_head=1))
    with pytest.raises(FoLoRAError, match="GPT2LMHeadModel has no"):
        adapted_layers(model, "all-linear")


def test_layers_that_read_one_tensor_share_a_group(model: LlamaForCausalLM) -> None:
    groups = input_groups(model, adapted_layers(model, "all-linear"), IDS)
    expected = [NAMES[:3], NAMES[3:4], NAMES[4:6], NAMES[6:]] * 2
    assert [[name.rpartition(".")[2] for name in names] for names in groups.values()] == expected
    assert all(names[0] == leader for leader, names in groups.items())
    assert [name for names in groups.values() for name in names] == list(adapted_layers(model, "all-linear"))


def test_groups_hold_chosen_layers_only(model: LlamaForCausalLM) -> None:
    groups = input_groups(model, adapted_layers(model, ["v_proj", "k_proj", "down_proj"]), IDS)
    assert [len(names) for names in groups.values()] == [2, 1] * 2


def test_identity_decides_not_names_nor_values() -> None:
    """Alpha reads a copy; groups come in the order of the forward pass."""
    block = Block()
    layers = {name: block.get_submodule(name) for name in ("alpha", "beta", "gamma", "delta")}
    groups = input_groups(block, layers, torch.tensor([[0, 2, 1]]))
    assert list(groups.items()) == [("gamma", ["gamma", "beta", "delta"]), ("alpha", ["alpha"])]


def test_a_layer_that_is_never_reached_is_named() -> None:
    block = Block()
    layers = {name: block.get_submodule(name) for name in ("alpha", "unused")}
    with pytest.raises(FoLoRAError, match="never reaches unused"):
        input_groups(block, layers, torch.tensor([[0]]))
    assert not any(module._forward_pre_hooks for module in block.modules())


@pytest.mark.parametrize("token", [1, 999])
def test_hooks_go_also_after_an_exception(model: LlamaForCausalLM, token: int) -> None:
    layers = adapted_layers(model, "all-linear")
    if token < model.config.vocab_size:
        input_groups(model, layers, torch.tensor([[token]]))
    else:
        with pytest.raises(IndexError):
            input_groups(model, layers, torch.tensor([[token]]))
    assert not any(module._forward_pre_hooks for module in model.modules())


@PROPERTY
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=9), max_size=12), st.integers(1, 5), st.integers(0, 9))
def test_batches_hold_every_row_once_padded_on_the_right(rows: list[list[int]], size: int, padding: int) -> None:
    found: list[list[int]] = []
    for ids, mask, numbers in batches(rows, size, padding):
        assert numbers == range(len(found), len(found) + len(ids))
        assert len(ids) == min(size, len(rows) - len(found))
        assert mask.dtype == torch.bool
        assert ids.shape == mask.shape == (len(ids), max(len(rows[n]) for n in numbers))
        assert not (mask[:, 1:] & ~mask[:, :-1]).any()
        assert (ids[~mask] == padding).all()
        found += [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    assert found == rows
