from __future__ import annotations

import json
import math
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from folora.adapter import WEIGHTS_FILE
from folora.divergence import HeldOutText
from folora.errors import FoLoRAError
from folora.evaluate import Evaluator, evaluate_base, evaluate_method, export_of, load_checkpoint
from folora.params import Params, Tracking
from folora.storage import digest_of_file, read_json, read_table, write_json, write_tensors
from folora.texts import figures
from folora.train import TrainInputs, train_run
from folora.world import LONGEST_ANSWER

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Pipeline, Refused, SaveParams

pytestmark = pytest.mark.usefixtures("in_tmp")

LORA, REPLAY = "lora-3e-3-s0", "folora-replay-1e-2-s0"


def rows(path: Path) -> list[dict[str, Any]]:
    return read_table(path)[0].to_pylist()


def greedy(pipeline: Pipeline, prompt: str, new_tokens: int) -> str:
    """What the base model answers, decoded by transformers' own loop, one prompt at a time."""
    tokenizer, model = pipeline.base.load_tokenizer(), pipeline.base.load_model()
    given = tokenizer(prompt, return_tensors="pt")["input_ids"]
    made = model.generate(given, max_new_tokens=new_tokens, do_sample=False, attention_mask=torch.ones_like(given))
    return tokenizer.decode(made[0, given.shape[1] :], skip_special_tokens=True)


def test_accuracy_is_that_of_an_independent_greedy_decode(pipeline: Pipeline, tmp_path: Path) -> None:
    """Half of the items ask for what the model answers, half for something else."""
    world = tmp_path / "world"
    shutil.copytree(pipeline.world, world)
    prompts = [json.loads(line)["prompt"] for line in (world / "addition" / "test.jsonl").read_text().splitlines()]
    decoded = [greedy(pipeline, prompt, LONGEST_ANSWER) for prompt in prompts]
    items = [
        {"prompt": p, "response": d + "?" * (i % 2)} for i, (p, d) in enumerate(zip(prompts, decoded, strict=True))
    ]
    (world / "addition" / "test.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    evaluator = Evaluator(pipeline.params, pipeline.base, world, pipeline.heldout)
    answers = evaluator.answers(["addition"])
    assert [answer["prompt"] for answer in answers] == prompts
    assert [answer["answer"] for answer in answers] == decoded
    assert [answer["score"] for answer in answers] == [float(i % 2 == 0) for i in range(len(items))]


def test_answers_have_one_row_an_item(pipeline: Pipeline, evaluations: Path) -> None:
    settings = pipeline.params.tasks["subtraction"]
    names = {settings.target, settings.validation, *pipeline.params.evaluation.kept}
    items = sorted((name, item) for name in names for item in range(pipeline.params.world.test_items))
    for folder, runs in (("base", {"base": [0]}), ("lora", {LORA: [3, 6]}), ("folora-replay", {REPLAY: [3, 6]})):
        answers = rows(evaluations / folder / "answers.parquet")
        for run, steps in runs.items():
            for step in steps:
                asked = [a for a in answers if (a["run"], a["step"]) == (run, step)]
                assert sorted((answer["task"], answer["item"]) for answer in asked) == items
        assert len(answers) == len(items) * sum(map(len, runs.values()))


def test_answers_are_checked_against_the_data(pipeline: Pipeline, evaluations: Path) -> None:
    data = (pipeline.world / "subtraction" / "validation.jsonl").read_text().splitlines()
    answers = [a for a in rows(evaluations / "base" / "answers.parquet") if a["task"] == "subtraction-validation"]
    assert [{"prompt": a["prompt"], "response": a["expected"]} for a in answers] == [json.loads(line) for line in data]
    assert all(a["score"] == (a["answer"] == a["expected"]) for a in answers)


def test_metrics_are_means_of_answers(pipeline: Pipeline, evaluations: Path) -> None:
    kept = pipeline.params.evaluation.kept
    for folder in ("base", "lora"):
        answers = rows(evaluations / folder / "answers.parquet")
        metrics = rows(evaluations / folder / "metrics.parquet")
        assert len(metrics) == (1 if folder == "base" else 2)
        for row in metrics:
            own = [answer for answer in answers if answer["step"] == row["step"]]
            share = {n: [a["score"] for a in own if a["task"] == n] for n in {a["task"] for a in own}}
            assert row["target"] == sum(share["subtraction"]) / len(share["subtraction"])
            assert row["validation"] == sum(share["subtraction-validation"]) / len(share["subtraction-validation"])
            assert row["kept"] == pytest.approx(sum(row[f"kept/{name}"] for name in kept) / len(kept))
    _, manifest = read_table(evaluations / "lora" / "answers.parquet")
    assert manifest["metrics"] == digest_of_file(evaluations / "lora" / "metrics.parquet")


def test_metrics_say_what_a_checkpoint_costs(pipeline: Pipeline, runs: Path, evaluations: Path) -> None:
    from safetensors.torch import load_file

    for row in rows(evaluations / "folora-replay" / "metrics.parquet"):
        path = runs / "folora-replay" / REPLAY / "checkpoints" / str(row["step"]) / "adapter_model.safetensors"
        assert row["trainable"] == sum(tensor.numel() for tensor in load_file(path).values())
        assert (row["export"], row["rank"]) == ("LoRA", pipeline.params.adapter.rank)
        assert row["bytes"] == path.stat().st_size


def test_changed_weights_have_no_rank(tmp_path: Path) -> None:
    write_tensors(tmp_path / "weights.safetensors", {"layer": torch.ones(4, 4)}, {"artefact": "weights"})
    size = (tmp_path / "weights.safetensors").stat().st_size
    assert export_of(tmp_path) == {"export": "weights", "rank": 0, "bytes": size}


def test_checkpoint_without_a_change_is_named(tmp_path: Path) -> None:
    with pytest.raises(FoLoRAError, match=r"adapter_config\.json: not found"):
        export_of(tmp_path)


def test_scores_tell_target_validation_and_kept_apart(pipeline: Pipeline) -> None:
    from folora.evaluate import scores

    kept = pipeline.params.evaluation.kept
    right = {"subtraction": 3, "subtraction-validation": 1, **dict.fromkeys(kept, 0), kept[0]: 2, kept[1]: 4}
    answers = [{"task": name, "score": float(i < n)} for name, n in right.items() for i in range(4)]
    found = scores(answers, pipeline.params.tasks["subtraction"], pipeline.params)
    assert (found["target"], found["validation"]) == (0.75, 0.25)
    assert (found[f"kept/{kept[0]}"], found[f"kept/{kept[1]}"], found[f"kept/{kept[2]}"]) == (0.5, 1.0, 0.0)
    assert found["kept"] == pytest.approx(1.5 / len(kept))


def test_each_checkpoint_is_measured_by_itself(pipeline: Pipeline, runs: Path, evaluations: Path) -> None:
    from peft import PeftModel

    ids = read_table(pipeline.heldout)[0]["token_ids"].to_pylist()
    for row in rows(evaluations / "folora-replay" / "metrics.parquet"):
        bare = pipeline.base.load_model()
        text = HeldOutText(bare, ids, 32, 0)
        checkpoint = runs / "folora-replay" / REPLAY / "checkpoints" / str(row["step"])
        measured = text.measure(PeftModel.from_pretrained(bare, checkpoint).eval())
        assert row["kl"] == pytest.approx(measured.kl, rel=1e-3)
        assert row["perplexity"] == pytest.approx(measured.perplexity, rel=1e-5)
        assert row["kl"] > 0
    (base,) = rows(evaluations / "base" / "metrics.parquet")
    assert base["kl"] == 0


def test_loading_replaces_the_whole_adapter(pipeline: Pipeline, runs: Path) -> None:
    checkpoints = [runs / "folora-replay" / REPLAY / "checkpoints" / step for step in ("3", "6")]
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        fresh = [load_checkpoint(pipeline.base.load_model(), path)(input_ids=ids).logits for path in checkpoints]
        model = load_checkpoint(pipeline.base.load_model(), checkpoints[0])
        for number in (1, 0, 1):
            model = load_checkpoint(model, checkpoints[number])
            assert torch.equal(model(input_ids=ids).logits, fresh[number])
    assert not torch.equal(*fresh)


def test_adapter_that_changes_nothing_is_an_error(pipeline: Pipeline, runs: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(runs / "lora", tmp_path / "runs")
    path = tmp_path / "runs" / LORA / "checkpoints" / "6" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: value * ("lora_B" not in name) for name, value in tensors.items()}, path)
    with pytest.raises(FoLoRAError, match=r"checkpoints/6: the adapter changes nothing"):
        evaluate_method(
            pipeline.params,
            "lora",
            pipeline.base,
            pipeline.world,
            pipeline.heldout,
            tmp_path / "runs",
            tmp_path / "out" / "lora",
        )
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("model", "0", "made with model 0, but "),
        ("run", "other", "made with run other, but "),
        (None, None, "not found"),
    ],
)
def test_bad_run_is_one_line(
    field: str | None,
    value: str | None,
    expected: str,
    pipeline: Pipeline,
    runs: Path,
    save_params: SaveParams,
    tmp_path: Path,
    refused: Refused,
) -> None:
    shutil.copytree(runs / "lora", tmp_path / "runs")
    manifest = tmp_path / "runs" / LORA / "manifest.json"
    if field:
        write_json(manifest, read_json(manifest) | {field: value})
    else:
        manifest.unlink()
    files = ("--tasks", pipeline.world, "--heldout", pipeline.heldout, "--runs", tmp_path / "runs")
    arguments = ("lora", "--foundation", pipeline.foundation, *files, "--threads", 1)
    line = refused("evaluate", *arguments, "--params", save_params(pipeline.values()))
    assert line.startswith(str(tmp_path / "runs" / LORA))
    assert expected in line


def test_a_base_with_too_many_predictions_is_measured_too(
    pipeline: Pipeline, evaluations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("folora.divergence.KEPT_BYTES", 0)
    found = figures(Evaluator(pipeline.params, pipeline.base, pipeline.world, pipeline.heldout).base_drift())
    (row,) = rows(evaluations / "base" / "metrics.parquet")
    assert found == {"kl": 0, "perplexity": pytest.approx(row["perplexity"])}


def test_changed_weights_are_measured_where_the_base_is_computed_again(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.down_proj"
    for step in (1, 2):
        weight = pipeline.base.load_model().get_submodule(name).weight.detach() * (1 + step)
        write_tensors(tmp_path / str(step) / WEIGHTS_FILE, {name: weight}, {"artefact": "weights"})

    def measured() -> list[dict[str, float]]:
        evaluator = Evaluator(pipeline.params, pipeline.base, pipeline.world, pipeline.heldout)
        found = []
        for step in (1, 2):
            evaluator.load(tmp_path / str(step))
            found.append(figures(evaluator.drift()))
        return found

    kept = measured()
    monkeypatch.setattr("folora.divergence.KEPT_BYTES", 0)
    assert measured() == kept
    assert 0 < kept[0]["kl"] < kept[1]["kl"]


def test_heldout_text_of_another_model_is_refused(pipeline: Pipeline) -> None:
    with pytest.raises(FoLoRAError, match=r"subtraction\.parquet: made with artefact task, but proxy is expected"):
        Evaluator(pipeline.params, pipeline.base, pipeline.world, pipeline.task)


@pytest.fixture
def further(pipeline: Pipeline, store: Tracking, tmp_path: Path) -> tuple[Params, Path]:
    """The pipeline's parameters with a second rate of LoRA, a task asked at the best rate only, and a foreign text."""
    world = tmp_path / "world"
    shutil.copytree(pipeline.world, world)
    shutil.copy(world / "evaluation" / "home.yaml", world / "evaluation" / "again.yaml")
    text = (world / "evaluation" / "again.yaml").read_text().replace("task: home", "task: again")
    (world / "evaluation" / "again.yaml").write_text(text)
    (world / "foreign.jsonl").write_text(
        "".join(json.dumps({"words": word}) + "\n" for word in ("ab cd", "x", "1+2>3"))
    )
    values = pipeline.values()
    values["runs"]["lora-1e-2-s0"] = values["runs"][LORA] | {"learning_rate": 1e-2}
    values["tracking"] = store.model_dump()  # the pipeline's own keeps what the fixtures trained and measured
    values["evaluation"] |= {
        "at_best": ["again"],
        "texts": {"foreign": {"dataset": "foreign.jsonl", "text": "{{ words }}", "rows": 2, "max_length": 4}},
    }
    return Params.model_validate(values), world


@pytest.mark.usefixtures("sandbox")
def test_code_that_the_model_writes_is_run_and_recorded(
    pipeline: Pipeline, runs: Path, store: Tracking, tmp_path: Path
) -> None:
    """In the form of HumanEval: the model's words stay a comment, so one function is right and the other wrong."""
    world, output = tmp_path / "world", tmp_path / "evaluation"
    shutil.copytree(pipeline.world, world)
    test = {"test": "def check(f):\n    assert f(1) == 2", "entry_point": "f"}
    problems = [{"prompt": f"def f(x):\n    return x + {n}\n# ", **test} for n in (1, 2)]
    (world / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    task = {
        "include": "humaneval",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "problems.jsonl"}},
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3, "do_sample": False},
    }
    write_json(world / "evaluation" / "code.yaml", task)
    values = pipeline.values() | {"tracking": store.model_dump()}
    values["evaluation"] |= {"kept": ["home", "code"], "run_generated_code": True}
    params = Params.model_validate(values)
    evaluate_base(params, pipeline.base, world, pipeline.heldout, output / "base")
    evaluate_method(params, "lora", pipeline.base, world, pipeline.heldout, runs / "lora", output / "lora")
    for name in ("base", "lora"):
        assert {row["kept/code"] for row in rows(output / name / "metrics.parquet")} == {0.5}
        asked = [row for row in rows(output / name / "answers.parquet") if row["task"] == "code"]
        assert {(row["item"], row["score"]) for row in asked} == {(0, 1.0), (1, 0.0)}
        _, manifest = read_table(output / name / "metrics.parquet")
        assert manifest["generated_code"]["sandbox"].startswith("bubblewrap ")
        assert manifest["generated_code"]["limits"]["seconds"] == 5
    refusing = Params.model_validate(values | {"evaluation": values["evaluation"] | {"run_generated_code": False}})
    with pytest.raises(FoLoRAError, match=r"task code: runs code .*: evaluation\.run_generated_code: true lets it"):
        Evaluator(refusing, pipeline.base, world, pipeline.heldout)


def test_results_without_code_do_not_speak_of_a_sandbox(evaluations: Path) -> None:
    assert "generated_code" not in read_table(evaluations / "lora" / "metrics.parquet")[1]


def test_some_tasks_are_asked_at_the_best_rate_only(
    further: tuple[Params, Path], pipeline: Pipeline, runs: Path, tmp_path: Path
) -> None:
    params, world = further
    inputs = TrainInputs(pipeline.task, pipeline.proxy, pipeline.heldout, pipeline.spectra)
    shutil.copytree(runs / "lora", tmp_path / "runs")
    train_run(params, "lora-1e-2-s0", pipeline.base, inputs, tmp_path / "runs" / "lora-1e-2-s0")
    evaluate_method(
        params, "lora", pipeline.base, world, pipeline.heldout, tmp_path / "runs", tmp_path / "evaluation" / "lora"
    )
    evaluate_base(params, pipeline.base, world, pipeline.heldout, tmp_path / "evaluation" / "base")
    metrics = rows(tmp_path / "evaluation" / "lora" / "metrics.parquet")
    assert len(metrics) == 4
    best = max(metrics, key=lambda row: (row["step"], row["validation"], -row["learning_rate"]))
    asked = [row for row in metrics if row["best/again"] is not None]
    assert [(row["run"], row["step"]) for row in asked] == [(best["run"], 6)]
    assert best["best/again"] == best["kept/home"]
    answers = [row for row in rows(tmp_path / "evaluation" / "lora" / "answers.parquet") if row["task"] == "again"]
    assert {(row["run"], row["step"]) for row in answers} == {(best["run"], 6)}
    assert len(answers) == params.world.test_items
    (base,) = rows(tmp_path / "evaluation" / "base" / "metrics.parquet")
    assert base["best/again"] == base["kept/home"]


def test_drift_is_measured_on_foreign_texts_too(
    further: tuple[Params, Path], pipeline: Pipeline, runs: Path, evaluations: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    params, world = further
    del params.runs["lora-1e-2-s0"]
    evaluate_method(params, "lora", pipeline.base, world, pipeline.heldout, runs / "lora", tmp_path / "evaluation")
    bare, tokenizer = pipeline.base.load_model(), pipeline.base.load_tokenizer()
    ids = [tokenizer(word)["input_ids"][:4] for word in ("ab cd", "x")]
    text = HeldOutText(bare, ids, 1, 0)
    before = rows(evaluations / "lora" / "metrics.parquet")
    for row, old in zip(rows(tmp_path / "evaluation" / "metrics.parquet"), before, strict=True):
        checkpoint = runs / "lora" / LORA / "checkpoints" / str(row["step"])
        measured = text.measure(PeftModel.from_pretrained(pipeline.base.load_model(), checkpoint).eval())
        assert (row["kl"], row["perplexity"]) == (old["kl"], old["perplexity"])
        assert row["kl/foreign"] == pytest.approx(measured.kl, rel=1e-3)
        assert row["perplexity/foreign"] == pytest.approx(measured.perplexity, rel=1e-5)
        assert row["kl/foreign"] != row["kl"]
    tokens = [row for row in rows(tmp_path / "evaluation" / "tokens.parquet") if row["text"] == "foreign"]
    assert [(row["step"], row["row"], len(row["kl"])) for row in tokens] == [(6, 0, 3), (6, 1, 1)]
    assert sum(sum(row["kl"]) for row in tokens) / 4 == pytest.approx(measured.kl, rel=1e-3)


def test_tokens_are_kept_of_the_last_checkpoint(pipeline: Pipeline, evaluations: Path) -> None:
    ids = read_table(pipeline.heldout)[0]["token_ids"].to_pylist()
    for folder in ("base", "lora", "folora-replay"):
        tokens = rows(evaluations / folder / "tokens.parquet")
        last = rows(evaluations / folder / "metrics.parquet")[-1]
        assert {(row["run"], row["step"], row["text"]) for row in tokens} == {(last["run"], last["step"], "heldout")}
        assert [len(row["kl"]) for row in tokens] == [len(row["loss"]) for row in tokens] == [len(i) - 1 for i in ids]
        kl, loss = ([value for row in tokens for value in row[name]] for name in ("kl", "loss"))
        assert sum(kl) / len(kl) == pytest.approx(last["kl"], rel=1e-5)
        assert math.exp(sum(loss) / len(loss)) == pytest.approx(last["perplexity"], rel=1e-5)


def test_a_foreign_text_has_a_name_of_its_own(further: tuple[Params, Path]) -> None:
    values = further[0].model_dump(mode="json", serialize_as_any=True)
    values["evaluation"]["texts"]["heldout"] = values["evaluation"]["texts"]["foreign"]
    with pytest.raises(ValueError, match="'heldout' is the base model's own text: choose another name"):
        Params.model_validate(values)


def test_a_foreign_text_that_is_missing_is_named(further: tuple[Params, Path], pipeline: Pipeline) -> None:
    params, world = further
    (world / "foreign.jsonl").unlink()
    with pytest.raises(
        FoLoRAError, match=r"foreign\.jsonl: no data set here: evaluation\.texts\.foreign\.dataset is a"
    ):
        Evaluator(params, pipeline.base, world, pipeline.heldout)
