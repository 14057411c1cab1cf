"""What the evaluations found of the runs in params.yaml, as the commands beside the stages read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folora.errors import FoLoRAError
from folora.selection import BASE, last_checkpoints
from folora.storage import MANIFEST_FILE, METRICS_FILE, identity_of, read_json, read_table

if TYPE_CHECKING:
    from pathlib import Path

    from folora.params import Params
    from folora.storage import Record


def base_record(task: str, evaluations: Path) -> Record:
    """Metrics of the base model on the evaluation tasks of one adaptation.

    Raises:
        FoLoRAError: it was not measured.
    """
    path = evaluations / BASE / METRICS_FILE
    rows = read_table(path, artefact="metrics")[0].to_pylist()
    return _last([row for row in rows if row["adaptation"] == task], path, task, "evaluate-base")


def final_record(params: Params, run: str, runs: Path, evaluations: Path) -> Record:
    """Metrics of the last checkpoint of a run.

    Raises:
        FoLoRAError: the run is not in params.yaml, is not trained, or was not measured since.
    """
    if run not in params.runs:
        raise FoLoRAError(f"runs: {run!r} is not in params.yaml; there are {', '.join(params.runs)}")
    method = params.runs[run].method
    path = evaluations / method / METRICS_FILE
    return _last(results_of(runs / method / run, path), path, f"{run} as it is trained now", f"evaluate@{method}")


def results_of(run: Path, metrics: Path) -> list[Record]:
    """The rows of an evaluation that were measured on this very training of a run; none where it was another.

    Args:
        run: its folder.
        metrics: of the evaluation.

    Raises:
        FoLoRAError: one of them is missing or damaged.
    """
    table, about = read_table(metrics, artefact="metrics")
    measured = about.get("runs", {}).get(run.name) == identity_of(read_json(run / MANIFEST_FILE))
    return [row for row in table.to_pylist() if row["run"] == run.name] if measured else []


def _last(records: list[Record], path: Path, what: str, stage: str) -> Record:
    if not records:
        raise FoLoRAError(f"{path}: no result of {what}: dvc repro {stage}")
    return last_checkpoints(records)[0]
