"""What is asked: tasks of the lm-evaluation-harness, by name or from files of one's own, and the score of every item.

Every score lies between 0 and 1: right or wrong for most tasks, and for a log-likelihood the mean probability of a
token of the right answer, exp(log p / tokens). Code that the model wrote is right if it passes the tests of its item,
in a sandbox.
"""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from folora.errors import FoLoRAError
from folora.sandbox import check_sandbox, describe_sandbox, passes
from folora.storage import require

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from folora.params import Evaluation

Record = dict[str, Any]

CODE_METRIC = "code_eval"  # what the harness takes from a hub to run code
PASS_AT_1 = {"pass_at_k", "pass_at_1"}  # the functions with which the harness's tasks call it
# the first that a task has is its score; "pass@1" is what pass_at_k calls it
METRICS = ("acc_norm", "exact_match", "acc", "f1", "prompt_level_strict_acc", "pass@1", "pass_at_1")


class CodeEval:
    """In place of the hub's metric of this name: the same for k = 1, in the sandbox."""

    @staticmethod
    def compute(references: list[str], predictions: list[list[str]], k: list[int]) -> tuple[dict[str, float], Record]:
        """The share of predictions that pass.

        Args:
            references: tests of each problem.
            predictions: code for each.
            k: [1].

        Raises:
            FoLoRAError: another k, or there is no sandbox to be had.
        """
        if k != [1]:
            raise FoLoRAError(f"evaluation task: asks for pass@k with k = {k}: there is pass@1 alone")
        tried = [
            passes(f"{code}\n{tests}") for tests, some in zip(references, predictions, strict=True) for code in some
        ]
        return {"pass@1": sum(tried) / len(tried)}, {}


class Harness:
    """Asks a model the items of evaluation tasks.

    Args:
        folder: ``evaluation/NAME.yaml`` holds a task of one's own, whose data files are relative to the folder.
        settings: batch size, how many items of a task, whether in the chat template.
        tokenizer: of the model.
    """

    def __init__(self, folder: Path, settings: Evaluation, tokenizer: PreTrainedTokenizerBase) -> None:
        self._folder = folder
        self._settings = settings
        self._tokenizer = tokenizer
        self._tasks: dict[str, dict[str, Any]] = {}

    def answers(self, model: PreTrainedModel | PeftModel, names: list[str]) -> list[Record]:
        """Ask every item: ``task``, ``item``, ``prompt``, ``expected``, ``answer``, ``score``.

        Raises:
            FoLoRAError: a task is missing, or has no score of a single item.
        """
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        asked = {name: self.tasks(name) for name in names}
        size = self._settings.batch_size
        lm = HFLM(pretrained=model, tokenizer=self._tokenizer, batch_size=size, add_bos_token=True)
        # the harness asks for its bar by this argument, whatever TQDM_DISABLE says
        lm.generate_until = partial(lm.generate_until, disable_tqdm=not sys.stderr.isatty())
        result = evaluate(
            lm,
            {
                "tasks": {own: task for tasks in asked.values() for own, task in tasks.items()},
                "groups": {},
                "group_map": {},
            },
            limit=self._settings.limit,
            apply_chat_template=self._settings.chat,
            bootstrap_iters=0,
            verbosity="ERROR",
            confirm_run_unsafe_code=self._settings.run_generated_code,
        )
        return [
            {"task": name, "item": item, **self._answer(tasks[own], sample)}
            for name, tasks in asked.items()
            for item, (own, sample) in enumerate(_samples(tasks, result["samples"]))
        ]

    def tasks(self, name: str) -> dict[str, Any]:
        """The tasks behind a name, read once: one, or all of a group, which is one figure."""
        if name not in self._tasks:
            self._tasks[name] = self._load(name)
        return self._tasks[name]

    @property
    def generated_code(self) -> Record | None:
        """In what code was run that the model wrote, or None where no task that was loaded asks for it."""
        runs = any(_runs_code(task) for tasks in self._tasks.values() for task in tasks.values())
        return describe_sandbox() if runs else None

    def _load(self, name: str) -> dict[str, Any]:
        path = self._folder / "evaluation" / f"{name}.yaml"
        if path.is_file():
            tasks = self._load_own(path)
        elif name in known_tasks().all_tasks:
            about = known_tasks().task_index[name].cfg or {}
            if about.get("unsafe_code") and not self._settings.run_generated_code:
                raise _must_not_run(name)  # before its data are fetched
            tasks = self._load_from(known_tasks(), name, name)
        else:
            own = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
            raise FoLoRAError(f"{path}: no such evaluation task, and none of the harness; there are {own or 'none'}")
        for task in tasks.values():
            self._check_metrics(name, task)
        return tasks

    def _load_own(self, path: Path) -> dict[str, Any]:
        """A task of one's own; one that the harness comes with, with other data, where it names that as ``include``."""
        from lm_eval.tasks import TaskManager

        spec = _own_task(path, self._folder)
        known = spec.pop("include", None)
        if known is None:
            return self._load_from(TaskManager(include_defaults=False, verbosity="ERROR"), path.stem, spec)
        if known not in known_tasks().all_subtasks:
            raise FoLoRAError(f"{path}: include: {known!r} is no task of the harness: name one, or leave it out")
        changed = {"group": path.stem, "task": [{**spec, "task": known}]}
        (task,) = self._load_from(known_tasks(), path.stem, changed).values()
        return {path.stem: task}

    def _load_from(self, manager: Any, name: str, what: str | Record) -> dict[str, Any]:
        """A task or group that a manager knows, or one that is spelled out.

        Raises:
            FoLoRAError: its data or code cannot be loaded, or it runs code and must not.
        """
        from jinja2 import TemplateError

        try:
            with _own_code_metric(name, run=self._settings.run_generated_code):
                tasks: dict[str, Any] = manager.load([what])["tasks"]
        except (OSError, ValueError, ImportError, LookupError, TypeError, TemplateError) as error:
            reason = f"{type(error).__name__}: {error}"[:200]
            raise FoLoRAError(f"evaluation task {name}: its data or code cannot be loaded: {reason}") from error
        return tasks

    def _check_metrics(self, name: str, task: Any) -> None:
        """See that a task may be asked here.

        Raises:
            FoLoRAError: it runs code and must not, or otherwise than in our sandbox.
        """
        if not _runs_code(task):
            return
        if not self._settings.run_generated_code:
            raise _must_not_run(name)
        if set(_metrics(task)) - PASS_AT_1 or any(k != [1] for k in _all_k(task)):
            only = "only pass@1 as of humaneval and mbpp can be had here"
            raise FoLoRAError(f"evaluation task {name}: runs code that the model wrote in a way of its own: {only}")
        check_sandbox()

    def _answer(self, task: Any, sample: Record) -> Record:
        """Prompt, what was expected, the answer and its score."""
        arguments, replies, target = sample["arguments"], sample["filtered_resps"], sample["target"]
        if task.OUTPUT_TYPE == "loglikelihood":
            prompt, expected = arguments[0]
            tokens = len(self._tokenizer(expected, add_special_tokens=False)["input_ids"])
            score = math.exp(replies[0][0] / max(tokens, 1))
            return {"prompt": prompt, "expected": expected, "answer": f"{score:.3f}", "score": score}
        if task.OUTPUT_TYPE == "multiple_choice":
            choices = [argument[1].strip() for argument in arguments]
            best = max(range(len(replies)), key=lambda i: replies[i][0])
            expected, answer = (
                (choices[target] if isinstance(target, int) else str(target)),
                choices[best % len(choices)],
            )
        else:
            expected, answer = str(target), str(replies[0][0] if isinstance(replies[0], list) else replies[0])
        return {"prompt": arguments[0][0], "expected": expected, "answer": answer, "score": _score(task, sample)}


@cache
def known_tasks() -> Any:
    """The tasks that the harness comes with; finding them takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(verbosity="ERROR")


def _samples(tasks: dict[str, Any], samples: dict[str, list[Record]]) -> list[tuple[str, Record]]:
    """The items of all tasks behind a name, in order; of several filters on the answers the first counts."""
    found = []
    for name in tasks:
        first = samples[name][0]["filter"]
        own = [sample for sample in samples[name] if sample["filter"] == first]
        found += [(name, sample) for sample in sorted(own, key=lambda sample: sample["doc_id"])]
    return found


def _score(task: Any, sample: Record) -> float:
    metric = next((name for name in METRICS if name in sample["metrics"]), None)
    if metric is None or not isinstance(sample[metric], (bool, int, float)):
        known = ", ".join(sample["metrics"])
        raise FoLoRAError(f"evaluation task {task.config.task}: no score of a single item among its metrics: {known}")
    return float(sample[metric])


def _runs_code(task: Any) -> bool:
    """Whether a task runs code that the model wrote."""
    return getattr(task.config, "unsafe_code", False) or not {CODE_METRIC, *PASS_AT_1}.isdisjoint(_metrics(task))


def _metrics(task: Any) -> dict[str, Any]:
    """The functions of its metrics, by name; None of one that is unknown."""
    functions: dict[str, Any] = getattr(task, "_metric_fn_list", {})
    return functions


def _all_k(task: Any) -> list[list[int]]:
    """The k of every metric pass@k of a task."""
    return [options["k"] for options in task._metric_fn_kwargs.values() if "k" in options]


def _must_not_run(name: str) -> FoLoRAError:
    allow = "evaluation.run_generated_code: true lets it, in a sandbox"
    return FoLoRAError(f"evaluation task {name}: runs code that the model wrote: {allow}")


@contextmanager
def _own_code_metric(name: str, *, run: bool) -> Iterator[None]:
    """Give tasks that ask a hub for the metric that runs code ours instead, or refuse them.

    They ask as they are imported, and try it at once.
    """
    from unittest.mock import patch

    import evaluate

    load = evaluate.load

    def ours(path: str, *arguments: Any, **options: Any) -> Any:
        if path != CODE_METRIC:
            return load(path, *arguments, **options)
        if not run:
            raise _must_not_run(name)
        return CodeEval

    with patch.object(evaluate, "load", ours):
        yield


def _own_task(path: Path, folder: Path) -> Record:
    """A task file, its data files made absolute.

    Raises:
        FoLoRAError: not YAML, a metric is unknown, or a data file is missing.
    """
    from lm_eval.api.registry import metric_registry
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        spec: Record = YAML(typ="safe", pure=True).load(path)
    except YAMLError as error:
        raise FoLoRAError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(spec, dict):
        raise FoLoRAError(f"{path}: expected a table: a task of the harness")
    for entry in spec.get("metric_list") or []:
        metric = entry.get("metric") if isinstance(entry, dict) else None
        if isinstance(metric, str) and metric not in metric_registry and not entry.get("hf_evaluate"):
            advice = "exact_match, acc and f1 are some; hf_evaluate: true beside it asks a hub"
            raise FoLoRAError(f"{path}: metric_list: {metric!r} is no metric of the harness: {advice}")
    files = spec.get("dataset_kwargs", {}).get("data_files")
    if files is not None:
        spec["dataset_kwargs"]["data_files"] = {
            split: str(require(folder / file).resolve()) for split, file in files.items()
        }
    return spec
