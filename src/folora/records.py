"""What MLflow shows of a run, as plain values, and where they are kept when no server takes them.

A run's artefacts (manifest, history, metrics, adapter) hold its identity, curves and results, with equal bytes
wherever it is trained. What differs from one training to the next stands in a journal beside them: the time of each
reading, speed, load and memory, the git commit. Artefacts alone are enough to publish a run; a journal adds to them.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from folora.git import git
from folora.loading import Loading
from folora.params import flatten
from folora.presets import preset_of
from folora.selection import BASE
from folora.storage import (
    ADAPTER,
    CHECKPOINTS,
    HISTORY_FILE,
    MANIFEST_FILE,
    PEFT_WEIGHTS,
    Manifest,
    check_manifest,
    digest_of,
    digest_of_file,
    fields_of,
    identity_of,
    lines_of,
    read_json,
    read_table,
    require,
)

if TYPE_CHECKING:
    from folora.params import Params

JOURNALS = Path(".folora/tracking")


@dataclass(frozen=True)
class Card:
    """What a run is, from its manifest.

    Attributes:
        run: its name in params.yaml.
        title: method, learning rate and seed, for people.
        digest: identity of the manifest; two runs with equal ones are one.
        tags: to filter and group by.
        params: everything the result depends on, flat, with dotted keys.
        datasets: stage that makes the data, SHA-256, and what it is used for.
    """

    run: str
    title: str
    digest: str
    tags: dict[str, str]
    params: dict[str, Any]
    datasets: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Reading:
    """A metric at a step, read at a time in milliseconds."""

    key: str
    value: float
    step: int
    time: int


@dataclass(frozen=True)
class RunRecord:
    """A finished run: its card, tags of its source, every reading, and its adapter where that is small.

    Attributes:
        final_step: the step the adapter stems from.
        adapter: PEFT folder, or None of a method that exports whole weights.
    """

    card: Card
    source: dict[str, str]
    readings: list[Reading]
    final_step: int
    adapter: Path | None


class Part(BaseModel):
    """A part of a manifest."""

    model_config = ConfigDict(strict=True, frozen=True)


class RunEntry(Part):
    """The run's entry of params.yaml."""

    task: str
    method: str
    learning_rate: float
    seed: int


class MethodEntry(Part):
    """Its method's."""

    kind: str
    kl_budget: float | None = None


class RunParams(Part):
    """What ``params.run_params`` gives."""

    run: RunEntry
    method: MethodEntry


class RunInputs(Part):
    """Digests of what a run reads."""

    task: str
    proxy: list[str]
    heldout: str


class RunManifest(Part):
    """The fields of a run's manifest that its readers use."""

    run: str
    model: str
    tokenizer: str
    loading: Loading
    params: RunParams
    inputs: RunInputs


class HistoryManifest(Part):
    """The fields of the manifest of a run's history that are used here."""

    gates: dict[str, float] = {}


def read_manifest(folder: Path, **expected: Any) -> Manifest:
    """The checked manifest of a run's folder.

    Raises:
        FoLoRAError: it is missing, damaged or not a run's, or a field differs from ``expected``.
    """
    path = folder / MANIFEST_FILE
    manifest = read_json(path)
    check_manifest(folder, manifest, artefact="run", **expected)
    fields_of(path, RunManifest, manifest)
    return dict(manifest)


def card_of(manifest: Manifest) -> Card:
    """The card of the run with this manifest."""
    values, inputs = manifest["params"], manifest["inputs"]
    run, kind = values["run"], values["method"]["kind"]
    identity = {"model": manifest["model"], "tokenizer": manifest["tokenizer"]}
    return Card(
        run=manifest["run"],
        title=f"{run['method']} · {run['learning_rate']:g} · {run['seed']}",
        digest=identity_of(manifest),
        tags={"method": run["method"], "kind": kind, "task": run["task"], "run": manifest["run"]},
        params=flatten({**values, "inputs": inputs, **identity}),
        datasets=[
            (f"task@{run['task']}", inputs["task"], "training"),
            ("proxy", digest_of(inputs["proxy"]), "penalty and replay"),
            ("heldout", inputs["heldout"], "evaluation"),
        ],
    )


def source_tags(params: Params) -> dict[str, str]:
    """Where a run is made: git commit and whether the tree differs from it, dvc.lock, preset."""
    tags = {"preset": preset_of(params)}
    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "-uno", "--", ".", ":!dvc.lock")  # which every stage changes
    if commit is not None and changes is not None:
        tags |= {"mlflow.source.git.commit": commit.strip(), "git.dirty": str(bool(changes.strip())).lower()}
    lock = Path("dvc.lock")
    return tags | ({"dvc.lock": digest_of_file(lock)} if lock.is_file() else {})


class Journal:
    """Lines of JSON about one training, in ``.folora/tracking`` of the working folder; best effort, as tracking is.

    Args:
        digest: of the run.
        tags: of its source.
        begun: the step it goes on from; what a training that was cut short has noted after it is dropped.
    """

    def __init__(self, digest: str, tags: dict[str, str], begun: int = 0) -> None:
        self._path = journal_path(digest)
        readings = [one for one in read_journal(digest)[1] if 0 < one.step <= begun]
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.unlink(missing_ok=True)
        self._write({"tags": tags})
        for one in readings:
            self._write({"step": one.step, "time": one.time, "values": {one.key: one.value}})

    def add(self, values: dict[str, float], step: int) -> list[Reading]:
        """Keep the values of one step; returns them as readings."""
        now = int(time.time() * 1000)
        self._write({"step": step, "time": now, "values": values})
        return [Reading(key, value, step, now) for key, value in values.items()]

    def _write(self, line: dict[str, Any]) -> None:
        with suppress(OSError), self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def journal_path(digest: str) -> Path:
    """Where the journal of the run with this digest is kept."""
    return JOURNALS / f"{digest}.jsonl"


def read_journal(digest: str) -> tuple[dict[str, str], list[Reading]]:
    """Source tags and readings of a run's last training; empty where there is no journal."""
    tags: dict[str, str] = {}
    readings = []
    for text in lines_of(journal_path(digest)):
        with suppress(ValueError, LookupError, TypeError, AttributeError):  # a line that a full disk cut off
            line = json.loads(text)
            tags |= line.get("tags", {})
            readings += [
                Reading(key, value, line["step"], line["time"]) for key, value in line.get("values", {}).items()
            ]
    return tags, readings


def read_record(folder: Path, results: list[dict[str, Any]], source: dict[str, str]) -> RunRecord:
    """Everything known of a finished run.

    Args:
        folder: of the run.
        results: its rows of the evaluation's metrics, one a checkpoint; may be empty.
        source: tags of where it was made, where no journal says so.

    Raises:
        FoLoRAError: the folder is damaged or not a run's.
    """
    manifest = read_manifest(folder)
    path = folder / HISTORY_FILE
    history, about = read_table(path, {"step": "int64", "kl": "double"}, artefact="history", run=manifest["run"])
    gates = fields_of(path, HistoryManifest, about).gates
    card = card_of(manifest)
    tags, journal = read_journal(card.digest)
    curves, budget = history.to_pylist(), manifest["params"]["method"].get("kl_budget")
    rows = [*history_readings(curves, gates), *evaluation_readings(results)]
    if budget and curves:
        rows += [(key, value, 0) for key, value in budget_figures(budget, curves[-1]["kl"]).items()]
    now = int(time.time() * 1000)
    merged = {(key, step): Reading(key, value, step, now) for key, value, step in rows}
    merged |= {(reading.key, reading.step): reading for reading in journal}
    return RunRecord(
        card=card,
        source=tags or source,
        readings=list(merged.values()),
        final_step=max(int(checkpoint.name) for checkpoint in require(folder / CHECKPOINTS).iterdir()),
        adapter=peft_adapter(folder),
    )


def base_records(metrics: Path, source: dict[str, str]) -> list[RunRecord]:
    """The base model as a run of its own on every adaptation, for the others to be compared with.

    Args:
        metrics: of its evaluation.
        source: tags of where it was measured.

    Raises:
        FoLoRAError: the file is missing or damaged.
    """
    rows = read_table(metrics, artefact="metrics")[0].to_pylist()
    digest, now = digest_of_file(metrics), int(time.time() * 1000)
    records = []
    for row in rows:
        task = row["adaptation"]
        tags = {"method": BASE, "kind": BASE, "task": task, "run": BASE}
        card = Card(BASE, f"{BASE} · {task}", digest_of([digest, task]), tags, {}, [])
        readings = [Reading(key, value, step, now) for key, value, step in evaluation_readings([row])]
        records.append(RunRecord(card, source, readings, 0, None))
    return records


def peft_adapter(run: Path) -> Path | None:
    """The adapter in a run's folder; None of a method that exports whole weights, which no tracking server needs."""
    folder = run / ADAPTER
    return folder if (folder / PEFT_WEIGHTS).exists() else None


def history_readings(rows: list[dict[str, float]], gates: dict[str, float]) -> list[tuple[str, float, int]]:
    """Key, value and step of the curves and of the gates, which are constant."""
    curves = [(f"train/{key}", row[key], int(row["step"])) for row in rows for key in row if key != "step"]
    return [*curves, *((f"gate/{name}", gate, 0) for name, gate in gates.items())]


def budget_figures(budget: float, kl: float) -> dict[str, float]:
    """A KL budget and what training ended at."""
    return {"budget/allowed": budget, "budget/kl": kl}


def evaluation_readings(rows: list[dict[str, Any]]) -> list[tuple[str, float, int]]:
    """Key, value and step of what was measured at each checkpoint; the learning rate is a parameter."""
    return [
        (key, value, row["step"])
        for row in rows
        for key, value in row.items()
        if isinstance(value, float) and key != "learning_rate"
    ]
