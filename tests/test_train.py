from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
import torch

import folora.train
from folora.base import digests
from folora.errors import FoLoRAError
from folora.objective import Objective
from folora.params import Params
from folora.recorder import Recorder
from folora.schedule import batch_rows
from folora.storage import read_json, read_table
from folora.train import Training, TrainInputs, train_run

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Pipeline, Refused, SaveParams

pytestmark = pytest.mark.usefixtures("in_tmp")

LORA, REPLAY = "lora-3e-3-s0", "folora-replay-1e-2-s0"


def inputs_of(pipeline: Pipeline) -> TrainInputs:
    return TrainInputs(pipeline.task, pipeline.proxy, pipeline.heldout, pipeline.spectra)


def train(pipeline: Pipeline, name: str, output: Path, **values: Any) -> Path:
    params = Params.model_validate(pipeline.values() | values)
    train_run(params, name, pipeline.base, inputs_of(pipeline), output)
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Spy:
    """Stands in for ``Training.fit``: keeps the model and every batch it is trained on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []
        original = Training.fit

        def fit(training: Training, *arguments: Any) -> None:
            self.model = training.adapted.model
            original(training, *arguments)

        monkeypatch.setattr(Training, "fit", fit)
        collate = folora.train.DataCollatorForSeq2Seq.__call__

        def keep(collator: Any, *arguments: Any, **options: Any) -> Any:
            self.batches.append(collate(collator, *arguments, **options))
            return self.batches[-1]

        monkeypatch.setattr(folora.train.DataCollatorForSeq2Seq, "__call__", keep)


@pytest.mark.parametrize("name", [LORA, REPLAY])
def test_twice_gives_equal_bytes(name: str, pipeline: Pipeline, runs: Path, tmp_path: Path) -> None:
    method = pipeline.params.runs[name].method
    assert contents(train(pipeline, name, tmp_path / "again")) == contents(runs / method / name)


def test_another_learning_rate_differs(pipeline: Pipeline, runs: Path, tmp_path: Path) -> None:
    values = pipeline.values()["runs"]
    values[LORA]["learning_rate"] = 0.004
    other = contents(train(pipeline, LORA, tmp_path / "other", runs=values))
    same = {name for name, content in contents(runs / "lora" / LORA).items() if other[name] == content}
    configs = {f"{folder}/adapter_config.json" for folder in ("adapter", "checkpoints/3", "checkpoints/6")}
    assert same == configs | {"coverage.json"}


@pytest.mark.slow
def test_bytes_do_not_depend_on_the_hash_seed(
    pipeline: Pipeline, runs: Path, save_params: SaveParams, tmp_path: Path
) -> None:
    files = {"task-rows": pipeline.task, "heldout": pipeline.heldout, "spectrum": pipeline.spectra}
    options = files | {"proxy": pipeline.proxy, "foundation": pipeline.foundation, "threads": 1}
    options |= {"params": save_params(pipeline.values())}
    arguments = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = ["folora", "train", REPLAY, *arguments, "--output", seed]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(runs / "folora-replay" / REPLAY)


@pytest.mark.parametrize("name", [LORA, REPLAY])
def test_saved_adapter_is_the_trained_model(
    name: str, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    spy = Spy(monkeypatch)
    run = train(pipeline, name, tmp_path / "run")
    base, ids = pipeline.base.load_model(), spy.batches[0]["input_ids"]
    weights = {key: value.clone() for key, value in base.state_dict().items()}
    with torch.no_grad():
        untrained, trained = base(input_ids=ids).logits, spy.model.eval()(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(base, run / "adapter").eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, trained, rtol=0, atol=1e-6)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, trained, rtol=0, atol=1e-5)
    assert (trained - untrained).abs().max() > 1e-3
    # training changed nothing but the adapter
    frozen = spy.model.unload().state_dict()
    assert frozen.keys() == weights.keys()
    assert all(torch.equal(frozen[key], weights[key]) for key in weights)
    assert digests(pipeline.foundation)["model"] == pipeline.base.identity["model"]


def test_adapter_config_is_peft_s(pipeline: Pipeline, runs: Path) -> None:
    config = read_json(runs / "lora" / LORA / "adapter" / "adapter_config.json")
    adapter = pipeline.params.adapter
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert (config["r"], config["lora_alpha"]) == (adapter.rank, adapter.alpha)
    assert config["base_model_name_or_path"] == str(pipeline.foundation)
    assert config["target_modules"] == sorted(config["target_modules"])
    assert len(config["target_modules"]) == 7 * pipeline.params.foundation.layers  # type: ignore[union-attr]


def test_checkpoints_end_in_the_adapter(runs: Path) -> None:
    checkpoints = runs / "lora" / LORA / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["3", "6"]
    adapter = contents(runs / "lora" / LORA / "adapter")
    assert contents(checkpoints / "6") == adapter
    assert contents(checkpoints / "3") != adapter


def test_batches_follow_the_schedule(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    train(pipeline, REPLAY, tmp_path / "run")
    task = read_table(pipeline.task)[0].to_pylist()
    proxy = [ids for i in (0, 1) for ids in read_table(pipeline.proxy / f"{i}.parquet")[0]["token_ids"].to_pylist()]
    settings = pipeline.params.train
    sizes = {"task_rows": len(task), "batch_size": settings.batch_size, "proxy_rows": len(proxy), "replay": 4}
    order = batch_rows(seed=0, steps=settings.steps, **sizes)
    size = settings.batch_size + 4
    assert len(spy.batches) == settings.steps
    replayed = 0
    for step, batch in enumerate(spy.batches):
        assert len(batch["input_ids"]) == size
        for row, number in enumerate(order[step * size : (step + 1) * size]):
            if number < len(task):
                ids, counts = task[number]["input_ids"], task[number]["loss_mask"]
            else:
                ids, replayed = proxy[number - len(task)], replayed + 1
                counts = [False] + [True] * (len(ids) - 1)
            real = batch["attention_mask"][row].bool()
            assert batch["input_ids"][row][real].tolist() == ids
            labels = [i if learned else -100 for i, learned in zip(ids, counts, strict=True)]
            assert batch["labels"][row][: len(ids)].tolist() == labels
            assert (batch["labels"][row][len(ids) :] == -100).all()
    assert replayed == 4 * settings.steps


def test_replay_may_be_matched_in_tokens(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    values = pipeline.values()
    values["methods"]["lora"] = {"kind": "lora", "replay": 16, "replay_match": "tokens"}
    train(pipeline, LORA, tmp_path / "run", **values)
    assert 1 <= len(spy.batches) < pipeline.params.train.steps
    matched = sum(int(batch["attention_mask"].sum()) for batch in spy.batches)
    values["methods"]["lora"] = {"kind": "lora"}
    spy.batches.clear()
    train(pipeline, LORA, tmp_path / "alone", **values)
    alone = sum(int(batch["attention_mask"].sum()) for batch in spy.batches)
    assert len(spy.batches) == pipeline.params.train.steps
    assert matched == pytest.approx(alone, rel=0.3)


@pytest.mark.parametrize(("setting", "passes"), [({"micro_batch": 5}, 3), ({"gradient_checkpointing": True}, 2)])
def test_less_memory_gives_the_same_run(
    setting: dict[str, Any],
    passes: int,
    pipeline: Pipeline,
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eight rows of the task and four of proxy text a step: in parts of 5, 5 and 2, or with activations made twice."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls = []
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda *a: calls.append(torch.is_grad_enabled()) or forward(*a))
    run = train(pipeline, REPLAY, tmp_path / "run", train=pipeline.values()["train"] | setting)
    layers = pipeline.params.foundation.layers  # type: ignore[union-attr]
    assert sum(calls) == passes * pipeline.params.train.steps * layers
    folders = (run, runs / "folora-replay" / REPLAY)
    for found, expected in zip(*(read_table(f / "history.parquet")[0].to_pylist() for f in folders), strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("limit", [None, 1e-12])
def test_a_notable_rounding_of_the_weights_is_printed_and_kept(
    limit: float | None,
    pipeline: Pipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In float32 there is none, and its histories hold nothing of it."""
    if limit:
        monkeypatch.setattr("folora.train.NOTABLE_ROUNDING", limit)
    methods = pipeline.values()["methods"] | {"lora": {"kind": "pissa"}}
    run = train(pipeline, LORA, tmp_path / "run", methods=methods)
    about = read_table(run / "history.parquet")[1]
    assert ("rounded to float32" in capsys.readouterr().out) is (limit is not None)
    assert ("rounding" in about) is (limit is not None)
    assert about.get("rounding", 1e-8) < 1e-6


def test_a_training_that_diverges_stops(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Objective.parts
    monkeypatch.setattr(Objective, "parts", lambda *given: (torch.nan * part for part in parts(*given)))
    with pytest.raises(FoLoRAError, match=r"the training diverged, at step 1 the loss is nan: lower the run's"):
        train(pipeline, LORA, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_last_step_is_in_the_history(pipeline: Pipeline, tmp_path: Path) -> None:
    run = train(pipeline, LORA, tmp_path / "run", train=pipeline.values()["train"] | {"steps": 5})
    assert read_table(run / "history.parquet")[0]["step"].to_pylist() == [1, 3, 5]


def test_history_holds_the_meter(runs: Path) -> None:
    for run in (runs / "lora" / LORA, runs / "folora-replay" / REPLAY):
        table, _ = read_table(run / "history.parquet", artefact="history", run=run.name)
        columns = {"step", "loss", "learning_rate", "grad_norm", "penalty", "utility", "kl"}
        assert set(table.column_names) == columns
        rows = table.to_pylist()
        assert [row["step"] for row in rows] == [1, 3, 6]
        assert all(0 < row["kl"] < 1 and row["penalty"] > 0 and row["utility"] > 0 for row in rows)
        assert rows[1]["kl"] > rows[0]["kl"]
        assert rows[2]["learning_rate"] < rows[1]["learning_rate"] < rows[0]["learning_rate"] <= 1e-2


def test_manifest_names_what_the_run_is_made_of(pipeline: Pipeline, runs: Path, tmp_path: Path) -> None:
    manifest = read_json(runs / "lora" / LORA / "manifest.json")
    assert manifest["artefact"] == "run"
    assert manifest["params"]["run"] == pipeline.params.runs[LORA].model_dump()
    assert len(manifest["inputs"]["proxy"]) == 2
    copy = pipeline.copy(tmp_path / "copy")
    table = pq.read_table(copy.heldout)
    pq.write_table(table, copy.heldout, compression="none")
    changed = folora.train.run_manifest(pipeline.params, LORA, copy.base, inputs_of(copy))
    assert {key for key in manifest["inputs"] if changed["inputs"][key] != manifest["inputs"][key]} == {"heldout"}


@pytest.mark.parametrize(
    "damaged",
    [
        "spectrum/subtraction/sampled/0.safetensors",
        "task/subtraction.parquet",
        "proxy/sampled/1.parquet",
        "heldout.parquet",
    ],
)
def test_truncated_input_is_one_line(
    damaged: str, pipeline: Pipeline, save_params: SaveParams, tmp_path: Path, refused: Refused
) -> None:
    copy = pipeline.copy(tmp_path / "copy")
    path = copy.folder / damaged
    path.write_bytes(path.read_bytes()[:-40])
    files = ("--task-rows", copy.task, "--heldout", copy.heldout, "--spectrum", copy.spectra, "--proxy", copy.proxy)
    options = (*files, "--threads", 1, "--params", save_params(copy.values()))
    line = refused("train", LORA, "--foundation", copy.foundation, *options)
    assert line.startswith(f"{path}: damaged or truncated")


def test_inputs_of_other_parameters_are_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    values = pipeline.values()
    with pytest.raises(FoLoRAError, match=r"proxy/sampled/0\.parquet: made with proxy "):
        train(
            pipeline,
            LORA,
            tmp_path / "run",
            proxy=values["proxy"] | {"sources": {"sampled": {"kind": "sampled", "temperature": 0.5}}},
        )
    task = values["tasks"]["subtraction"] | {"max_length": 31}
    with pytest.raises(FoLoRAError, match=r"task/subtraction\.parquet: made with task "):
        train(pipeline, LORA, tmp_path / "run", tasks={"subtraction": task})
    assert not list(tmp_path.glob("*run*"))


@pytest.mark.parametrize("kind", ["lora", "pissa", "full", "folora"])
def test_a_first_step_that_moved_nothing_is_an_error(
    kind: str, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = pipeline.values()
    values["methods"]["lora"] = {"kind": kind}
    values["runs"][LORA]["learning_rate"] = 1e-60  # too small for a float32
    begun: list[int] = []
    monkeypatch.setattr(Recorder, "on_step_begin", lambda *arguments, **_: begun.append(arguments[2].global_step))
    with pytest.raises(FoLoRAError, match="the first step changed no weight"):
        train(pipeline, LORA, tmp_path / "out" / "run", **values)
    assert begun == [0]
    assert not list((tmp_path / "out").iterdir())


def test_full_disk_leaves_no_half_run(pipeline: Pipeline, small_disk: Path) -> None:
    (small_disk / "other").write_bytes(bytes(24 * 1024))  # room for one checkpoint, not for two
    with pytest.raises(FoLoRAError, match=rf"{LORA}: cannot be written .*free space"):
        train(pipeline, LORA, small_disk / LORA)
    assert [path.name for path in small_disk.iterdir()] == ["other"]
