"""``folora forget``, on adapters of this project and on others."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, LoraModel
from typer.testing import CliRunner

from folora.cli import app
from folora.commands.forget import Forgetting, Yardsticks, _changed_layer, _relative_change, measure_forgetting
from folora.errors import FoLoRAError
from folora.spectrum import read_spectrum
from folora.storage import read_table

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Pipeline, SaveParams

LORA, REPLAY = "lora-3e-3-s0", "folora-replay-1e-2-s0"
Q, HEAD = "model.layers.0.self_attn.q_proj", "lm_head"


def measure(pipeline: Pipeline, adapter: Path, tasks: Path | None = None) -> Forgetting:
    yardsticks = Yardsticks(pipeline.heldout, pipeline.spectra, tasks or pipeline.world)
    return measure_forgetting(pipeline.params, adapter, pipeline.base, yardsticks)


def foreign(pipeline: Pipeline, folder: Path, config: Any) -> Path:
    """An adapter with random weights, made by PEFT alone."""
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(pipeline.base.load_model(), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "original_module" not in name:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(str(folder))
    return folder


def test_it_agrees_with_evaluation_and_meter(pipeline: Pipeline, runs: Path, evaluations: Path) -> None:
    found = measure(pipeline, runs / "folora-replay" / REPLAY / "adapter")
    row = read_table(evaluations / "folora-replay" / "metrics.parquet")[0].to_pylist()[-1]
    assert found.kl == pytest.approx(row["kl"], rel=1e-4)
    assert found.perplexity == pytest.approx(row["perplexity"], rel=1e-5)
    (base,) = read_table(evaluations / "base" / "metrics.parquet")[0].to_pylist()
    assert found.base_perplexity == pytest.approx(base["perplexity"], rel=1e-6)
    assert found.kept == {name: (base[f"kept/{name}"], row[f"kept/{name}"]) for name in pipeline.params.evaluation.kept}
    last = read_table(runs / "folora-replay" / REPLAY / "history.parquet")[0].to_pylist()[-1]
    assert found.mean("penalty") == pytest.approx(last["penalty"], rel=1e-3)
    assert found.mean("utility") == pytest.approx(last["utility"], rel=1e-3)
    assert len(found.layers) == sum(map(len, read_spectrum(pipeline.spectrum).groups.values()))
    assert found.unmeasured == []


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "rank_pattern": {"v_proj": 5}}])
def test_any_rank_and_modules(options: dict[str, Any], pipeline: Pipeline, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel

    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", HEAD], task_type="CAUSAL_LM", **options)
    adapter = foreign(pipeline, tmp_path / "adapter", config)
    found = measure(pipeline, adapter)
    layers = pipeline.params.foundation.layers  # type: ignore[union-attr]
    assert {layer.layer.rpartition(".")[2] for layer in found.layers} == {"q_proj", "v_proj"}
    assert len(found.layers) == 2 * layers
    assert found.unmeasured == [HEAD]

    # the definition, with the change that PEFT merges
    base = pipeline.base.load_model()
    weight = base.get_submodule(Q).weight.detach().clone().double()
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    change = merged.get_submodule(Q).weight.detach().double() - weight
    moment = read_spectrum(pipeline.spectrum).inputs[Q].penalty.double()
    expected = torch.trace(change @ moment @ change.T) / torch.trace(weight @ moment @ weight.T)
    assert found.layers[0].layer == Q
    assert found.layers[0].penalty == pytest.approx(float(expected), rel=1e-3)


def test_other_kinds_of_adapters(pipeline: Pipeline, tmp_path: Path) -> None:
    from peft import IA3Config, LoraConfig, PromptTuningConfig

    trained = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[HEAD], task_type="CAUSAL_LM")
    found = measure(pipeline, foreign(pipeline, tmp_path / "head", trained))
    assert found.unmeasured == [HEAD]
    assert found.layers
    scaled = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    assert all(layer.penalty > 0 for layer in measure(pipeline, foreign(pipeline, tmp_path / "ia3", scaled)).layers)
    prompt = foreign(pipeline, tmp_path / "prompt", PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(FoLoRAError, match="adds tokens to the prompt and changes no layer"):
        measure(pipeline, prompt, tmp_path)


def test_without_tasks_the_rest_is_measured(pipeline: Pipeline, runs: Path, tmp_path: Path) -> None:
    found = measure(pipeline, runs / "lora" / LORA / "adapter", tmp_path)
    assert found.kept == {}
    assert found.unasked == pipeline.params.evaluation.kept
    assert found.kl > 0


def test_a_small_change_of_a_bfloat16_base_is_not_rounded_away() -> None:
    base = torch.nn.Linear(32, 32, bias=False)
    torch.nn.init.normal_(base.weight, generator=torch.Generator().manual_seed(0))
    model = LoraModel(torch.nn.Sequential(base), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), "x")
    layer: Any = model.model[0]
    layer.lora_B["x"].weight.data *= 1e-4
    spectrum: Any = SimpleNamespace(penalty=torch.eye(32), utility=torch.eye(32))
    changes = []
    for dtype in (torch.bfloat16, torch.float32):  # which holds the rounded weights too
        base.to(dtype)
        weight = base.weight.clone()
        changed = _changed_layer("0", layer)
        assert changed is not None
        changes.append(_relative_change(changed, spectrum))
        assert torch.equal(base.weight, weight)
        assert base.weight.dtype == dtype
    assert changes[0].penalty == pytest.approx(changes[1].penalty, rel=1e-5)


def test_what_is_no_adapter_for_this_model_is_one_line(pipeline: Pipeline, runs: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    with pytest.raises(FoLoRAError, match=r"^.*/nothing/adapter_config\.json: not found: name the folder of a PEFT"):
        measure(pipeline, tmp_path / "nothing")
    size = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    other = LlamaForCausalLM(LlamaConfig(vocab_size=50, **size))
    get_peft_model(other, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path / "other"))
    with pytest.raises(FoLoRAError, match=r"does not fit this base model, or is damaged: .*size mismatch"):
        measure(pipeline, tmp_path / "other")
    names = LoraConfig(r=2, target_modules=["no_such_layer"])
    shutil.copytree(runs / "lora" / LORA / "adapter", tmp_path / "names")
    names.save_pretrained(str(tmp_path / "names"))
    with pytest.raises(FoLoRAError, match="does not fit this base model"):
        measure(pipeline, tmp_path / "names")
    pattern = LoraConfig(r=2, target_modules="q_proj**+")
    pattern.save_pretrained(str(tmp_path / "names"))
    with pytest.raises(FoLoRAError, match="does not fit this base model, or is damaged: multiple repeat"):
        measure(pipeline, tmp_path / "names")
    config = json.loads((tmp_path / "names" / "adapter_config.json").read_text())
    (tmp_path / "names" / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": "x" * 100_000}))
    with pytest.raises(FoLoRAError, match=r"or is damaged: .*modules_to_save Input should be a valid array"):
        measure(pipeline, tmp_path / "names")
    shutil.copytree(runs / "lora" / LORA / "adapter", tmp_path / "damaged")
    weights = tmp_path / "damaged" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(FoLoRAError, match="or is damaged"):
        measure(pipeline, tmp_path / "damaged")


def test_the_command(pipeline: Pipeline, runs: Path, save_params: SaveParams) -> None:
    places = {"foundation": pipeline.foundation, "heldout": pipeline.heldout, "spectrum": pipeline.spectra}
    places |= {"tasks": pipeline.world, "params": save_params(pipeline.values())}
    options = [str(part) for name, path in places.items() for part in (f"--{name}", path)]
    command = ["forget", str(runs / "lora" / LORA / "adapter"), *options]
    said = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert {
        "kl",
        "perplexity",
        "base_perplexity",
        "kept",
        "layers",
        "unmeasured",
        "unasked",
        "penalty",
        "utility",
    } == said.keys()
    text = CliRunner().invoke(app, command).stdout
    assert f"KL to the base {said['kl']:.4f} nats per token" in text
    assert Q in text
