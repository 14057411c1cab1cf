"""The library: what docs/library.md shows runs, and agrees with the pipeline."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import ROOT
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from small import BATCH, base_model

import folora
from folora.errors import FoLoRAError
from folora.library import adapted_model
from folora.methods.folora import FoLoRA
from folora.spectrum import read_spectrum

if TYPE_CHECKING:
    from conftest import Pipeline

    from folora.pencil import Spectrum

PROXY = [{"input_ids": torch.randint(11, (4, 12), generator=torch.Generator().manual_seed(seed))} for seed in range(6)]


def fresh(**options: Any) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 3, "task_type": "CAUSAL_LM", "target_modules": "all-linear", **options})
    model = get_peft_model(base_model(), config)
    assert isinstance(model, PeftModel)
    return model


@pytest.fixture(scope="module")
def spectrum() -> Spectrum:
    model = base_model()
    return folora.solve_spectrum(folora.second_moments(model, PROXY), folora.second_moments(model, [BATCH]))


@pytest.mark.usefixtures("in_tmp")
def test_the_page_runs(pipeline: Pipeline) -> None:
    tokenizer = pipeline.base.load_tokenizer()
    texts = ["1+2>3", "12+30>42", "max 3,7>7", "rev(abc)>cba"]
    tokenizer.padding_side = "right"
    batch = dict(tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False))
    rows = [{"input_ids": ids, "labels": ids} for ids in batch["input_ids"].tolist()]
    names = {
        "model": pipeline.base.load_model(),
        "tokenizer": tokenizer,
        "proxy_batches": [batch, batch],
        "task_batches": [batch],
        "rows": Dataset.from_list(rows),
        "texts": Dataset.from_dict({"text": texts}),
    }
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        exec(compile(block, "docs/library.md", "exec"), names)
        adapted: Any = names.get("adapted")
        if ".train()" in block or ".step()" in block:
            assert adapted_model(adapted, names["spectrum"]).moved(), block


def test_moments_are_those_of_the_pipeline(pipeline: Pipeline) -> None:
    """The pipeline's spectrum of the same text, from files, equals the library's."""
    from folora.layers import batches
    from folora.storage import read_table

    model, padding = pipeline.base.load_model(), pipeline.base.load_tokenizer().pad_token_id

    def measured(rows: list[list[int]]) -> Any:
        text = [{"input_ids": ids, "attention_mask": mask.long()} for ids, mask, _ in batches(rows, 7, padding)]
        return folora.second_moments(model, text)

    shards = sorted(pipeline.proxy.iterdir())
    proxy = [ids for shard in shards for ids in read_table(shard)[0]["token_ids"].to_pylist()]
    task = read_table(pipeline.task)[0]["input_ids"].to_pylist()
    found = folora.solve_spectrum(measured(proxy), measured(task), shrinkage=pipeline.params.spectrum.shrinkage)
    expected = read_spectrum(pipeline.spectrum)
    assert found.groups == expected.groups
    for name, one in expected.inputs.items():
        torch.testing.assert_close(found.inputs[name].eigenvalues, one.eigenvalues, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.inputs[name].penalty, one.penalty, rtol=1e-4, atol=1e-5)
        assert found.inputs[name].proxy_tokens == one.proxy_tokens


def test_padding_does_not_count() -> None:
    padded = {
        "input_ids": torch.cat([BATCH["input_ids"], torch.zeros(2, 3).long()], dim=1),
        "attention_mask": torch.cat([BATCH["attention_mask"], torch.zeros(2, 3).long()], dim=1),
    }
    plain, other = (folora.second_moments(base_model(), [batch]).moments for batch in (BATCH, padded))
    assert plain.tokens == other.tokens
    for name in plain.sums:
        torch.testing.assert_close(other.mean(name), plain.mean(name), rtol=1e-4, atol=1e-5 / plain.tokens)


def test_the_start_and_the_gates_are_folora_s(spectrum: Spectrum) -> None:
    model, other = fresh(), adapted_model(fresh(), spectrum)
    torch.manual_seed(5)
    optimizer = folora.gated_adam(model, spectrum, learning_rate=0.01, tau=0.5)
    torch.manual_seed(5)
    FoLoRA(kind="folora", tau=0.5).initialise(other.groups)
    adapted = adapted_model(model, spectrum)
    assert not adapted.moved()
    assert all(torch.equal(one.A, two.A) for one, two in zip(adapted.layers, other.layers, strict=True))
    assert optimizer.defaults["lr"] == 0.01
    for group, found in zip(adapted.groups, optimizer.coordinates, strict=False):
        eigenvalues = group.spectrum.eigenvalues
        torch.testing.assert_close(found.gate, (eigenvalues / (eigenvalues + 0.5)).float())
        assert found.basis is group.spectrum.basis


def test_everything_trainable_is_trained(spectrum: Spectrum) -> None:
    model = fresh(modules_to_save=["embed_tokens"])
    optimizer = folora.gated_adam(model, spectrum, learning_rate=0.01)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(one) for one in held} == {id(one) for one in model.parameters() if one.requires_grad}
    assert len(held) == len({id(one) for one in held})


def test_replaced_parameters_are_noticed(spectrum: Spectrum) -> None:
    """A wrapper that shards a model leaves the optimizer with parameters that nothing reads."""
    model = fresh()
    optimizer = folora.gated_adam(model, spectrum, learning_rate=0.01)
    for name, parameter in list(model.named_parameters()):
        if parameter.requires_grad:
            module = model.get_submodule(name.rpartition(".")[0])
            module.weight = torch.nn.Parameter(parameter.detach().clone())
    model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    with pytest.raises(FoLoRAError, match="the first step changed no weight"):
        optimizer.step()


def test_the_meter_reads_what_was_learned(spectrum: Spectrum) -> None:
    model = fresh()
    optimizer = folora.gated_adam(model, spectrum, learning_rate=0.02)
    meter = folora.forgetting_meter(model, spectrum)
    assert meter.read() == {"penalty": 0.0, "utility": 0.0}
    for _ in range(3):
        model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    read = meter.read()
    assert 0 < read["penalty"] < read["utility"]


def test_other_layers_are_named(spectrum: Spectrum) -> None:
    with pytest.raises(FoLoRAError, match=r"down_proj is in the spectrum alone: give both the same target_modules"):
        folora.gated_adam(fresh(target_modules=["q_proj", "v_proj"]), spectrum, learning_rate=0.01)
    other = folora.second_moments(base_model(), PROXY, target_modules=["q_proj"])
    with pytest.raises(FoLoRAError, match="different layers"):
        folora.solve_spectrum(other, folora.second_moments(base_model(), PROXY))


def test_an_adapter_of_another_name_is_told_apart_from_other_layers(spectrum: Spectrum) -> None:
    config = LoraConfig(r=3, task_type="CAUSAL_LM", target_modules="all-linear")
    model = get_peft_model(base_model(), config, adapter_name="mine")
    assert isinstance(model, PeftModel)
    with pytest.raises(FoLoRAError, match="no LoRA adapter named 'default'"):
        folora.gated_adam(model, spectrum, learning_rate=0.01)


def test_a_trained_adapter_is_refused(spectrum: Spectrum) -> None:
    model = fresh()
    for layer in adapted_model(model, spectrum).layers:
        torch.nn.init.ones_(layer.B)
    with pytest.raises(FoLoRAError, match="before the first step"):
        folora.gated_adam(model, spectrum, learning_rate=0.01)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tau": -1.0}, "gated_adam: tau: .*greater than 0"),
        ({"steepness": 2}, "gated_adam: steepness: .*not permitted"),
        ({"refresh_utility": 5}, "gated_adam: refresh_utility: for runs"),
        ({"kl_budget": 0.1}, "gated_adam: kl_budget: for runs"),
        (
            {"replay": 4, "replay_loss": "distillation"},
            "gated_adam: replay, replay_loss: for runs of the pipeline only",
        ),
        ({"replay_match": "tokens"}, "gated_adam: replay_match: for runs"),
        ({"mask_target": 1.0, "weight_decay": 0.1}, "gated_adam: mask_target: for runs"),
    ],
)
def test_options_that_do_not_go_are_named(options: dict[str, Any], expected: str, spectrum: Spectrum) -> None:
    with pytest.raises(FoLoRAError, match=expected):
        folora.gated_adam(fresh(), spectrum, learning_rate=0.01, **options)


def test_weight_decay_and_options_at_their_defaults_go(spectrum: Spectrum) -> None:
    optimizer = folora.gated_adam(fresh(), spectrum, learning_rate=0.01, weight_decay=0.1, replay=0, kl_budget=None)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}


@pytest.mark.parametrize(("batches", "expected"), [([], "no batch"), ([{"ids": torch.ones(1, 2)}], "it has ids")])
def test_text_that_is_none_is_named(batches: list[Any], expected: str) -> None:
    with pytest.raises(FoLoRAError, match=expected):
        folora.second_moments(base_model(), batches)


def test_a_broken_batch_leaves_the_model_as_it_was() -> None:
    model = base_model().train()
    with pytest.raises(FoLoRAError, match="no input_ids"):
        folora.second_moments(model, [BATCH, {"ids": torch.ones(1, 2)}])
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        folora.nonsense  # noqa: B018
