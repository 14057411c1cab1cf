"""Evaluation tasks of the lm-evaluation-harness, its own or in files of one's own: found, checked and loaded.

Code that a model writes runs in our sandbox, by tasks that ask for it and only where the parameters let it.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from folora.errors import FoLoRAError
from folora.sandbox import check_sandbox, passes
from folora.storage import require

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from folora.storage import Record


CODE_METRIC = "code_eval"  # what the harness takes from a hub to run code
PASS_AT_1 = {"pass_at_k", "pass_at_1"}  # the functions with which the harness's tasks call it
# the first that a task has is its score; "pass@1" is what pass_at_k calls it, "score" what LongBench's tasks have
METRICS = ("acc_norm", "exact_match", "acc", "f1", "prompt_level_strict_acc", "pass@1", "pass_at_1", "score")


def load_tasks(name: str, folder: Path, *, run_code: bool) -> dict[str, Any]:
    """The tasks behind a name: one, or all of a group, which is one figure.

    Args:
        name: of ``evaluation/NAME.yaml`` in the folder, or of a task or group of the harness.
        folder: with tasks of one's own, whose data files are relative to it.
        run_code: whether code that the model writes may run.

    Raises:
        FoLoRAError: there is no such task, its data or code cannot be loaded, it has no score of a single item, or it
            runs code that must not run here.
    """
    path = _file_of(name, folder)
    if path.is_file():
        tasks = _load_own(path, folder, run_code=run_code)
    elif name in known_tasks().all_tasks:
        about = known_tasks().task_index[name].cfg or {}
        if about.get("unsafe_code") and not run_code:
            raise _must_not_run(name)  # before its data are fetched
        tasks = _load_from(known_tasks(), name, name, run_code=run_code)
    else:
        own = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise FoLoRAError(f"{path}: no such evaluation task, and none of the harness; there are {own or 'none'}")
    for task in tasks.values():
        _check_code(name, task, run_code=run_code)
        _check_score(name, task)
    return tasks


def is_known(name: str, folder: Path) -> bool:
    """Whether there is a task of this name, in a file of one's own or the harness's."""
    return _file_of(name, folder).is_file() or name in known_tasks().all_tasks


def _file_of(name: str, folder: Path) -> Path:
    return folder / "evaluation" / f"{name}.yaml"


def _load_own(path: Path, folder: Path, *, run_code: bool) -> dict[str, Any]:
    """A task of one's own; one that the harness comes with, with other data, where it names that as ``include``."""
    from lm_eval.tasks import TaskManager

    spec = _own_task(path, folder)
    known = spec.pop("include", None)
    if known is None:
        own = TaskManager(include_defaults=False, verbosity="ERROR")
        if not isinstance(spec.get("task"), list):  # the name within is often that of the file it was copied from
            spec["task"] = path.stem
        return _load_from(own, path.stem, spec, run_code=run_code)
    if known not in known_tasks().all_subtasks:
        raise FoLoRAError(f"{path}: include: {known!r} is no task of the harness: name one, or leave it out")
    changed = {"group": path.stem, "task": [{**spec, "task": known}]}
    (task,) = _load_from(known_tasks(), path.stem, changed, run_code=run_code).values()
    return {path.stem: task}


def _load_from(manager: Any, name: str, what: str | Record, *, run_code: bool) -> dict[str, Any]:
    """A task or group that a manager knows, or one that is spelled out.

    Raises:
        FoLoRAError: its data or code cannot be loaded, or it runs code and must not.
    """
    from jinja2 import TemplateError

    try:
        with _own_code_metric(name, run=run_code):
            tasks: dict[str, Any] = manager.load([what])["tasks"]
    except (OSError, ValueError, ImportError, LookupError, TypeError, TemplateError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise FoLoRAError(f"evaluation task {name}: its data or code cannot be loaded: {reason}") from error
    return tasks


def _check_code(name: str, task: Any, *, run_code: bool) -> None:
    """See that a task may be asked here.

    Raises:
        FoLoRAError: it runs code and must not, or otherwise than in our sandbox.
    """
    if not runs_code(task):
        return
    if not run_code:
        raise _must_not_run(name)
    if set(_metrics(task)) - PASS_AT_1 or any(k != [1] for k in _all_k(task)):
        only = "only pass@1 as of humaneval and mbpp can be had here"
        raise FoLoRAError(f"evaluation task {name}: runs code that the model wrote in a way of its own: {only}")
    check_sandbox()


def _check_score(name: str, task: Any) -> None:
    """See that every item of a task has a score, before any is asked.

    Raises:
        FoLoRAError: its metrics are of all items together, as BLEU is, or none that is known here.
    """
    from lm_eval.api.registry import get_aggregation

    if task.OUTPUT_TYPE == "loglikelihood":  # scored by ourselves
        return
    metrics = task.aggregation()
    means = {metric for metric, aggregate in metrics.items() if aggregate is get_aggregation("mean")}
    if means.isdisjoint({*METRICS, *PASS_AT_1}):
        within = "" if task.config.task in (name, None) else f" ({task.config.task})"
        raise FoLoRAError(
            f"evaluation task {name}{within}: no score of a single item among its metrics: {', '.join(metrics)}"
        )


@cache
def known_tasks() -> Any:
    """The tasks that the harness comes with; finding them takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(verbosity="ERROR")


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


def runs_code(task: Any) -> bool:
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
