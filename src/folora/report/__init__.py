"""The report stage: the comparison as a page, figures, tables, ``metrics.json`` and a summary for the terminal."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

from folora.report.figures import draw, stacked
from folora.report.inputs import read_inputs
from folora.report.page import page
from folora.report.study import make_studies
from folora.report.tables import figure_rows, match_rows, metrics, summary_rows
from folora.report.text import markdown, summary
from folora.storage import publish, write_json

if TYPE_CHECKING:
    from pathlib import Path

    from folora.params import Params
    from folora.storage import Record

PICTURES = {"frontier", "kept", "training"}  # figures that are PNG files too


def write_report(
    params: Params, evaluations: Path, output: Path, *, runs: Path | None = None, spectra: Path | None = None
) -> None:
    """Compare all methods, write the report folder and print the summary.

    Args:
        params: names methods, runs and tasks.
        evaluations: folder with the results of the base model and of every method.
        output: the folder to write.
        runs: folder with the runs; without it the page has no training curves and no adapter to serve.
        spectra: folder with the spectra; without it the page shows none.

    Raises:
        FoLoRAError: an input is missing or damaged, or lacks a run of params.yaml.
    """
    inputs = read_inputs(params, evaluations, runs, spectra)
    studies = make_studies(params, inputs)
    rows = [figure_rows(params, inputs, study) for study in studies]
    charts = [draw(study, own) for study, own in zip(studies, rows, strict=True)]
    text = summary(studies, params, output)
    with publish(output) as folder:
        folder.mkdir()
        write_json(folder / "metrics.json", metrics(studies))
        _write_csv(folder / "summary.csv", summary_rows(studies))
        _write_csv(folder / "matches.csv", match_rows(studies))
        _write_csv(folder / "drift.csv", [row for study in studies for row in study.drift])
        _write_csv(folder / "tasks.csv", [row for study in studies for row in study.tasks])
        if params.evaluation.at_best:
            _write_csv(folder / "at_best.csv", [row for study in studies for row in study.at_best])
        for name in rows[0]:
            _write_csv(folder / f"{name}.csv", [row for own in rows for row in own[name]])
        for name in PICTURES & charts[0].keys():
            picture = stacked([(study.name, own[name]) for study, own in zip(studies, charts, strict=True)])
            picture.save(str(folder / f"{name}.png"), format="png", scale_factor=2)
        (folder / "index.html").write_text(page(params, inputs, studies, charts))
        (folder / "summary.txt").write_text(text)
        (folder / "summary.md").write_text(markdown(studies, params))
    print(text, end="")


def _write_csv(path: Path, rows: list[Record]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
