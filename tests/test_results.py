"""``folora compare`` and ``folora pick``, which read what the evaluations found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
import torch
from typer.testing import CliRunner

from folora.cli import app
from folora.commands.compare import compare_runs
from folora.commands.export import Places, export_run
from folora.commands.pick import Choice, pick_run, usage
from folora.commands.results import base_record, final_record
from folora.errors import FoLoRAError
from folora.foundation import LOADING
from folora.storage import read_json, read_table, write_json, write_table

if TYPE_CHECKING:
    from conftest import Pipeline, SaveParams

LORA, REPLAY = "lora-3e-3-s0", "folora-replay-1e-2-s0"
BASE = {"kept": 0.8}
FINAL = {
    LORA: {"validation": 0.9, "target": 0.85, "kept": 0.6, "kl": 0.5},
    REPLAY: {"validation": 0.7, "target": 0.75, "kept": 0.78, "kl": 0.25},
}


@pytest.fixture
def results(evaluations: Path, tmp_path: Path) -> Path:
    """The evaluations, with other figures at the last checkpoints; at earlier ones everything is right."""
    folder = shutil.copytree(evaluations, tmp_path / "evaluation")
    for path in folder.glob("*/metrics.parquet"):
        table, about = read_table(path)
        rows = table.to_pylist()
        for row in rows[:-1]:
            row.update(validation=1.0, target=1.0, kept=1.0)
        rows[-1].update(FINAL.get(rows[-1]["run"], BASE))
        write_table(path, pa.Table.from_pylist(rows), about)
    return folder


def test_the_last_checkpoint_counts(pipeline: Pipeline, runs: Path, results: Path) -> None:
    assert final_record(pipeline.params, LORA, runs, results).items() >= {"step": 6, **FINAL[LORA]}.items()
    assert base_record("subtraction", results)["kept"] == 0.8


def test_what_is_not_there_is_named(pipeline: Pipeline, runs: Path, results: Path) -> None:
    with pytest.raises(FoLoRAError, match=rf"^runs: 'nope' is not in params.yaml; there are {LORA}, {REPLAY}$"):
        final_record(pipeline.params, "nope", runs, results)
    with pytest.raises(FoLoRAError, match=r"base/metrics\.parquet: no result of spelled: dvc repro evaluate-base$"):
        base_record("spelled", results)
    shutil.rmtree(results / "lora")
    with pytest.raises(FoLoRAError, match=r"lora/metrics\.parquet: not found"):
        final_record(pipeline.params, LORA, runs, results)


def test_figures_of_another_training_are_refused(pipeline: Pipeline, runs: Path, results: Path, tmp_path: Path) -> None:
    """A run was trained again, and not evaluated since."""
    again = shutil.copytree(runs, tmp_path / "again")
    manifest = again / "lora" / LORA / "manifest.json"
    write_json(manifest, read_json(manifest) | {"model": "another"})
    stale = rf"lora/metrics\.parquet: no result of {LORA} as it is trained now: dvc repro evaluate@lora$"
    places = Places(again, results, pipeline.foundation, pipeline.heldout, pipeline.task.parent)
    for use in (
        lambda: compare_runs(pipeline.params, REPLAY, LORA, again, results),
        lambda: pick_run(pipeline.params, "subtraction", 0.0, again, results),
        lambda: export_run(pipeline.params, LORA, places, tmp_path / "out", merge=False),
    ):
        with pytest.raises(FoLoRAError, match=stale):
            use()
    assert final_record(pipeline.params, REPLAY, again, results)["kept"] == FINAL[REPLAY]["kept"]
    shutil.rmtree(manifest.parent)
    with pytest.raises(FoLoRAError, match=rf"{LORA}/manifest\.json: not found: run the stage that makes it"):
        final_record(pipeline.params, LORA, again, results)


# compare
def test_runs_side_by_side(pipeline: Pipeline, runs: Path, results: Path) -> None:
    pair = compare_runs(pipeline.params, LORA, REPLAY, runs, results)
    assert pair.parameters["run.learning_rate"] == (0.003, 0.01)
    assert pair.parameters["method.replay"] == (0, 4)
    assert pair.parameters["method.gate"] == (None, "soft")
    assert not {"run.task", "run.seed", "adapter.rank"} & pair.parameters.keys()
    assert pair.figures["target"] == (0.85, 0.75)
    assert {f"kept/{name}" for name in pipeline.params.evaluation.kept} <= pair.figures.keys()
    rows = {row[0]: row[1:] for row in pair.rows()}
    assert rows["target"] == ["0.85", "0.75", "-0.1"]
    assert rows["kl"] == ["0.5", "0.25", "-0.25"]
    assert rows["method.gate"] == ["–", "soft", ""]


def test_compare_as_json(pipeline: Pipeline, runs: Path, results: Path, save_params: SaveParams) -> None:
    options = ["--runs", str(runs), "--evaluations", str(results), "--params", str(save_params(pipeline.values()))]
    done = CliRunner().invoke(app, ["compare", LORA, REPLAY, "--json", *options])
    said = json.loads(done.stdout)
    assert said["runs"] == [LORA, REPLAY]
    assert said["figures"]["kept"] == pytest.approx([0.6, 0.78, 0.18])
    assert said["parameters"]["run.learning_rate"] == [0.003, 0.01]
    shown = CliRunner().invoke(app, ["compare", LORA, REPLAY, *options])
    assert shown.exit_code == 0
    assert "+0.18" in shown.stdout


# pick
@pytest.mark.parametrize(("keep", "chosen"), [(0.95, REPLAY), (0.7, LORA), (0.0, LORA)])
def test_the_best_of_those_that_kept_enough(
    keep: float, chosen: str, pipeline: Pipeline, runs: Path, results: Path
) -> None:
    choice = pick_run(pipeline.params, "subtraction", keep, runs, results)
    assert choice.run == chosen
    assert choice.kept_share == pytest.approx(FINAL[chosen]["kept"] / 0.8)
    assert Path(choice.adapter) == runs / pipeline.params.runs[chosen].method / chosen / "adapter"


def test_none_kept_enough(pipeline: Pipeline, runs: Path, results: Path) -> None:
    with pytest.raises(
        FoLoRAError, match=rf"no run on subtraction kept 0\.99 .* the most is 0\.97, by {REPLAY}: lower --keep"
    ):
        pick_run(pipeline.params, "subtraction", 0.99, runs, results)


def adapted_logits(code: str, ids: torch.Tensor) -> torch.Tensor:
    names: dict[str, Any] = {}
    exec(code, names)
    with torch.no_grad():
        return names["model"].eval()(input_ids=ids).logits


@pytest.mark.parametrize("run", [LORA, REPLAY])
def test_the_code_loads_the_adapter(run: str, pipeline: Pipeline, runs: Path, results: Path) -> None:
    from peft import PeftModel

    choice = pick_run(pipeline.params, "subtraction", 0.0 if run == LORA else 0.95, runs, results)
    how = usage(choice, pipeline.foundation)
    ids = torch.arange(3, 13)[None]
    own = PeftModel.from_pretrained(pipeline.base.load_model(), choice.adapter)
    with torch.no_grad():
        torch.testing.assert_close(adapted_logits(how.load, ids), own(input_ids=ids).logits, rtol=0, atol=1e-5)
    assert how.serve == (
        f"vllm serve {pipeline.foundation} --enable-lora --max-lora-rank 8 --lora-modules {run}={choice.adapter}"
    )


def test_what_vllm_cannot_serve_as_an_adapter(pipeline: Pipeline, runs: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(runs / "lora" / LORA / "adapter", tmp_path / "adapter")
    choice = Choice("mine", "subtraction", 1.0, 1.0, 1.0, 1.0, 0.1, str(adapter))
    config = read_json(adapter / "adapter_config.json")
    for rank, served in ((9, 16), (300, 320), (512, 512)):
        write_json(adapter / "adapter_config.json", config | {"r": rank})
        assert f"--max-lora-rank {served} " in usage(choice, pipeline.foundation).serve
    for refused in ({"use_dora": True}, {"r": 513}):
        write_json(adapter / "adapter_config.json", config | refused)
        merged = usage(choice, pipeline.foundation)
        assert "merge_and_unload" in merged.load
        assert merged.serve.endswith(f"vllm serve mine --tokenizer {pipeline.foundation}")
    (adapter / "adapter_config.json").unlink()
    assert "load_checkpoint" in usage(choice, pipeline.foundation).load


@pytest.mark.parametrize("code", [False, True])
def test_a_pretrained_base_is_named_by_its_source(code: bool, runs: Path, tmp_path: Path) -> None:
    loading = LOADING.model_dump() | {"trust_remote_code": code}
    manifest = {"model": "", "tokenizer": "", "loading": loading, "source": "org/model", "commit": None}
    write_json(tmp_path / "manifest.json", manifest)
    choice = Choice("mine", "subtraction", 1.0, 1.0, 1.0, 1.0, 0.1, str(runs / "lora" / LORA / "adapter"))
    how = usage(choice, tmp_path)
    assert f"from_pretrained('org/model'{', trust_remote_code=True' if code else ''})" in how.load
    assert how.serve.startswith(f"vllm serve org/model {'--trust-remote-code ' if code else ''}--enable-lora")


def test_pick_as_text_and_json(pipeline: Pipeline, runs: Path, results: Path, save_params: SaveParams) -> None:
    options = ["--runs", str(runs), "--evaluations", str(results), "--foundation", str(pipeline.foundation)]
    options += ["--params", str(save_params(pipeline.values()))]
    (said,) = json.loads(CliRunner().invoke(app, ["pick", "--json", *options]).stdout)
    assert said["run"] == REPLAY
    assert {"adapter", "load", "serve", "target", "kept", "kl"} <= said.keys()
    text = CliRunner().invoke(app, ["pick", "--task", "subtraction", *options]).stdout
    assert f"subtraction: {REPLAY}, in {said['adapter']}" in text
    assert "target 0.750, kept 0.780 (98% of the base's), KL 0.250" in text
    assert f"    {said['serve']}" in text.splitlines()
