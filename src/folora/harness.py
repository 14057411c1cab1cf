"""Asking a model the items of evaluation tasks, and the score of every item.

Every score lies between 0 and 1: right or wrong for most tasks, and for a log-likelihood the mean probability of a
token of the right answer, exp(log p / tokens). Code that the model wrote is right if it passes the tests of its item,
in a sandbox.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from folora.errors import FoLoRAError
from folora.evaluation_tasks import METRICS, load_tasks, runs_code
from folora.sandbox import describe_sandbox

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from folora.params import Evaluation
    from folora.storage import Record


class Harness:
    """Asks a model the items of evaluation tasks.

    Args:
        folder: ``evaluation/NAME.yaml`` holds a task of one's own, whose data files are relative to the folder.
        settings: batch size, how many items of a task, whether in the chat template.
        tokenizer: of the model; it comes to begin every text with BOS.
    """

    def __init__(self, folder: Path, settings: Evaluation, tokenizer: PreTrainedTokenizerBase) -> None:
        self._folder = folder
        self._settings = settings
        self._tokenizer = tokenizer
        if tokenizer("")["input_ids"][:1] != [tokenizer.bos_token_id]:
            tokenizer.add_bos_token = (
                True  # as every row of training begins; the harness's own option adds none to these
            )
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
        options = {"batch_size": size, "add_bos_token": True, "softmax_dtype": "float32"}  # a sum in bfloat16 is coarse
        lm = HFLM(pretrained=model, tokenizer=self._tokenizer, **options)
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
            run_code = self._settings.run_generated_code
            self._tasks[name] = load_tasks(name, self._folder, run_code=run_code)
        return self._tasks[name]

    @property
    def generated_code(self) -> Record | None:
        """In what code was run that the model wrote, or None where no task that was loaded asks for it."""
        runs = any(runs_code(task) for tasks in self._tasks.values() for task in tasks.values())
        return describe_sandbox() if runs else None

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
            # as the metric that scores it: acc_norm takes the likelihood of a character
            by_length = "acc_norm" in sample["metrics"]
            lengths = [len(choice) if by_length else 1 for choice in task.doc_to_choice(sample["doc"])]
            best = max(range(len(replies)), key=lambda i: replies[i][0] / lengths[i % len(lengths)])
            expected, answer = (
                (choices[target] if isinstance(target, int) else str(target)),
                choices[best % len(choices)],
            )
        else:
            expected, answer = str(target), str(replies[0][0] if isinstance(replies[0], list) else replies[0])
        return {"prompt": arguments[0][0], "expected": expected, "answer": answer, "score": _score(task, sample)}


def _samples(tasks: dict[str, Any], samples: dict[str, list[Record]]) -> list[tuple[str, Record]]:
    """The items of all tasks behind a name, in order; of several filters on the answers the first counts."""
    found = []
    for name in tasks:
        first = samples[name][0]["filter"]
        own = [sample for sample in samples[name] if sample["filter"] == first]
        found += [(name, sample) for sample in sorted(own, key=lambda sample: sample["doc_id"])]
    return found


def _score(task: Any, sample: Record) -> float:
    found = (sample[name] for name in METRICS if name in sample["metrics"])
    score = next((value for value in found if isinstance(value, (bool, int, float))), None)
    if score is None:
        known = ", ".join(sample["metrics"])
        raise FoLoRAError(f"evaluation task {task.config.task}: an item has no score among its metrics: {known}")
    return float(score)
