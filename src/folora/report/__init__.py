"""The report stage: the comparison as a page, figures, tables, ``metrics.json`` and a summary for the terminal."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Any

from folora.report.inputs import read_inputs
from folora.report.study import make_studies
from folora.report.tables import checkpoint_rows, history_rows, kept_rows, match_rows, metrics, summary_rows
from folora.storage import publish, write_json

if TYPE_CHECKING:
    from pathlib import Path

    from folora.comparison import Record
    from folora.params import Params

PICTURES = ("frontier", "kept", "training")  # figures that are PNG files too


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

    from folora.report import figures
    from folora.report.page import page
    from folora.report.spectra import gated_method, spectrum_rows
    from folora.report.text import markdown, summary

    rows: dict[str, list[list[Record]]] = {
        "frontier": [checkpoint_rows(study) for study in studies],
        "kept": [kept_rows(study) for study in studies],
    }
    charts: dict[str, list[Any]] = {
        "frontier": [figures.frontier_chart(*pair) for pair in zip(studies, rows["frontier"], strict=True)],
        "kept": [figures.kept_chart(*pair) for pair in zip(studies, rows["kept"], strict=True)],
    }
    if runs:
        rows["training"] = [history_rows(study, inputs.histories) for study in studies]
        charts["training"] = [figures.training_chart(*pair) for pair in zip(studies, rows["training"], strict=True)]
    if spectra:
        gated = gated_method(params)[1]
        rows["spectrum"] = [spectrum_rows(inputs.spectra[study.name], gated) for study in studies]
        charts["spectrum"] = [figures.spectrum_chart(own) for own in rows["spectrum"]]
    text = summary(studies, params, output)
    with publish(output) as folder:
        folder.mkdir()
        write_json(folder / "metrics.json", metrics(studies))
        _write_csv(folder / "summary.csv", summary_rows(studies))
        _write_csv(folder / "matches.csv", match_rows(studies))
        for name, each in rows.items():
            _write_csv(folder / f"{name}.csv", [row for own in each for row in own])
        for name in PICTURES:
            if name in charts:
                names = (study.name for study in studies)
                picture = figures.stacked(list(zip(names, charts[name], strict=True)))
                picture.save(str(folder / f"{name}.png"), format="png", scale_factor=2)
        (folder / "index.html").write_text(page(params, inputs, studies, charts))
        (folder / "summary.txt").write_text(text)
        (folder / "summary.md").write_text(markdown(studies))
    print(text, end="")


def _write_csv(path: Path, rows: list[Record]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
