"""The plan of a parameter file against the shapes it follows from, and of a model whose weights are not here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from conftest import ROOT
from transformers import LlamaConfig, Qwen2Config
from typer.testing import CliRunner

from folora.base import Base
from folora.cli import app
from folora.commands.plan import Plan, make_plan
from folora.commands.shape import empty_model, shape_of
from folora.commands.stage_plans import LIBRARIES, kept_bytes, plan_stages
from folora.errors import FoLoRAError
from folora.foundation import LOADING
from folora.layers import adapted_layers
from folora.params import Params, PretrainedFoundation, load_params
from folora.spectrum import read_spectrum
from folora.storage import read_table

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Pipeline, SaveParams


def test_the_shape_is_that_of_the_model(pipeline: Pipeline) -> None:
    shape, covered = shape_of(empty_model(pipeline.params), pipeline.params)
    model = pipeline.base.load_model()
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    spectrum = read_spectrum(pipeline.spectrum)
    assert sorted(shape.inputs) == sorted(len(one.eigenvalues) for one in spectrum.inputs.values())
    weights = [tuple(layer.weight.shape) for layer in adapted_layers(model, "all-linear").values()]
    assert shape.layers == weights
    assert sum(one.count for one in covered if one.adapted) == len(weights)


def test_disk_is_what_the_artefacts_take(pipeline: Pipeline, runs: Path) -> None:
    """Up to what a manifest adds."""
    shape, _ = shape_of(empty_model(pipeline.params), pipeline.params)
    stages = {stage.stage: stage for stage in plan_stages(pipeline.params, shape, 1e9, 1e9)}
    moments = [*pipeline.proxy_moments.iterdir(), pipeline.task_moments]
    assert stages["covariance"].jobs == len(moments)
    assert stages["covariance"].disk == pytest.approx(sum(path.stat().st_size for path in moments), rel=0.2)
    assert stages["spectrum"].disk == pytest.approx(pipeline.spectrum.stat().st_size, rel=0.2)
    adapters = sum(path.stat().st_size for path in runs.rglob("adapter_model.safetensors"))
    assert stages["train"].disk == pytest.approx(adapters, rel=0.5)  # names of tensors take as much as tiny tensors


def test_time_follows_the_operations_and_the_speed(pipeline: Pipeline) -> None:
    shape, _ = shape_of(empty_model(pipeline.params), pipeline.params)
    slow, fast = (plan_stages(pipeline.params, shape, speed, 1e9) for speed in (1e9, 4e9))
    for one, other in zip(slow, fast, strict=True):
        assert one.memory > LIBRARIES
        assert one.seconds == pytest.approx(other.seconds * (1 if one.stage == "spectrum" else 4))


def test_an_evaluation_reads_the_texts_at_every_checkpoint(pipeline: Pipeline, evaluations: Path) -> None:
    shape, _ = shape_of(empty_model(pipeline.params), pipeline.params)
    planned = {stage.stage: stage for stage in plan_stages(pipeline.params, shape, 1e9, 1e9)}["evaluate"]
    folders = list(evaluations.iterdir())
    assert planned.jobs == len(folders)
    rows = [read_table(folder / "metrics.parquet")[0].num_rows for folder in folders]
    text = pipeline.params.proxy.heldout_sequences * pipeline.params.proxy.max_length
    assert planned.tokens == sum(rows) * text
    kept = 4 * text * shape.vocabulary
    assert planned.memory > LIBRARIES + shape.size + kept
    assert planned.operations == 2 * shape.parameters * text * (sum(rows) + len(folders))
    many = pipeline.params.model_copy(
        update={"proxy": pipeline.params.proxy.model_copy(update={"heldout_sequences": 2**30 // kept * 1000})}
    )
    assert kept_bytes(2**28 // shape.vocabulary, shape.vocabulary) > 0  # where more are not kept, they are made again
    more = {stage.stage: stage for stage in plan_stages(many, shape, 1e9, 1e9)}["evaluate"]
    assert more.operations == 2 * shape.parameters * 2 * more.tokens


def test_items_are_counted_where_they_are(pipeline: Pipeline, evaluations: Path) -> None:
    def said(**changes: Any) -> str:
        evaluation = pipeline.params.evaluation.model_copy(update={"tasks": str(pipeline.world)} | changes)
        return make_plan(pipeline.params.model_copy(update={"evaluation": evaluation})).warnings[-1]

    tables = {folder.name: read_table(folder / "answers.parquet")[0].num_rows for folder in evaluations.iterdir()}
    base = tables.pop("base")
    assert said().startswith(f"evaluate: {base:,} items for the base model, {sum(tables.values()):,} for all ")
    names = len(pipeline.params.evaluation_tasks())
    assert said(limit=2).startswith(f"evaluate: at most {2 * names} items for the base model, ")
    assert said(limit=2, tasks="nowhere") == said(limit=2)
    assert f"the items of {names} evaluation tasks, subtraction the first, are not here" in said(tasks="nowhere")


PRESETS = ROOT / "workflow" / "presets"
HUB_MODELS = {
    "llama-3-8b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
    ),
    "qwen2.5-7b": Qwen2Config(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "smollm2-135m": LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
}


@pytest.fixture
def llama_8b(pipeline: Pipeline, tmp_path: Path) -> dict[str, Any]:
    """Parameters that name a model of Llama-3-8B's shape, of which only the configuration is there."""
    config = HUB_MODELS["llama-3-8b"]
    config.save_pretrained(tmp_path / "llama")
    loading = LOADING.model_dump() | {"dtype": "bfloat16"}
    section = {"source": "pretrained", "model": str(tmp_path / "llama"), "revision": None, "loading": loading}
    return pipeline.values() | {"foundation": section}


def test_a_large_model_is_planned_without_its_weights(llama_8b: dict[str, Any]) -> None:
    plan = make_plan(Params.model_validate(llama_8b))
    stages = {stage.stage: stage for stage in plan.stages}
    squares = 32 * (3 * 4096**2 + 14_336**2)
    halves = squares * 9 // 16  # of symmetric sums, in eight blocks
    assert stages["covariance"].memory > 2 * 8_030_261_248 + 8 * halves
    assert stages["spectrum"].disk == 3 * 4 * squares
    assert any("32 inputs of width 14,336" in line for line in plan.warnings)
    assert any("covariance needs" in line for line in plan.warnings)


def test_the_basis_of_a_wide_input_can_be_truncated(llama_8b: dict[str, Any]) -> None:
    whole = make_plan(Params.model_validate(llama_8b))
    part = make_plan(Params.model_validate(llama_8b | {"spectrum": llama_8b["spectrum"] | {"directions": 512}}))
    (line,) = [line for line in part.warnings if "14,336" in line and "spectrum.directions" in line]
    assert "32 inputs of width 14,336 keep the 512 directions with the greatest λ, " in line
    assert "instead of 13.2 GB of all 14,336" in line
    before, after = ({stage.stage: stage for stage in plan.stages} for plan in (whole, part))
    assert after["spectrum"].operations < before["spectrum"].operations / 5
    assert after["spectrum"].disk == 4 * 32 * (2 * 14_336**2 + 512 * 14_336 + 3 * (2 * 4096**2 + 512 * 4096))
    assert after["train"].memory < before["train"].memory


def test_moments_can_be_summed_in_several_passes(llama_8b: dict[str, Any]) -> None:
    def planned(budget: str | None) -> Plan:
        values = llama_8b | {"covariance": llama_8b["covariance"] | {"memory_budget": budget}}
        return make_plan(Params.model_validate(values))

    whole, part = planned(None), planned("10 GB")
    (line,) = [line for line in part.warnings if "covariance.memory_budget" in line]
    expected = r"covariance\.memory_budget: 4 passes over each text, 9\.\d GB of moments at once instead of 37\.2"
    assert re.match(expected, line)
    before, after = ({stage.stage: stage for stage in plan.stages}["covariance"] for plan in (whole, part))
    assert before.memory - after.memory > 25e9
    assert after.disk == before.disk
    assert after.operations - before.operations == pytest.approx(3 * 2 * 8_030_261_248 * before.tokens)
    assert not any("covariance.memory_budget" in line for line in [*whole.warnings, *planned("80 GB").warnings])
    with pytest.raises(FoLoRAError, match=r"covariance\.memory_budget: 1000000000 bytes .* 14,336: give \d{10} or"):
        planned("1 GB")


def test_a_stage_says_what_it_takes_before_it_begins(
    llama_8b: dict[str, Any], save_params: SaveParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Base(tmp_path / "llama", {"model": "", "tokenizer": "", "loading": LOADING.model_dump()})
    monkeypatch.setattr("folora.base.open_base", lambda _: base)
    options = ("--foundation", "f", "--threads", "1", "--params", save_params(llama_8b), "--output", tmp_path / "out")
    result = CliRunner().invoke(app, list(map(str, ("proxy", "sampled", 0, *options))))
    params = Params.model_validate(llama_8b)
    tokens = len(params.proxy.shards) * params.proxy.sequences * params.proxy.max_length
    assert re.match(
        rf"proxy, \d jobs together: {tokens:,} tokens, .* of disk, about .* here; 1\d\.\d GB", result.stderr
    )
    assert result.exit_code != 0  # there are no weights


@pytest.mark.parametrize("name", HUB_MODELS)
def test_presets_of_hub_models_fit_one_large_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("folora.commands.shape._config", lambda *_: HUB_MODELS[name])
    params = load_params(ROOT / "workflow" / "presets" / f"{name}.yaml")
    plan = make_plan(params)
    assert all(stage.memory < 80e9 for stage in plan.stages)
    stages = {stage.stage: stage for stage in plan.stages}
    assert stages["proxy"].tokens == 256 * 2048
    assert stages["evaluate"].tokens == (1 + 36 * 2) * 64 * 2048
    assert plan.warnings[-1].startswith("evaluate: at most 7,500 items for the base model, 396,000 for all checkpoints")
    rows = {"math": 512, "code": 512, "instruction": 512}
    assert stages["covariance"].tokens == 256 * 2048 + sum(256 * length for length in rows.values())
    assert {run.task for run in params.runs.values()} == rows.keys()


def test_what_llama_3_8b_leaves_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("folora.commands.shape._config", lambda *_: HUB_MODELS["llama-3-8b"])
    params = load_params(PRESETS / "llama-3-8b.yaml")
    assert "down_proj" not in params.adapter.target_modules
    (line,) = [line for line in make_plan(params).warnings if line.startswith("adapter.target_modules: ")]
    assert line == (
        "adapter.target_modules: 32 inputs of width 14,336 (down_proj) are left out; with them the moments of a text "
        "take 29.6 GB more, a job of spectrum 18.1 GB, all of these 15.3 times the operations"
    )
    whole = params.model_copy(update={"adapter": params.adapter.model_copy(update={"target_modules": "all-linear"})})
    assert not any("are left out" in line for line in make_plan(whole).warnings)
    before, after = ({stage.stage: stage for stage in make_plan(one).stages}["spectrum"] for one in (params, whole))
    assert after.operations / before.operations == pytest.approx(15.3, abs=0.05)
    assert after.memory == pytest.approx(18.1e9 + LIBRARIES, rel=0.01)


@pytest.mark.parametrize("name", ["default", *(path.stem for path in sorted(PRESETS.iterdir()))])
def test_a_preset_gives_its_jobs_the_memory_that_they_take(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = load_params(ROOT / "params.yaml" if name == "default" else PRESETS / f"{name}.yaml")
    if isinstance(params.foundation, PretrainedFoundation):
        config = HUB_MODELS.get(name, HUB_MODELS["smollm2-135m"])
        monkeypatch.setattr("folora.commands.shape._config", lambda *_: config)
    assert not [line for line in make_plan(params).warnings if line.startswith("memory: ")]
    less = params.model_copy(update={"memory": params.memory.model_copy(update={"proxy": 500})})
    told = [line for line in make_plan(less).warnings if line.startswith("memory: ")]
    assert [line.partition(",")[0] for line in told] == [
        f"memory: a job of {stage} is given 500.0 MB" for stage in ("proxy", "heldout")
    ]


@pytest.mark.slow
def test_the_plan_of_a_run_against_what_it_took(by_dvc: Path, tmp_path: Path) -> None:
    """Of a tiny model memory is that of the libraries, and manifests weigh more than rows; time is not asserted."""
    command = [sys.executable, str(ROOT / "benchmarks" / "planned.py"), "--output", str(tmp_path / "ratios.json")]
    subprocess.run(command, cwd=by_dvc, check=True)
    found = {one["stage"]: one for one in json.loads((tmp_path / "ratios.json").read_text())}
    assert found.keys() == {"proxy", "heldout", "covariance", "spectrum", "train"}
    assert all(0.5 < one["memory"] < 3 for one in found.values())
    assert all(0.8 < found[stage]["disk"] < 1.25 for stage in ("covariance", "spectrum"))


def test_seventy_billion_parameters_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of docs/scale.md: the 8B preset with the shape of Llama-3-70B."""
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    monkeypatch.setattr("folora.commands.shape._config", lambda *_: config)
    params = load_params(ROOT / "workflow" / "presets" / "llama-3-8b.yaml")
    shape, _ = shape_of(empty_model(params), params)
    assert shape.parameters == 70_553_706_496
    stages = {stage.stage: stage for stage in plan_stages(params, shape, 1e12, 1e12)}
    moments = 8 * 80 * 3 * 8192**2 * 9 // 16
    assert stages["covariance"].disk == 11 * moments
    assert stages["covariance"].memory > 2 * shape.parameters + moments
    assert stages["spectrum"].operations == 3 * 2 * 80 * 3 * 13 * 8192**3
    page = (ROOT / "docs" / "scale.md").read_text()
    for stage in stages.values():
        *_, memory, disk, _ = stage.cells()
        assert f"| {stage.stage} | {stage.jobs} | {memory} | {disk} |" in page


@pytest.mark.parametrize("setting", [{"micro_batch": 2}, {"gradient_checkpointing": True}])
def test_less_memory_is_planned(setting: dict[str, Any], pipeline: Pipeline) -> None:
    shape, _ = shape_of(empty_model(pipeline.params), pipeline.params)
    less = Params.model_validate(pipeline.values() | {"train": pipeline.values()["train"] | setting})
    before, after = (
        {stage.stage: stage for stage in plan_stages(params, shape, 1e9, 1e9)}["train"]
        for params in (pipeline.params, less)
    )
    assert after.memory < before.memory
    assert after.seconds == before.seconds * (1.5 if "gradient_checkpointing" in setting else 1)


def test_the_command_prints_the_plan_or_its_values(
    pipeline: Pipeline, save_params: SaveParams, capsys: pytest.CaptureFixture[str]
) -> None:
    from folora.commands.cli import plan

    plan(as_json=False, params_file=save_params(pipeline.values()))
    printed = capsys.readouterr().out
    assert "model.layers.*.self_attn.q_proj" in printed
    assert "of computing, items of evaluation tasks left out" in printed
    plan(as_json=True, params_file=save_params(pipeline.values()))
    found = json.loads(capsys.readouterr().out)
    stages = ["proxy", "heldout", "covariance", "spectrum", "train", "evaluate"]
    assert [stage["stage"] for stage in found["stages"]] == stages


def test_a_model_that_is_nowhere_is_one_line(llama_8b: dict[str, Any], save_params: SaveParams, tmp_path: Path) -> None:
    from folora.commands.cli import plan

    (tmp_path / "llama" / "config.json").unlink()
    with pytest.raises(FoLoRAError, match=r"^foundation\.model: .*llama"):
        plan(as_json=False, params_file=save_params(llama_8b))
