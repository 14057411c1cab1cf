"""The evaluate stage: every checkpoint of every run of a method on the target and the kept tasks, in one process.

Scores come from the lm-evaluation-harness; KL to the base and perplexity from held-out proxy text. A folder of results
holds ``metrics.parquet`` (a row a checkpoint) and ``answers.parquet`` (a row an item, so that methods can be compared
item by item). The metrics of a method also say what it costs: ``trainable`` parameters, and of the checkpoint what it
is (``export``), its ``rank`` and its ``bytes``.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from folora.adapter import WEIGHTS_FILE, load_checkpoint
from folora.comparison import BASE
from folora.divergence import Divergence, HeldOutText
from folora.errors import FoLoRAError
from folora.harness import Harness
from folora.params import run_params
from folora.proxy import HELDOUT
from folora.records import base_records, read_record, source_tags
from folora.storage import (
    MANIFEST_FILE,
    METRICS_FILE,
    check_fields,
    check_manifest,
    digest_of,
    digest_of_file,
    publish,
    read_json,
    read_table,
    write_table,
)
from folora.tracking import sending

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftModel
    from transformers import PreTrainedModel

    from folora.base import Base
    from folora.params import Params

Record = dict[str, Any]


class Evaluator:
    """Measures models on tasks and held-out text; the base model's part is computed once."""

    def __init__(self, params: Params, base: Base, tasks: Path, heldout: Path) -> None:
        settings = params.proxy.heldout_sampling()
        table, _ = read_table(heldout, artefact="proxy", **base.identity, shard=HELDOUT, proxy=settings)
        self.base = base
        self.tokenizer = base.load_tokenizer()
        self.model = base.load_model()
        self._kept = params.evaluation.kept
        self._harness = Harness(tasks, params.evaluation, self.tokenizer)
        self._text = HeldOutText(
            self.model, table["token_ids"].to_pylist(), params.evaluation.batch_size, self.tokenizer.pad_token_id
        )

    def divergence(self, model: PreTrainedModel | PeftModel) -> Divergence:
        """KL to the base and perplexity on the held-out text."""
        return self._text.measure(model)

    def base_divergence(self) -> Divergence:
        """The same of the base model itself, before anything is loaded on it."""
        return self._text.measure(self.model, lambda batch: self.model(**batch, use_cache=False).logits)

    def answers(self, model: PreTrainedModel | PeftModel, task_names: list[str]) -> list[Record]:
        """Ask every item of the named tasks; see ``Harness.answers``."""
        return self._harness.answers(model, task_names)

    def tasks_of(self, settings: Any) -> list[str]:
        """Names of the evaluation tasks of one adaptation: target, validation and kept."""
        return [settings.target, settings.validation, *self._kept]


def evaluate_base(params: Params, base: Base, tasks: Path, heldout: Path, output: Path) -> None:
    """Measure the base model on the tasks of every adaptation, and show it in MLflow beside the runs."""
    evaluator = Evaluator(params, base, tasks, heldout)
    metrics: list[Record] = []
    answers: list[Record] = []
    for name, settings in params.tasks.items():
        key = {"run": BASE, "method": BASE, "adaptation": name, "learning_rate": 0.0, "seed": 0, "step": 0}
        answered = evaluator.answers(evaluator.model, evaluator.tasks_of(settings))
        metrics.append({**key, **scores(answered, settings, params), **asdict(evaluator.base_divergence())})
        answers += [{**key, **answer} for answer in answered]
    _write(output, metrics, answers, {})
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
    evaluator = Evaluator(params, base, tasks, heldout)
    metrics: list[Record] = []
    answers: list[Record] = []
    digests: dict[str, str] = {}
    source = source_tags(params)
    model: PreTrainedModel | PeftModel = evaluator.model
    with sending(params.tracking) as sender:
        for name in params.runs_of(method):
            manifest = read_json(runs / name / MANIFEST_FILE)
            check_manifest(runs / name, manifest, artefact="run", run=name, **base.identity)
            check_fields(runs / name, manifest["params"], **run_params(params, name))
            digests[name] = digest_of(manifest)
            _, history = read_table(runs / name / "history.parquet", artefact="history", run=name)
            results = []
            for checkpoint in checkpoints_of(runs / name):
                model = load_checkpoint(model, checkpoint)
                record, answered = _measure(evaluator, model, params, name, checkpoint)
                results.append({**record, "trainable": history["trainable"]})
                answers += answered
            metrics += results
            sender.send(read_record(runs / name, results, source))
        _write(output, metrics, answers, digests)


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints of a run by ascending step.

    Raises:
        FoLoRAError: there are none.
    """
    folder = run / "checkpoints"
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
    config = read_json(checkpoint / "adapter_config.json")
    return {"export": "DoRA" if config["use_dora"] else "LoRA", "rank": config["r"], "bytes": size}


def _measure(
    evaluator: Evaluator, model: PreTrainedModel | PeftModel, params: Params, name: str, checkpoint: Path
) -> tuple[Record, list[Record]]:
    """The metrics of one checkpoint of a run, and its answers."""
    run = params.runs[name]
    settings = params.tasks[run.task]
    divergence = evaluator.divergence(model)
    if divergence.kl == 0:
        raise FoLoRAError(f"{checkpoint}: the adapter changes nothing (KL to the base is 0): train the run again")
    answered = evaluator.answers(model, evaluator.tasks_of(settings))
    key = {"run": name, "method": run.method, "adaptation": run.task, "learning_rate": run.learning_rate}
    key |= {"seed": run.seed, "step": int(checkpoint.name)}
    figures = {**scores(answered, settings, params), **asdict(divergence)}
    return {**key, **figures, **export_of(checkpoint)}, [{**key, **answer} for answer in answered]


def accuracies(answers: list[Record]) -> dict[str, float]:
    """Mean score of each task: the share of right answers, where an answer is right or wrong."""
    by_task: dict[str, list[float]] = {}
    for answer in answers:
        by_task.setdefault(answer["task"], []).append(answer["score"])
    return {name: sum(scores) / len(scores) for name, scores in by_task.items()}


def scores(answers: list[Record], settings: Any, params: Params) -> Record:
    """Accuracies: ``target``, ``validation``, ``kept`` (mean of the kept tasks) and each kept task by itself."""
    accuracy = accuracies(answers)
    kept = [accuracy[name] for name in params.evaluation.kept]
    return {
        "target": accuracy[settings.target],
        "validation": accuracy[settings.validation],
        "kept": sum(kept) / len(kept),
        **{f"kept/{name}": accuracy[name] for name in params.evaluation.kept},
    }


def _write(output: Path, metrics: list[Record], answers: list[Record], runs: dict[str, str]) -> None:
    """Write the results; ``runs`` holds the digest of each run they were measured on."""
    with publish(output) as folder:
        folder.mkdir()
        about = {"artefact": "metrics", "runs": runs}
        write_table(folder / METRICS_FILE, pa.Table.from_pylist(metrics), about)
        manifest = {"artefact": "answers", "metrics": digest_of_file(folder / METRICS_FILE)}
        write_table(folder / "answers.parquet", pa.Table.from_pylist(answers), manifest)
