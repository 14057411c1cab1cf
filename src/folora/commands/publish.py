"""Send finished runs to a tracking server from their artefacts, whatever was lost on the way or made elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from folora.commands.results import results_of
from folora.errors import FoLoRAError
from folora.records import base_records, read_record, source_tags
from folora.selection import BASE
from folora.storage import MANIFEST_FILE, METRICS_FILE
from folora.tracking import send_all

if TYPE_CHECKING:
    from pathlib import Path

    from folora.params import Params


@dataclass
class Published:
    """What became of the runs of params.yaml.

    Attributes:
        sent: in the store now, with results.
        unmeasured: in the store now, without results, since they were trained after the last evaluation.
        missing: not trained yet.
    """

    sent: list[str] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def publish_runs(params: Params, runs: Path, evaluations: Path, uri: str) -> Published:
    """Send every run of params.yaml that is finished; twice is once.

    Raises:
        FoLoRAError: no run is finished, an artefact is damaged, or the store cannot be reached.
    """
    done = Published()
    records = []
    source = source_tags(params)
    for name, run in params.runs.items():
        folder = runs / run.method / name
        if not (folder / MANIFEST_FILE).exists():
            done.missing.append(name)
            continue
        metrics = evaluations / run.method / METRICS_FILE
        results = results_of(folder, metrics) if metrics.exists() else []
        records.append(read_record(folder, results, source))
        (done.sent if results else done.unmeasured).append(name)
    measured = evaluations / BASE / METRICS_FILE
    if records and measured.exists():
        records += base_records(measured, source)
        done.sent.append(BASE)
    if not records:
        raise FoLoRAError(f"{runs}: holds no finished run of params.yaml: run `dvc repro` first")
    send_all(uri, params.tracking.experiment, records)
    return done
