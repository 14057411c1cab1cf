"""Tasks of one's own and of the harness, and the scores of their items, against the model's own probabilities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from ruamel.yaml import YAML
from tokenizers.processors import TemplateProcessing

from folora.errors import FoLoRAError
from folora.evaluation_tasks import CodeEval
from folora.harness import Harness

if TYPE_CHECKING:
    from conftest import Pipeline

ROOT = Path(__file__).parent.parent

ITEMS = [
    {"prompt": "max 3 8>", "right": "8", "choices": ["3", "8", "11"], "label": 1},
    {"prompt": "up(ab)>", "right": "AB", "choices": ["ab", "BA", "AB"], "label": 2},
    {"prompt": "2+2>", "right": "4", "choices": ["4", "5", "22"], "label": 0},
]
SPEC: dict[str, Any] = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "items.jsonl"}},
    "test_split": "test",
    "doc_to_text": "prompt",
    "target_delimiter": "",
    "metadata": {"version": 1.0},
}
KINDS: dict[str, dict[str, Any]] = {
    "likely": {"output_type": "loglikelihood", "doc_to_target": "right", "metric_list": [{"metric": "acc"}]},
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    },
    "normed": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{ choices + ['3+8>11+2>13'] }}",
        "doc_to_target": "label",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "filtered": {
        "output_type": "generate_until",
        "doc_to_target": "right",
        "generation_kwargs": {"until": [], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
        "filter_list": [
            {"name": "first", "filter": [{"function": "regex", "regex_pattern": "(.)"}, {"function": "take_first"}]},
            {"name": "whole", "filter": [{"function": "take_first"}]},
        ],
    },
    "corpus": {
        "output_type": "generate_until",
        "doc_to_target": "right",
        "generation_kwargs": {"until": [], "max_gen_toks": 2, "do_sample": False},
        "metric_list": [{"metric": "bleu"}],
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    for name, kind in KINDS.items():
        (tmp_path / "evaluation" / f"{name}.yaml").write_text(json.dumps({"task": name, **SPEC, **kind}))
    return tmp_path


def harness(pipeline: Pipeline, folder: Path, **changes: Any) -> Harness:
    settings = pipeline.params.evaluation.model_copy(update=changes)
    return Harness(folder, settings, pipeline.base.load_tokenizer())


@pytest.fixture
def log_likelihood(pipeline: Pipeline) -> Any:
    """(log p, tokens) of an answer after a prompt, by the base model, one at a time."""
    tokenizer, model = pipeline.base.load_tokenizer(), pipeline.base.load_model()

    def of(prompt: str, answer: str) -> tuple[float, int]:
        given, said = (tokenizer(text)["input_ids"] for text in (prompt, prompt + answer))
        scores = torch.log_softmax(model(input_ids=torch.tensor([said])).logits[0].detach().double(), dim=-1)
        chosen = [float(scores[i - 1, said[i]]) for i in range(len(given), len(said))]
        return sum(chosen), len(chosen)

    return of


def test_likelihood_is_the_mean_probability_of_a_token(pipeline: Pipeline, folder: Path, log_likelihood: Any) -> None:
    answers = harness(pipeline, folder).answers(pipeline.base.load_model(), ["likely"])
    for answer, item in zip(answers, ITEMS, strict=True):
        total, tokens = log_likelihood(item["prompt"], item["right"])
        assert answer["score"] == pytest.approx(float(torch.tensor(total / tokens).exp()), rel=1e-4)
        assert (answer["prompt"], answer["expected"]) == (item["prompt"], item["right"])


def test_a_task_goes_by_the_name_of_its_file(pipeline: Pipeline, folder: Path) -> None:
    """Copied from another, it often says the other's name within."""
    (folder / "two.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS[1:]))
    spec = {"task": "likely", **SPEC, **KINDS["likely"], "dataset_kwargs": {"data_files": {"test": "two.jsonl"}}}
    (folder / "evaluation" / "copied.yaml").write_text(json.dumps(spec))
    answers = harness(pipeline, folder).answers(pipeline.base.load_model(), ["likely", "copied"])
    asked = [(answer["task"], answer["prompt"]) for answer in answers]
    assert asked == [
        *(("likely", item["prompt"]) for item in ITEMS),
        *(("copied", item["prompt"]) for item in ITEMS[1:]),
    ]


def test_a_choice_scored_by_its_length_is_the_answer(pipeline: Pipeline, folder: Path, log_likelihood: Any) -> None:
    answers = harness(pipeline, folder).answers(pipeline.base.load_model(), ["normed"])
    likeliest = []
    for answer, item in zip(answers, ITEMS, strict=True):
        choices = {
            choice: log_likelihood(item["prompt"], f" {choice}")[0] for choice in [*item["choices"], "3+8>11+2>13"]
        }
        assert answer["answer"] == max(choices, key=lambda choice: choices[choice] / len(choice))
        assert answer["score"] == float(answer["answer"] == answer["expected"])
        likeliest.append(max(choices, key=lambda choice: choices[choice]))
    assert [answer["answer"] for answer in answers] != likeliest


def test_prompts_begin_with_bos_whatever_the_tokenizer_adds(pipeline: Pipeline, folder: Path) -> None:
    """Many, GPT-2's and Qwen's among them, add nothing."""
    expected = harness(pipeline, folder).answers(pipeline.base.load_model(), ["likely", "filtered"])
    tokenizer = pipeline.base.load_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B")
    assert tokenizer("max 3 8>")["input_ids"][0] != tokenizer.bos_token_id
    asked = Harness(folder, pipeline.params.evaluation, tokenizer)
    assert asked.answers(pipeline.base.load_model(), ["likely", "filtered"]) == expected


def test_the_likeliest_choice_is_the_answer(pipeline: Pipeline, folder: Path, log_likelihood: Any) -> None:
    answers = harness(pipeline, folder).answers(pipeline.base.load_model(), ["choice"])
    for answer, item in zip(answers, ITEMS, strict=True):
        best = max(item["choices"], key=lambda choice: log_likelihood(item["prompt"], choice)[0])
        assert answer["answer"] == best
        assert answer["expected"] == item["right"]
        assert answer["score"] == float(best == item["right"])


def test_the_first_filter_counts(pipeline: Pipeline, folder: Path) -> None:
    answers = harness(pipeline, folder).answers(pipeline.base.load_model(), ["filtered"])
    assert [answer["item"] for answer in answers] == [0, 1, 2]
    assert all(len(answer["answer"]) == 1 or answer["answer"] == "[invalid]" for answer in answers)


def test_a_group_is_one_figure_over_all_of_its_items(pipeline: Pipeline, folder: Path) -> None:
    asked = harness(pipeline, folder)
    parts = {name: asked.tasks(name)[name] for name in ("likely", "choice")}
    asked._tasks["both"] = parts
    answers = asked.answers(pipeline.base.load_model(), ["both"])
    assert [(answer["task"], answer["item"]) for answer in answers] == [("both", i) for i in range(2 * len(ITEMS))]
    apart = harness(pipeline, folder).answers(pipeline.base.load_model(), ["likely", "choice"])
    assert [answer["score"] for answer in answers] == [answer["score"] for answer in apart]


def test_a_limit_takes_the_first_items(pipeline: Pipeline, folder: Path) -> None:
    whole = harness(pipeline, folder).answers(pipeline.base.load_model(), ["likely"])
    some = harness(pipeline, folder, limit=2).answers(pipeline.base.load_model(), ["likely"])
    assert some == whole[:2]


def test_prompts_are_put_in_the_chat_template(pipeline: Pipeline, folder: Path) -> None:
    tokenizer = pipeline.base.load_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}u({{ m.content }}){% endfor %}>"
    asked = Harness(folder, pipeline.params.evaluation.model_copy(update={"chat": True}), tokenizer)
    answers = asked.answers(pipeline.base.load_model(), ["filtered"])
    assert [answer["prompt"] for answer in answers] == [f"u({item['prompt']})>" for item in ITEMS]


def test_what_cannot_be_asked_is_named(pipeline: Pipeline, folder: Path) -> None:
    asked, model = harness(pipeline, folder), pipeline.base.load_model()
    own = "choice, corpus, filtered, likely"
    with pytest.raises(FoLoRAError, match=rf"poetry\.yaml: no such evaluation task, .* there are {own}"):
        asked.answers(model, ["likely", "poetry"])
    with pytest.raises(FoLoRAError, match="evaluation task corpus: no score of a single item among its metrics: bleu"):
        asked.tasks("corpus")
    with pytest.raises(FoLoRAError, match=r"humaneval: runs code .*: evaluation\.run_generated_code: true lets it"):
        asked.answers(model, ["humaneval"])


def own(folder: Path, name: str, rows: list[dict[str, Any]], **spec: Any) -> None:
    """A task file with data beside it."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}}
    (folder / "evaluation" / f"{name}.yaml").write_text(json.dumps({**spec, **data}))


PROBLEM = {
    "prompt": "def f(x):",
    "text": "Add one.",
    "test_list": ["assert 1"] * 3,
    "test": "def check(f):\n    assert f(1) == 2",
    "entry_point": "f",
}
SHORT = {"until": ["\n"], "max_gen_toks": 3, "do_sample": False}  # what the model says stays a comment


@pytest.mark.usefixtures("sandbox")
def test_code_in_the_form_of_humaneval_is_right_if_it_passes(pipeline: Pipeline, folder: Path) -> None:
    rows = [{**PROBLEM, "prompt": f"def f(x):\n    return x + {n}\n# "} for n in (1, 2)]
    own(folder, "code", rows, include="humaneval", generation_kwargs=SHORT)
    asked = harness(pipeline, folder, run_generated_code=True)
    answers = asked.answers(pipeline.base.load_model(), ["code"])
    assert [(answer["task"], answer["score"]) for answer in answers] == [("code", 1.0), ("code", 0.0)]
    for answer, row in zip(answers, rows, strict=True):
        assert answer["prompt"] == row["prompt"]
        assert answer["answer"].startswith(row["prompt"])
        assert answer["expected"] == f"{PROBLEM['test']}\ncheck(f)"
    assert (asked.generated_code or {})["sandbox"].startswith("bubblewrap ")


@pytest.mark.usefixtures("sandbox")
def test_code_in_the_form_of_mbpp_is_right_if_it_passes(pipeline: Pipeline, folder: Path) -> None:
    own(folder, "code", [PROBLEM], include="mbpp", dataset_name=None)
    asked = harness(pipeline, folder, run_generated_code=True)
    pass_at_1 = asked.tasks("code")["code"]._metric_fn_list["pass_at_1"]
    assert [pass_at_1(["assert a == 1"], [code]) for code in ("a = 1", "a = 1 +")] == [1.0, 0.0]


@pytest.mark.usefixtures("sandbox")
def test_pass_at_1_is_the_share_of_samples_that_pass() -> None:
    predictions = [["a = 1", "a = 2", "a =", "a = 1.0"]]
    assert CodeEval.compute(references=["assert a == 1"], predictions=predictions, k=[1]) == ({"pass@1": 0.5}, {})


@pytest.mark.parametrize("known", ["humaneval", "mbpp", "humaneval_64"])
def test_code_is_run_only_where_that_is_asked_for(known: str, pipeline: Pipeline, folder: Path) -> None:
    own(folder, "code", [PROBLEM], include=known, dataset_name=None, unsafe_code=False)  # it is, whatever it says
    with pytest.raises(FoLoRAError, match=r"task code: runs code .* evaluation\.run_generated_code: true lets it"):
        harness(pipeline, folder).tasks("code")


@pytest.mark.parametrize("spec", [{"include": "humaneval_64"}, {**SPEC, **KINDS["filtered"], "unsafe_code": True}])
@pytest.mark.usefixtures("sandbox")
def test_code_that_is_scored_otherwise_is_refused(spec: dict[str, Any], pipeline: Pipeline, folder: Path) -> None:
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "code.jsonl"}}, "task": "code"}
    (folder / "code.jsonl").write_text(json.dumps(PROBLEM) + "\n")
    (folder / "evaluation" / "code.yaml").write_text(json.dumps({**spec, **data}))
    with pytest.raises(FoLoRAError, match="task code: runs code that the model wrote in a way of its own: only pass@1"):
        harness(pipeline, folder, run_generated_code=True).tasks("code")


@pytest.mark.parametrize("allowed", [False, True])
def test_a_metric_that_runs_code_is_never_taken_from_a_hub(
    allowed: bool, pipeline: Pipeline, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluate.load", lambda name: pytest.fail(f"{name} is loaded"))
    metric = {"metric": "code_eval", "hf_evaluate": True, "aggregation": "mean"}
    (folder / "evaluation" / "code.yaml").write_text(
        json.dumps({**SPEC, **KINDS["corpus"], "task": "code", "metric_list": [metric]})
    )
    with pytest.raises(FoLoRAError, match="evaluation task code: runs code that the model wrote"):
        harness(pipeline, folder, run_generated_code=allowed).tasks("code")


def test_a_task_of_the_harness_takes_other_data(pipeline: Pipeline, folder: Path) -> None:
    row = {"question": "1 + 1?", "answer": "One more. #### 2"}
    changes = {"dataset_name": None, "training_split": None, "fewshot_split": None, "num_fewshot": 0}
    own(folder, "sums", [row], include="gsm8k", **changes, generation_kwargs=SHORT)
    (answer,) = harness(pipeline, folder).answers(pipeline.base.load_model(), ["sums"])
    assert (answer["prompt"], answer["expected"]) == ("Question: 1 + 1?\nAnswer:", "One more. #### 2")
    own(folder, "odd", [row], include="nobody")
    with pytest.raises(FoLoRAError, match=r"odd\.yaml: include: 'nobody' is no task of the harness"):
        harness(pipeline, folder).tasks("odd")


QUESTION = {"question": "Who?", "answer": {"value": "Ann", "aliases": ["Ann"]}, "choices": ["a", "b", "c", "d"]}
LETTERS = {"text": ["Ann", "Bob"], "label": ["A", "B"]}
FIELD: dict[str, dict[str, Any]] = {  # a row with the columns that a benchmark has
    "hendrycks_math_algebra": {"problem": "1 + 1?", "solution": r"It is $\boxed{2}$."},
    "ifeval": {"prompt": "Say it.", "key": 1, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    "triviaqa": QUESTION,
    "nq_open": {"question": "Who?", "answer": ["Ann"]},
    "webqs": {"question": "Who?", "answers": ["Ann", "Bob"]},
    "mmlu_anatomy": {**QUESTION, "answer": 1},
    "truthfulqa_mc1": {"question": "Who?", "mc1_targets": {"choices": ["Ann", "Bob"], "labels": [1, 0]}},
    "truthfulqa_mc2": {"question": "Who?", "mc2_targets": {"choices": ["Ann", "Bob", "Al"], "labels": [1, 0, 1]}},
    "hellaswag": {"activity_label": "A", "ctx_a": "x", "ctx_b": "y", "endings": ["a", "b", "c", "d"], "label": "2"},
    "arc_easy": {"question": "Who?", "choices": LETTERS, "answerKey": "B"},
    "arc_challenge": {"question": "Who?", "choices": LETTERS, "answerKey": "A"},
    "winogrande": {"sentence": "So _ is.", "option1": "Ann", "option2": "Bob", "answer": "1"},
    "longbench_hotpotqa": {"context": "Ann did.", "question": "Who?", "answers": ["Ann"], "all_classes": None},
    "longbench_lcc": {"context": "a =", "answers": [" 1"], "all_classes": None},
}
ANSWERED = {"hendrycks_math_algebra", "ifeval", "triviaqa", "nq_open", "longbench_hotpotqa", "longbench_lcc"}


@pytest.mark.parametrize("known", FIELD)
def test_the_benchmarks_of_the_field_score_item_by_item(known: str, pipeline: Pipeline, folder: Path) -> None:
    changes: dict[str, Any] = {"dataset_name": None, "num_fewshot": 0}
    changes |= dict.fromkeys(("training_split", "validation_split", "fewshot_split"))
    if known in ANSWERED:
        changes["generation_kwargs"] = SHORT
    own(folder, "field", [FIELD[known]] * 2, include=known, test_split="test", **changes)
    answers = harness(pipeline, folder).answers(pipeline.base.load_model(), ["field"])
    assert [answer["item"] for answer in answers] == [0, 1]
    assert 0 <= answers[0]["score"] == answers[1]["score"] <= 1


def test_an_instruction_of_ifeval_is_followed_or_not(pipeline: Pipeline, folder: Path) -> None:
    own(folder, "field", [FIELD["ifeval"]], include="ifeval", test_split="test")
    task = harness(pipeline, folder).tasks("field")["field"]
    (document,) = task.test_docs()
    scored = [task.process_results(document, [said])["prompt_level_strict_acc"] for said in ("No comma.", "One, two.")]
    assert scored == [True, False]


def test_squad_is_answered_with_any_of_the_spans(pipeline: Pipeline, folder: Path) -> None:
    spec = YAML(typ="safe", pure=True).load(ROOT / "workflow" / "tasks" / "evaluation" / "squadv2-exact.yaml")
    rows = [{"context": "Ann did.", "question": "Who?", "answers": {"text": text}} for text in (["Ann", "ann!"], [])]
    own(folder, "squad", rows, **{**spec, "generation_kwargs": SHORT, "test_split": "test"})
    asked = harness(pipeline, folder)
    task = asked.tasks("squad")["squad"]
    documents = list(task.test_docs())
    assert [task.process_results(documents[0], [said])["exact_match"] for said in ("ANN", "Ann.", "Bob")] == [1, 1, 0]
    assert [task.process_results(documents[1], [said])["exact_match"] for said in ("unanswerable", "Ann")] == [1, 0]
    assert len(asked.answers(pipeline.base.load_model(), ["squad"])) == 2


def test_data_without_a_column_that_is_asked_for_are_named(pipeline: Pipeline, folder: Path) -> None:
    own(folder, "odd", ITEMS, **{**SPEC, **KINDS["filtered"], "doc_to_text": "{{question}}>", "task": "odd"})
    with pytest.raises(FoLoRAError, match=r"task odd: its data or code cannot be loaded: .*'question' is undefined"):
        harness(pipeline, folder).tasks("odd")


def test_a_metric_that_is_not_known_is_named(pipeline: Pipeline, folder: Path) -> None:
    spec = {**SPEC, **KINDS["corpus"], "task": "typing", "metric_list": [{"metric": "exact_macht"}]}
    (folder / "evaluation" / "typing.yaml").write_text(json.dumps(spec))
    with pytest.raises(FoLoRAError, match=r"typing\.yaml: metric_list: 'exact_macht' is no metric of the harness"):
        harness(pipeline, folder).tasks("typing")


@pytest.mark.parametrize(("content", "expected"), [("a: [", "not valid YAML"), ("words", "expected a table")])
def test_a_file_that_is_no_task_is_named(content: str, expected: str, pipeline: Pipeline, folder: Path) -> None:
    (folder / "evaluation" / "broken.yaml").write_text(content)
    with pytest.raises(FoLoRAError, match=rf"broken\.yaml: {expected}"):
        harness(pipeline, folder).tasks("broken")


def test_missing_data_is_named(pipeline: Pipeline, folder: Path) -> None:
    (folder / "items.jsonl").unlink()
    with pytest.raises(FoLoRAError, match=r"items\.jsonl: not found"):
        harness(pipeline, folder).tasks("likely")
