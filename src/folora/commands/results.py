"""What the evaluations found of the runs in params.yaml, as the commands ``compare`` and ``pick`` read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folora.errors import FoLoRAError
from folora.selection import BASE, last_checkpoints
from folora.storage import METRICS_FILE, read_table

if TYPE_CHECKING:
    from pathlib import Path

    from folora.params import Params
    from folora.selection import Record


def base_record(task: str, evaluations: Path) -> Record:
    """Metrics of the base model on the evaluation tasks of one adaptation.

    Raises:
        FoLoRAError: it was not measured.
    """
    return _find(BASE, "adaptation", task, evaluations)


def final_record(params: Params, run: str, evaluations: Path) -> Record:
    """Metrics of the last checkpoint of a run.

    Raises:
        FoLoRAError: the run is not in params.yaml, or was not measured.
    """
    if run not in params.runs:
        raise FoLoRAError(f"runs: {run!r} is not in params.yaml; there are {', '.join(params.runs)}")
    return _find(params.runs[run].method, "run", run, evaluations)


def _find(folder: str, column: str, value: str, evaluations: Path) -> Record:
    path = evaluations / folder / METRICS_FILE
    records = [row for row in read_table(path, artefact="metrics")[0].to_pylist() if row[column] == value]
    if not records:
        stage = "evaluate-base" if folder == BASE else f"evaluate@{folder}"
        raise FoLoRAError(f"{path}: no result of {value}: dvc repro {stage}")
    return last_checkpoints(records)[0]
