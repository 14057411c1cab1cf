"""The evaluate stage: every checkpoint of every run of a method on the target and the kept tasks, in one process.

Scores come from the lm-evaluation-harness; KL to the base and perplexity from texts. A folder of results holds

- ``metrics.parquet``: a row a checkpoint; of a method also what it costs, ``trainable`` parameters, and of the
  checkpoint what it is (``export``), its ``rank`` and its ``bytes``;
- ``answers.parquet``: a row an item, so that methods can be compared item by item;
- ``tokens.parquet``: KL and loss of every token of the texts, at the last checkpoint of each run.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa
from tqdm import tqdm

from folora.adapter import WEIGHTS_FILE, load_checkpoint
from folora.adapter_config import read_adapter_config
from folora.errors import FoLoRAError
from folora.harness import Harness
from folora.params import run_params
from folora.records import base_records, read_manifest, read_record, source_tags
from folora.scratch import kept, scratch
from folora.selection import BASE, best_finals
from folora.storage import (
    ANSWERS_FILE,
    CHECKPOINTS,
    HISTORY_FILE,
    METRICS_FILE,
    TOKENS_FILE,
    check_fields,
    digest_of,
    digest_of_file,
    digest_of_folder,
    identity_of,
    publish,
    read_table,
    write_table,
)
from folora.texts import Readings, Texts, figures, token_records
from folora.tracking import sending

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

    from folora.base import Base
    from folora.params import Params, Task
    from folora.storage import Record

KEY = ("run", "method", "adaptation", "learning_rate", "seed", "step")  # of a checkpoint, in every file


class Evaluator:
    """Measures a model on tasks and texts: the base model, or after ``load`` a checkpoint on it.

    Attributes:
        model: what is measured.
    """

    def __init__(self, params: Params, base: Base, tasks: Path, heldout: Path, asked: list[str] | None = None) -> None:
        """See that all tasks can be asked, then load the model.

        Args:
            params: how it is measured.
            base: the base model.
            tasks: folder with evaluation tasks.
            heldout: proxy text for KL and perplexity.
            asked: names of tasks; None: all that the parameters name.

        Raises:
            FoLoRAError: an evaluation task is missing or cannot be asked.
        """
        self._kept = params.evaluation.kept
        tokenizer = base.load_tokenizer()
        self._harness = Harness(tasks, params.evaluation, tokenizer)
        for name in params.evaluation_tasks() if asked is None else asked:
            self._harness.tasks(name)
        self.model: PreTrainedModel | PeftModel = base.load_for_inference()
        self._texts = Texts(params, base, self.model, tokenizer, tasks, heldout)
        # no copy: a checkpoint of whole weights puts others in their place
        self._base_weights = {one: one.data for one in self.model.parameters()}

    def load(self, checkpoint: Path) -> None:
        """Put a checkpoint on the base model, in place of the one before."""
        self.model = load_checkpoint(self.model, checkpoint)

    def drift(self) -> Readings:
        """KL to the base and loss at every token of every text."""
        return self._texts.read(self.model, None if hasattr(self.model, "disable_adapter") else self._base_logits)

    def base_drift(self) -> Readings:
        """The same of the base model itself, before anything is loaded on it."""
        return self._texts.read(self.model, self._base_logits)

    def _base_logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits of the base model, where a checkpoint has changed whole weights."""
        changed = {one: one.data for one in self._base_weights}
        try:
            for one, weight in self._base_weights.items():
                one.data = weight
            logits: Tensor = self.model(**batch, use_cache=False).logits
        finally:
            for one, weight in changed.items():
                one.data = weight
        return logits

    def answers(self, task_names: list[str]) -> list[Record]:
        """Ask every item of the named tasks; see ``Harness.answers``."""
        return self._harness.answers(self.model, task_names)

    @property
    def about(self) -> Record:
        """What the manifests say of how it was measured: in what sandbox the model's code ran, if it did."""
        code = self._harness.generated_code
        return {} if code is None else {"generated_code": code}

    def tasks_of(self, task: Task) -> list[str]:
        """Names of the evaluation tasks of one adaptation: target, validation and kept."""
        return [task.target, task.validation, *self._kept]


class Results:
    """What is measured, as rows of the three files."""

    def __init__(self) -> None:
        self.metrics: list[Record] = []
        self._answers: list[Record] = []
        self._tokens: list[Record] = []

    def answered(self, key: Record, answers: list[Record]) -> None:
        """Keep the answers of a checkpoint."""
        self._answers += [{**key, **answer} for answer in answers]

    def drifted(self, key: Record, tokens: list[Record]) -> None:
        """Keep KL and loss of every token; see ``token_records``."""
        self._tokens += [{"run": key["run"], "step": key["step"], **record} for record in tokens]

    def write(self, output: Path, runs: dict[str, str], how: Record) -> None:
        """Write the folder.

        Args:
            output: the folder.
            runs: digest of each run that was measured.
            how: of what model, with what tasks and parameters, and what the evaluator says about itself.
        """
        with publish(output) as folder:
            folder.mkdir()
            about: Record = {"artefact": "metrics", "runs": runs, "items": self._items(), **how}
            write_table(folder / METRICS_FILE, pa.Table.from_pylist(self.metrics), about)
            about = {"metrics": digest_of_file(folder / METRICS_FILE)}
            write_table(folder / ANSWERS_FILE, pa.Table.from_pylist(self._answers), {"artefact": "answers", **about})
            write_table(
                folder / TOKENS_FILE, pa.Table.from_pylist(self._tokens, TOKENS), {"artefact": "tokens", **about}
            )

    def _items(self) -> dict[str, str]:
        """Digest of what each task asked: prompts and what was expected, whatever data a harness fetched for it."""
        asked: dict[str, dict[int, list[str]]] = {}
        for answer in self._answers:
            asked.setdefault(answer["task"], {})[answer["item"]] = [answer["prompt"], answer["expected"]]
        return {name: digest_of({"items": list(items.values())}) for name, items in asked.items()}


TOKENS = pa.schema(
    {
        "run": pa.string(),
        "step": pa.int64(),
        "text": pa.string(),
        "row": pa.int32(),
        "kl": pa.list_(pa.float32()),
        "loss": pa.list_(pa.float32()),
    }
)


def evaluate_base(params: Params, base: Base, tasks: Path, heldout: Path, output: Path) -> None:
    """Measure the base model on the tasks of every adaptation, and show it in MLflow beside the runs."""
    evaluator = Evaluator(params, base, tasks, heldout)
    results = Results()

    def drift() -> Record:
        readings = evaluator.base_drift()
        return {"drift": figures(readings), "tokens": token_records(readings)}

    measured_with = _measured_with(params, tasks, heldout)
    with scratch(**base.identity, **measured_with) as unfinished:
        drifted = kept(unfinished / "drift.json", drift)
        results.drifted({"run": BASE, "step": 0}, drifted["tokens"])
        known: dict[str, list[Record]] = {}  # answers by task, each of which is asked once
        for name, task in params.tasks.items():
            asked = [*evaluator.tasks_of(task), *params.evaluation.at_best]
            new = [one for one in asked if one not in known]
            for answer in kept(unfinished / f"{name}.json", partial(evaluator.answers, new)):
                known.setdefault(answer["task"], []).append(answer)
            answered = [answer for one in asked for answer in known[one]]
            key = {"run": BASE, "method": BASE, "adaptation": name, "learning_rate": 0.0, "seed": 0, "step": 0}
            results.answered(key, answered)
            at_best = best_scores(answered, params.evaluation.at_best)
            results.metrics.append({**key, **scores(answered, task, params), **at_best, **drifted["drift"]})
        results.write(output, {}, {**base.identity, **measured_with, **evaluator.about})
    with sending(params.tracking) as sender:
        for record in base_records(output / METRICS_FILE, source_tags(params)):
            sender.send(record)


def evaluate_method(
    params: Params, method: str, base: Base, tasks: Path, heldout: Path, runs: Path, output: Path
) -> None:
    """Measure every checkpoint of every run of a method, and bring the runs in MLflow up to it.

    Raises:
        FoLoRAError: a run is missing or of another model, or an adapter changes nothing.
    """
    digests = {}
    for name in params.runs_of(method):
        manifest = read_manifest(runs / name, run=name, **base.identity)
        check_fields(runs / name, manifest["params"], **run_params(params, name))
        digests[name] = identity_of(manifest)
    evaluator = Evaluator(params, base, tasks, heldout)
    results = Results()
    measured_with = _measured_with(params, tasks, heldout)
    with scratch(runs=digests, **measured_with) as unfinished:
        for name in tqdm(digests, "evaluate", unit="run", disable=None):
            _measure(evaluator, params, name, runs / name, results, unfinished)
        if params.evaluation.at_best:
            _ask_at_best(evaluator, params.evaluation.at_best, runs, results, unfinished)
        results.write(output, digests, {**base.identity, **measured_with, **evaluator.about})
    source = source_tags(params)
    with sending(params.tracking) as sender:
        for name in digests:
            own = [record for record in results.metrics if record["run"] == name]
            sender.send(read_record(runs / name, own, source))


def _measured_with(params: Params, tasks: Path, heldout: Path) -> Record:
    """What a measurement depends on, beside the model that is measured."""
    return {
        "tasks": digest_of_folder(tasks),
        "heldout": digest_of_file(heldout),
        "params": params.model_dump(mode="json", include={"tasks", "evaluation"}),
    }


def _measure(evaluator: Evaluator, params: Params, name: str, folder: Path, results: Results, unfinished: Path) -> None:
    """Measure every checkpoint of a run that an earlier try has not."""
    run = params.runs[name]
    task = params.tasks[run.task]
    _, history = read_table(folder / HISTORY_FILE, artefact="history", run=name)
    key = {"run": name, "method": run.method, "adaptation": run.task, "learning_rate": run.learning_rate}
    later = dict.fromkeys(map(best_key, params.evaluation.at_best))
    *earlier, last = checkpoints_of(folder)
    for checkpoint in (*earlier, last):

        def measure(checkpoint: Path = checkpoint) -> Record:
            evaluator.load(checkpoint)
            readings = evaluator.drift()
            drift = figures(readings)
            if drift["kl"] == 0:
                raise FoLoRAError(
                    f"{checkpoint}: the adapter changes nothing (KL to the base is 0): train the run again"
                )
            tokens = token_records(readings) if checkpoint == last else []
            return {"drift": drift, "tokens": tokens, "answers": evaluator.answers(evaluator.tasks_of(task))}

        found = kept(unfinished / f"{name}-{checkpoint.name}.json", measure)
        key |= {"seed": run.seed, "step": int(checkpoint.name)}
        results.answered(key, found["answers"])
        results.drifted(key, found["tokens"])
        about = {**export_of(checkpoint), "trainable": history["trainable"]}
        results.metrics.append({**key, **scores(found["answers"], task, params), **later, **found["drift"], **about})


def _ask_at_best(evaluator: Evaluator, tasks: list[str], runs: Path, results: Results, unfinished: Path) -> None:
    """Ask the ends of the runs at the best rate of each adaptation what only they are asked."""
    for adaptation in dict.fromkeys(record["adaptation"] for record in results.metrics):
        own = [record for record in results.metrics if record["adaptation"] == adaptation]
        for record in best_finals(own).values():

            def ask(record: Record = record) -> list[Record]:
                evaluator.load(runs / record["run"] / CHECKPOINTS / str(record["step"]))
                return evaluator.answers(tasks)

            answered = kept(unfinished / f"{record['run']}-best.json", ask)
            results.answered({name: record[name] for name in KEY}, answered)
            record |= best_scores(answered, tasks)


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints of a run by ascending step.

    Raises:
        FoLoRAError: there are none.
    """
    folder = run / CHECKPOINTS
    found = sorted(folder.iterdir(), key=lambda path: int(path.name)) if folder.is_dir() else []
    if not found:
        raise FoLoRAError(f"{folder}: holds no checkpoint: delete the run and train it again")
    return found


def export_of(checkpoint: Path) -> Record:
    """What a checkpoint is: ``export`` (LoRA, DoRA or changed weights), ``rank`` (0 of weights) and ``bytes``.

    Raises:
        FoLoRAError: it holds neither an adapter nor weights.
    """
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    if (checkpoint / WEIGHTS_FILE).exists():
        return {"export": "weights", "rank": 0, "bytes": size}
    config = read_adapter_config(checkpoint)
    return {"export": "DoRA" if config.use_dora else "LoRA", "rank": config.r, "bytes": size}


def accuracies(answers: list[Record]) -> dict[str, float]:
    """Mean score of each task: the share of right answers, where an answer is right or wrong."""
    by_task: dict[str, list[float]] = {}
    for answer in answers:
        by_task.setdefault(answer["task"], []).append(answer["score"])
    return {name: sum(scores) / len(scores) for name, scores in by_task.items()}


def scores(answers: list[Record], task: Task, params: Params) -> Record:
    """Accuracies: ``target``, ``validation``, ``kept`` (mean of the kept tasks) and each kept task by itself."""
    accuracy = accuracies(answers)
    kept = [accuracy[name] for name in params.evaluation.kept]
    return {
        "target": accuracy[task.target],
        "validation": accuracy[task.validation],
        "kept": sum(kept) / len(kept),
        **{f"kept/{name}": accuracy[name] for name in params.evaluation.kept},
    }


def best_scores(answers: list[Record], tasks: list[str]) -> Record:
    """Accuracy of each task that is asked at the best rate only."""
    accuracy = accuracies(answers)
    return {best_key(name): accuracy[name] for name in tasks}


def best_key(task: str) -> str:
    """What the metrics call the accuracy of such a task."""
    return f"best/{task}"
