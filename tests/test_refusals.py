"""Broken, foreign and missing input that the stages refuse or read as it is, whatever stage it reaches."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
import torch

from folora.adapter import load_checkpoint
from folora.base import check_model, digests, open_base
from folora.errors import FoLoRAError
from folora.evaluate import Evaluator, evaluate_method
from folora.params import Params
from folora.report import write_report
from folora.storage import read_json, read_table, write_json, write_table, write_tensors
from folora.task import prepare_task
from folora.train import TrainInputs, train_run

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Pipeline, Refused, SaveParams

    from folora.base import Base

LORA = "lora-3e-3-s0"


# storage
def test_read_only_folder_that_exists_is_named(read_only_disk: Path) -> None:
    with pytest.raises(FoLoRAError, match=r"file: cannot be written .*Read-only"):
        write_tensors(read_only_disk / "file", {"a": torch.zeros(1)}, {})


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FoLoRAError, match=r"file/x: cannot be written"):
        write_tensors(tmp_path / "file" / "x", {"a": torch.zeros(1)}, {})


# base
def test_half_precision_weights_become_float32(tiny: Path) -> None:
    foundation = tiny / "foundation"
    open_base(foundation).load_model().bfloat16().save_pretrained(foundation)
    write_json(foundation / "manifest.json", read_json(foundation / "manifest.json") | digests(foundation))
    assert open_base(foundation).load_model().dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("tokenizer.json", "{}", "its tokenizer cannot be read: "),
        ("tokenizer.json", "{", "its tokenizer cannot be read: "),
        ("config.json", '{"model_type": "llama", "hidden_size": "x"}', "its configuration cannot be read: "),
        ("config.json", "[]", "its configuration cannot be read: "),
        ("config.json", '{"model_type": "llama", "architectures": [["x"]]}', "is a \\['x'\\], not a causal language"),
    ],
)
def test_a_damaged_model_of_others_is_named(name: str, content: str, expected: str, tiny: Path) -> None:
    loading = open_base(tiny / "foundation").loading
    (tiny / "foundation" / name).write_text(content)
    with pytest.raises(FoLoRAError, match=f"foundation: {expected}"):
        check_model(tiny / "foundation", loading)


@pytest.mark.parametrize(("field", "value"), [("loading", None), ("model", 3), ("source", []), ("commit", {})])
def test_a_foundation_manifest_of_other_types_is_named(field: str, value: object, tiny: Path) -> None:
    path = tiny / "foundation" / "manifest.json"
    write_json(path, read_json(path) | {field: value})
    with pytest.raises(FoLoRAError, match=rf"manifest\.json: {field}: Input should be"):
        open_base(tiny / "foundation")


@pytest.mark.parametrize("weights", [{"no.such.layer": torch.zeros(2)}, {"model.norm": torch.zeros(2)}])
def test_weights_of_another_model_are_named(weights: dict[str, torch.Tensor], tiny_base: Base, tmp_path: Path) -> None:
    write_tensors(tmp_path / "weights.safetensors", weights, {"artefact": "weights"})
    with pytest.raises(FoLoRAError, match=f"the model has no {next(iter(weights))} of that shape"):
        load_checkpoint(tiny_base.load_model(), tmp_path)


# task
@pytest.mark.parametrize(
    ("name", "content", "responses"),
    [
        ("zeros.csv", "prompt,response\n1>,007\n2>,1\n", ["007", "1"]),
        ("words.csv", "prompt,response\n1>,nan\n2>,null\n", ["nan", "null"]),
        ("date.jsonl", '{"prompt": "1>", "response": "2024-01-01"}\n', ["2024-01-01"]),
    ],
)
def test_text_stays_as_it_is(
    name: str, content: str, responses: list[str], tiny_base: Base, tiny_params: Params, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    task = tiny_params.tasks["subtraction"].model_copy(update={"dataset": str(tmp_path / name)})
    prepare_task(task, tiny_base, tmp_path / "out")
    tokenizer = tiny_base.load_tokenizer()
    decoded = [
        tokenizer.decode(ids, skip_special_tokens=True)
        for ids in read_table(tmp_path / "out")[0]["input_ids"].to_pylist()
    ]
    assert [text.split(">")[1] for text in decoded] == responses


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("null.jsonl", '{"prompt": "1>", "response": "1"}\n{"prompt": "1>"}\n'),
        ("null.csv", "prompt,response\n1>,0\n2>,\n"),
        ("header.csv", "prompt,response\n"),
        ("blank.jsonl", "\n\n"),
        ("damaged.parquet", "PAR1xxxx"),
        ("unknown.jsonl", '{"prompt": "1>", "response": "\\u03a9"}\n'),
    ],
)
def test_bad_rows_are_named(name: str, content: str, tiny_base: Base, tiny_params: Params, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    task = tiny_params.tasks["subtraction"].model_copy(update={"dataset": str(tmp_path / name)})
    with pytest.raises(FoLoRAError):
        prepare_task(task, tiny_base, tmp_path / "out")


def test_template_that_fails_on_a_row_is_named(
    tiny_base: Base, tiny_params: Params, tiny: Path, tmp_path: Path
) -> None:
    dataset = str(tiny / "world" / "subtraction")
    task = tiny_params.tasks["subtraction"].model_copy(update={"dataset": dataset, "prompt": "{{ prompt / 2 }}"})
    with pytest.raises(FoLoRAError):
        prepare_task(task, tiny_base, tmp_path / "out")


def test_bos_comes_first_whatever_the_tokenizer_does(tiny: Path, tiny_params: Params, tmp_path: Path) -> None:
    """The prompt starts with BOS as in the proxy text and in the evaluation (GPT-2's tokenizer adds none)."""
    foundation = tiny / "foundation"
    content = json.loads((foundation / "tokenizer.json").read_text()) | {"post_processor": None}
    (foundation / "tokenizer.json").write_text(json.dumps(content))
    write_json(foundation / "manifest.json", read_json(foundation / "manifest.json") | digests(foundation))
    base = open_base(foundation)
    task = tiny_params.tasks["subtraction"].model_copy(update={"dataset": str(tiny / "world" / "subtraction")})
    prepare_task(task, base, tmp_path / "out")
    assert {ids[0] for ids in read_table(tmp_path / "out")[0]["input_ids"].to_pylist()} == {
        base.load_tokenizer().bos_token_id
    }


# proxy
def test_unknown_source_is_refused(pipeline: Pipeline, save_params: SaveParams, refused: Refused) -> None:
    options = ("--foundation", pipeline.foundation, "--threads", 1, "--params", save_params(pipeline.values()))
    assert (
        refused("proxy", "smapled", 0, *options) == "proxy.sources: 'smapled' is not in params.yaml; there are sampled"
    )


# covariance
def test_empty_rows_are_named(pipeline: Pipeline, tmp_path: Path) -> None:
    from folora.covariance import compute_covariance

    table, manifest = read_table(pipeline.proxy / "0.parquet")
    write_table(tmp_path / "rows", table.slice(0, 0), manifest)
    with pytest.raises(FoLoRAError, match="rows: holds no rows"):
        compute_covariance(pipeline.params, pipeline.base, tmp_path / "rows", tmp_path / "out")


# spectrum
def test_the_same_shard_twice_is_refused(
    pipeline: Pipeline, save_params: SaveParams, tmp_path: Path, refused: Refused
) -> None:
    copy = pipeline.copy(tmp_path / "copy")
    shutil.copy(copy.proxy_moments / "0.safetensors", copy.proxy_moments / "1.safetensors")
    moments = ("--proxy-moments", copy.proxy_moments, "--task-moments", copy.task_moments, "--threads", 1)
    options = ("--foundation", copy.foundation, *moments, "--params", save_params(copy.values()))
    assert "made with shard 0" in refused("spectrum", "subtraction", "sampled", 0, *options)


# train
@pytest.mark.parametrize("missing", ["task", "heldout", "spectra", "proxy"])
def test_missing_input_is_one_line(
    missing: str, pipeline: Pipeline, save_params: SaveParams, tmp_path: Path, refused: Refused
) -> None:
    paths = {name: getattr(pipeline, name) for name in ("task", "heldout", "spectra", "proxy")}
    paths[missing] = tmp_path / "nowhere"
    files = ("--task-rows", paths["task"], "--heldout", paths["heldout"], "--spectrum", paths["spectra"])
    options = (*files, "--proxy", paths["proxy"], "--threads", 1, "--params", save_params(pipeline.values()))
    line = refused("train", LORA, "--foundation", pipeline.foundation, *options)
    assert line.startswith(f"{tmp_path / 'nowhere'}")
    assert "not found" in line


def test_a_shard_is_no_heldout_text(pipeline: Pipeline, in_tmp: Path) -> None:
    inputs = TrainInputs(pipeline.task, pipeline.proxy, pipeline.proxy / "0.parquet", pipeline.spectra)
    with pytest.raises(FoLoRAError, match="made with shard 0, but heldout is expected"):
        train_run(pipeline.params, LORA, pipeline.base, inputs, in_tmp / "run")
    with pytest.raises(FoLoRAError, match="made with shard 0, but heldout is expected"):
        Evaluator(pipeline.params, pipeline.base, pipeline.world, pipeline.proxy / "0.parquet")


# evaluate
def measure(pipeline: Pipeline, runs: Path, output: Path, params: Params | None = None) -> None:
    arguments = (pipeline.base, pipeline.world, pipeline.heldout, runs, output)
    evaluate_method(params or pipeline.params, "lora", *arguments)


@pytest.mark.parametrize("damage", ["truncated", "no checkpoints", "empty checkpoints"])
def test_damaged_run_is_named(damage: str, pipeline: Pipeline, runs: Path, in_tmp: Path) -> None:
    shutil.copytree(runs / "lora", in_tmp / "runs")
    checkpoints = in_tmp / "runs" / LORA / "checkpoints"
    if damage == "truncated":
        path = checkpoints / "6" / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-9])
    else:
        shutil.rmtree(checkpoints)
        if damage == "empty checkpoints":
            checkpoints.mkdir()
    with pytest.raises(FoLoRAError, match=LORA):
        measure(pipeline, in_tmp / "runs", in_tmp / "out")


def test_run_of_other_parameters_is_refused(pipeline: Pipeline, runs: Path, in_tmp: Path) -> None:
    values = pipeline.values()
    values["runs"][LORA]["learning_rate"] = 0.5
    with pytest.raises(FoLoRAError, match=LORA):
        measure(pipeline, runs / "lora", in_tmp / "out", Params.model_validate(values))


# report
def test_base_without_an_adaptation_is_named(pipeline: Pipeline, evaluations: Path, tmp_path: Path) -> None:
    shutil.copytree(evaluations, tmp_path / "evaluation")
    values: dict[str, Any] = pipeline.values()
    values["tasks"]["other"] = values["tasks"]["subtraction"]
    values["runs"]["other"] = values["runs"][LORA] | {"task": "other"}
    path = tmp_path / "evaluation" / "lora" / "metrics.parquet"
    rows = read_table(path)[0].to_pylist()
    rows += [row | {"run": "other", "adaptation": "other"} for row in rows]
    write_table(path, pa.Table.from_pylist(rows), {"artefact": "metrics"})
    with pytest.raises(FoLoRAError, match="other"):
        write_report(Params.model_validate(values), tmp_path / "evaluation", tmp_path / "report")


def test_results_of_other_kept_tasks_are_named(pipeline: Pipeline, evaluations: Path, tmp_path: Path) -> None:
    evaluation = pipeline.params.evaluation.model_copy(update={"kept": ["home", "spelled"]})
    params = pipeline.params.model_copy(update={"evaluation": evaluation})
    with pytest.raises(FoLoRAError, match="spelled"):
        write_report(params, evaluations, tmp_path / "report")


# params
def test_bad_target_modules_are_named_by_their_key(tiny_values: dict[str, Any]) -> None:
    from pydantic import ValidationError

    from folora.errors import describe

    values = tiny_values | {"adapter": tiny_values["adapter"] | {"target_modules": "q_proj"}}
    with pytest.raises(ValidationError) as error:
        Params.model_validate(values)
    assert describe(error.value).startswith("adapter.target_modules: ")
