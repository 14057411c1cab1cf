"""What the report is drawn from, read from the artefacts of other stages and checked. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from folora.errors import FoLoRAError
from folora.health import SpectrumManifest
from folora.paired import BASE_CHECKPOINT
from folora.records import read_manifest
from folora.selection import BASE
from folora.storage import (
    ANSWERS_FILE,
    HISTORY_FILE,
    METRICS_FILE,
    TOKENS_FILE,
    digest_of_file,
    fields_of,
    read_table,
    require,
    tensor_manifest,
)

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from folora.comparison import Checkpoint
    from folora.health import HealthRecord
    from folora.paired import Answers
    from folora.params import Params
    from folora.storage import Record


NAMES = {"run": "string", "step": "int64"}  # of a checkpoint
METRICS_COLUMNS = NAMES | {
    **dict.fromkeys(("method", "adaptation"), "string"),
    **dict.fromkeys(("learning_rate", "target", "validation", "kept", "kl", "perplexity"), "double"),
    "seed": "int64",
}
ANSWERS_COLUMNS = NAMES | {"adaptation": "string", "task": "string", "item": "int64", "score": "double"}
TOKENS_COLUMNS = NAMES | {"text": "string", "kl": "[double]", "loss": "[double]"}


@dataclass(frozen=True)
class SpectrumFigures:
    """A spectrum, or a part of one: its manifest, and health and λ (d,) of every layer input, ascending."""

    manifest: Record
    health: dict[str, HealthRecord]
    eigenvalues: dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Tokens:
    """Drift on a text: sums of KL and loss over the tokens of each row, and how many those are; (rows,) each."""

    kl: NDArray[np.float64]
    loss: NDArray[np.float64]
    counts: NDArray[np.float64]


@dataclass(frozen=True)
class Inputs:
    """All that the report is drawn from.

    Attributes:
        evaluations: folder of the evaluations.
        runs: folder of the runs, or None.
        bases: metrics of the base model, by adaptation.
        records: metrics of every checkpoint of every run of params.yaml.
        answers: of each adaptation, right or wrong (items,) by checkpoint and task.
        manifests: of every run, by name; empty without ``runs``.
        histories: of every run, by name, a row a reading; empty without ``runs``.
        spectra: by adaptation; empty where the report does without.
    """

    evaluations: Path
    runs: Path | None
    bases: dict[str, Record]
    records: list[Record]
    answers: dict[str, Answers]
    manifests: dict[str, Record]
    histories: dict[str, list[Record]]
    spectra: dict[str, SpectrumFigures]


def read_inputs(params: Params, evaluations: Path, runs: Path | None, spectra: Path | None) -> Inputs:
    """Read the evaluations, and the runs and spectra where their folders are given.

    Raises:
        FoLoRAError: something is missing or damaged, or an evaluation lacks a run of params.yaml.
    """
    bases = {record["adaptation"]: record for record in _metrics(evaluations / BASE)}
    records = [record for method in params.methods for record in _metrics(evaluations / method)]
    records = [record for record in records if record["run"] in params.runs]
    adaptations = {run.task for run in params.runs.values()}
    missing = params.runs.keys() - {record["run"] for record in records}
    missing |= adaptations - bases.keys()
    missing |= {name for name in params.evaluation.kept for r in bases.values() if f"kept/{name}" not in r}
    if missing:
        raise FoLoRAError(f"{evaluations}: no result of {min(missing)}: run `dvc repro` for what is missing")
    folders = {name: runs / run.method / name for name, run in params.runs.items()} if runs else {}
    source = next(iter(params.proxy.sources))  # the first is the one that is shown
    folders_of_spectra = {name: spectra / name / source for name in sorted(adaptations)} if spectra else {}
    return Inputs(
        evaluations=evaluations,
        runs=runs,
        bases=bases,
        records=records,
        answers=_all_scores(evaluations, [BASE, *params.methods], params.evaluation.at_best),
        manifests={name: read_manifest(folder, run=name) for name, folder in folders.items()},
        histories={name: _history(folder, name) for name, folder in folders.items()},
        spectra={name: read_figures(*params.spectrum.files(folder)) for name, folder in folders_of_spectra.items()},
    )


def read_answers(folder: Path, adaptation: str, checkpoint: Checkpoint) -> list[Record]:
    """What a checkpoint answered, a row an item, with ``prompt``, ``expected``, ``answer`` and ``score``."""
    import pyarrow.compute as pc

    table = _beside_metrics(folder, ANSWERS_FILE, ANSWERS_COLUMNS, "answers")
    chosen = (pc.field("adaptation") == adaptation) & (pc.field("run") == checkpoint[0])
    return table.filter(chosen & (pc.field("step") == checkpoint[1])).to_pylist()


def read_tokens(folder: Path, checkpoint: Checkpoint) -> dict[str, Tokens]:
    """What a checkpoint's drift is at every token of each text, by the text's name."""
    import pyarrow.compute as pc

    table = _beside_metrics(folder, TOKENS_FILE, TOKENS_COLUMNS, "tokens")
    rows = table.filter((pc.field("run") == checkpoint[0]) & (pc.field("step") == checkpoint[1])).to_pylist()
    found = {}
    for name in dict.fromkeys(row["text"] for row in rows):
        own = [row for row in rows if row["text"] == name]
        kl, loss = (np.array([sum(row[figure]) for row in own]) for figure in ("kl", "loss"))
        found[name] = Tokens(kl, loss, np.array([len(row["kl"]) for row in own]))
    return found


def read_figures(*paths: Path) -> SpectrumFigures:
    """Read the eigenvalues and the manifest of a spectrum from all of its parts, and none of its matrices.

    Health beyond its limits is no error here: the page is to show it.

    Raises:
        FoLoRAError: missing, damaged, or another artefact.
    """
    parts = [_read_part(path) for path in paths]
    health, eigenvalues = (
        {name: value for part in parts for name, value in getattr(part, field).items()}
        for field in ("health", "eigenvalues")
    )
    return SpectrumFigures(parts[0].manifest, health, eigenvalues)  # what is read of a manifest they have alike


def _read_part(path: Path) -> SpectrumFigures:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(require(path), framework="np") as file:
            manifest = tensor_manifest(file, path, artefact="spectrum")
            health = fields_of(path, SpectrumManifest, manifest).health
            eigenvalues = {name: file.get_tensor(f"{name}.eigenvalues") for name in health}
    except (SafetensorError, OSError, TypeError, AttributeError) as error:  # of a type that numpy does not have
        raise FoLoRAError(f"{path}: damaged or truncated ({error}): delete it and run its stage again") from error
    for name, values in eigenvalues.items():
        left_out = health[name].width - values.size
        if values.ndim != 1 or not 0 <= left_out < health[name].width or not np.isfinite(values).all():
            limit = health[name].width
            raise FoLoRAError(f"{path}: {name}: has not up to {limit} finite eigenvalues: run its stage again")
        eigenvalues[name] = np.concatenate([np.zeros(left_out), values])
    return SpectrumFigures(manifest, health, eigenvalues)


def _metrics(folder: Path) -> list[Record]:
    table, _ = read_table(folder / METRICS_FILE, METRICS_COLUMNS, artefact="metrics")
    return table.to_pylist()


def _beside_metrics(folder: Path, file: str, columns: dict[str, str], artefact: str) -> Any:
    """A table that was written together with the metrics."""
    return read_table(folder / file, columns, artefact=artefact, metrics=digest_of_file(folder / METRICS_FILE))[0]


def _scores(folder: Path) -> dict[tuple[str, str, int, str], NDArray[np.float64]]:
    """Scores (items,) by adaptation, run, step and task."""
    keys = ["adaptation", "run", "step", "task"]
    groups = (
        _beside_metrics(folder, ANSWERS_FILE, ANSWERS_COLUMNS, "answers")
        .sort_by("item")
        .group_by(keys, use_threads=False)
        .aggregate([("score", "list")])
    )
    names = zip(*(groups[key].to_pylist() for key in keys), strict=True)
    each = (answers.values.to_numpy(zero_copy_only=False) for answers in groups["score_list"])
    return dict(zip(names, each, strict=True))


def _all_scores(evaluations: Path, folders: list[str], at_best: list[str]) -> dict[str, Answers]:
    """The answers of every checkpoint, by adaptation; all to the same items, but for tasks that only some are asked."""
    answers: dict[str, Any] = {}
    for folder in folders:
        for (adaptation, run, step, task), scores in _scores(evaluations / folder).items():
            answers.setdefault(adaptation, {}).setdefault((run, step), {})[task] = scores
    for adaptation, by_checkpoint in answers.items():
        if BASE_CHECKPOINT not in by_checkpoint:
            raise FoLoRAError(f"{evaluations}: no answers of the base model to {adaptation}: run `dvc repro`")
        expected = {task: len(scores) for task, scores in by_checkpoint[BASE_CHECKPOINT].items()}
        always = expected.keys() - set(at_best)
        for (run, _), by_task in by_checkpoint.items():
            found = {task: len(scores) for task, scores in by_task.items()}
            if not (always <= found.keys() and found.items() <= expected.items()):
                raise FoLoRAError(f"{evaluations}: {run} answered other items than the base model: evaluate both again")
    return answers


def _history(folder: Path, name: str) -> list[Record]:
    table, _ = read_table(folder / HISTORY_FILE, artefact="history", run=name)
    return table.to_pylist()
