"""What is handed on: adapters and merged models, each with a card that says what it learned and kept."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from folora.cli import app
from folora.commands.export import Places, export_run, model_card, push_folder
from folora.errors import FoLoRAError
from folora.evaluate import evaluate_method
from folora.params import Params
from folora.storage import FORMAT, read_json, read_table, write_json
from folora.train import TrainInputs, train_run

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Pipeline

LORA = "lora-3e-3-s0"
RUN = "folora-replay-1e-2-s0"
IDS = torch.tensor([[1, 8, 5, 9, 20]])


@pytest.fixture
def places(pipeline: Pipeline, runs: Path, evaluations: Path) -> Places:
    return Places(runs, evaluations, pipeline.foundation, pipeline.heldout, pipeline.task.parent)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_an_exported_adapter_is_the_run_s_with_a_card(
    places: Places, pipeline: Pipeline, runs: Path, evaluations: Path, tmp_path: Path
) -> None:
    assert export_run(pipeline.params, RUN, places, tmp_path / "out", merge=False) is None
    own = runs / "folora-replay" / RUN / "adapter"
    for path in own.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == str(pipeline.foundation)
    assert card.data.library_name == "peft"
    *_, metrics = read_table(evaluations / "folora-replay" / "metrics.parquet")[0].to_pylist()
    results = {result.dataset_name: result.metric_value for result in card.data.eval_results}
    assert results == {"target": metrics["target"], "kept": metrics["kept"]}
    assert {result.metric_type for result in card.data.eval_results} == {"score"}
    for line in (f"| kept/home | 0.000 | {metrics['kept/home']:.3f} |", "| `method.kind` | folora |"):
        assert line in card.text
    task = pipeline.params.tasks["subtraction"]
    assert f"Rows of `{task.dataset}`, by" in card.text
    assert f'\nprompt: "{task.prompt}"\nresponse: "{task.response}"\n```' in card.text
    assert card.data.datasets is None  # a file here is none of a hub
    assert read_json(tmp_path / "out" / "adapter_config.json")["modules_to_save"] is None
    PeftModel.from_pretrained(pipeline.base.load_model(), tmp_path / "out")


def test_a_card_names_a_hub_s_data_and_a_file_that_was_dequantised(
    pipeline: Pipeline, runs: Path, tmp_path: Path
) -> None:
    source = {"dataset": "openai/gsm8k", "config": "main", "split": "train", "revision": None}
    (tmp_path / "gsm8k").mkdir()
    manifest = {"format": FORMAT, "artefact": "download", "download": source, "commit": "c0ffee"}
    write_json(tmp_path / "gsm8k" / "manifest.json", manifest)
    changes = {"dataset": str(tmp_path / "gsm8k"), "prompt": "{{ a }}\n=", "response": ' "{{ b }}"', "rows": 400}
    task = pipeline.params.tasks["subtraction"].model_copy(update=changes)
    gguf = {"file": "model.Q4_1.gguf", "digest": ""}
    base = replace(pipeline.base, manifest=pipeline.base.manifest | {"gguf": gguf})
    figures = {"target": 0.5, "kept": 0.5, "kl": 0.5}
    run = read_json(runs / "folora-replay" / RUN / "manifest.json")
    card = ModelCard(model_card(run, task.model_dump(), base, figures, figures, "", None))
    assert card.data.datasets == ["openai/gsm8k"]
    assert "Rows of `openai/gsm8k`, configuration main, split train, commit c0ffee, by" in card.text
    assert '\nprompt: "{{ a }}\\n="\nresponse: " \\"{{ b }}\\""\nrows: 400\n```' in card.text
    assert f"`{base.folder}` (the GGUF file `model.Q4_1.gguf`, dequantised)" in card.text


def test_a_card_tells_of_no_other_rows_than_the_run_s(places: Places, pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "subtraction.parquet").write_bytes(pipeline.heldout.read_bytes())
    refusal = rf"subtraction\.parquet: not the rows that {RUN} was trained on: dvc repro train@{RUN}$"
    with pytest.raises(FoLoRAError, match=refusal):
        export_run(pipeline.params, RUN, replace(places, rows=tmp_path), tmp_path / "out", merge=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [[], ["--public"]])
def test_a_pushed_folder_is_private_unless_said(
    options: list[str], places: Places, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def create_repo(_: Any, repository: str, *, private: bool, exist_ok: bool) -> None:
        asked.append((repository, private, exist_ok))

    def upload_folder(_: Any, *, repo_id: str, folder_path: Path) -> str:
        asked.append((repo_id, sorted(path.name for path in folder_path.iterdir())))
        return f"https://hub/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create_repo)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    export_run(pipeline.params, RUN, places, tmp_path / "out", merge=False)
    said = CliRunner().invoke(app, ["push", str(tmp_path / "out"), "me/mine", *options])
    assert said.stdout == "https://hub/me/mine\n"
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(files)
    assert asked == [("me/mine", not options, True), ("me/mine", files)]


def test_a_merged_model_stands_by_itself(places: Places, pipeline: Pipeline, runs: Path, tmp_path: Path) -> None:
    difference = export_run(pipeline.params, RUN, places, tmp_path / "out", merge=True)
    assert difference is not None
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    adapted = PeftModel.from_pretrained(pipeline.base.load_model(), runs / "folora-replay" / RUN / "adapter")
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-4, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").bos_token_id == 1
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers"
    assert f"Merging changed no logit by more than {difference:.1e}" in card.text


def test_what_cannot_be_exported_is_named(places: Places, pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(FoLoRAError, match=r"runs: 'nobody' is not in params\.yaml"):
        export_run(pipeline.params, "nobody", places, tmp_path / "out", merge=False)
    with pytest.raises(FoLoRAError, match="holds no model card"):
        push_folder(tmp_path, "me/mine", private=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("in_tmp")
@pytest.mark.parametrize("kind", ["full", "osf"])
def test_changed_weights_are_exported_merged_alone(
    kind: str, places: Places, pipeline: Pipeline, tmp_path: Path
) -> None:
    values = pipeline.values()
    params = Params.model_validate(values | {"methods": values["methods"] | {"lora": {"kind": kind}}})
    inputs = TrainInputs(pipeline.task, pipeline.proxy, pipeline.heldout, pipeline.spectra)
    train_run(params, LORA, pipeline.base, inputs, tmp_path / "runs" / "lora" / LORA)
    own = replace(places, runs=tmp_path / "runs", evaluations=tmp_path / "evaluation")
    measured = (pipeline.base, pipeline.world, pipeline.heldout)
    evaluate_method(params, "lora", *measured, own.runs / "lora", own.evaluations / "lora")
    (own.evaluations / "base").symlink_to(places.evaluations / "base")
    with pytest.raises(FoLoRAError) as refused:
        export_run(params, LORA, own, tmp_path / "out", merge=False)
    assert str(refused.value) == f"{LORA}: changed whole weights, which no adapter holds: --merge writes the model"
    assert not (tmp_path / "out").exists()
    assert export_run(params, LORA, own, tmp_path / "out", merge=True) == 0


def test_no_folder_of_another_kind_is_replaced(places: Places, pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    with pytest.raises(FoLoRAError, match=r"mine: is there already, and no export: name a folder to make"):
        export_run(pipeline.params, RUN, places, tmp_path / "mine", merge=False)
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"
    for _ in range(2):  # an earlier export gives way
        export_run(pipeline.params, RUN, places, tmp_path / "out", merge=False)


def test_a_merge_that_changes_the_model_is_refused(
    places: Places, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(self: Any) -> Any:
        return self.unload()

    monkeypatch.setattr("peft.PeftModel.merge_and_unload", lose, raising=False)
    with pytest.raises(FoLoRAError, match="merging changes the logits by"):
        export_run(pipeline.params, RUN, places, tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()
