"""The page: what each section says, filled into ``page.html.j2``. It needs no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from folora.adapter_config import read_adapter_config
from folora.errors import FoLoRAError
from folora.report import text
from folora.report.answers import side_by_side
from folora.report.drift import at_best_cells, drift_cells, task_cells
from folora.report.figures import styled
from folora.report.spectra import gated_method, health_alarms, health_cells, health_note, health_rows
from folora.report.verdict import verdict
from folora.selection import BASE
from folora.serving import usage_of
from folora.significance import RESAMPLES
from folora.storage import ADAPTER, PEFT_CONFIG, digest_of, require

if TYPE_CHECKING:
    from jinja2 import Environment

    from folora.params import Params
    from folora.report.inputs import Inputs
    from folora.report.study import Study

FOLDER = Path(__file__).parent
COST_BEGIN, COST_END = "<!-- cost -->", "<!-- /cost -->"


def page(params: Params, inputs: Inputs, studies: list[Study], charts: list[dict[str, Any]]) -> str:
    """The report as one HTML page.

    Args:
        params: names methods and tasks.
        inputs: for answers, runs and spectra.
        studies: one an adaptation.
        charts: of each study, by the name of the figure.
    """
    from markupsafe import Markup
    from vl_convert import javascript_bundle

    specs = {f"{name}-{i}": _json(chart) for i, drawn in enumerate(charts) for name, chart in drawn.items()}
    template = _environment().get_template("page.html.j2")
    return template.render(
        studies=[_sections(params, inputs, study) for study in studies],
        means=text.mean_cells(studies),
        text=text,
        reference=params.report.reference,
        resamples=RESAMPLES,
        seeds=max(len(study.comparison.seeds) for study in studies),
        gated=gated_method(params)[0],
        snippets=[snippet for study in studies for snippet in _snippets(study, inputs)],
        digests=_digests(inputs),
        cost_begin=Markup(COST_BEGIN),
        cost_end=Markup(COST_END),
        charts={name: Markup(spec) for name, spec in specs.items()},
        style=Markup((FOLDER / "page.css").read_text()),
        script=Markup(javascript_bundle((FOLDER / "page.js").read_text())),
    )


def with_costs(path: Path, tables: list[tuple[str, list[str], list[list[str]]]]) -> str:
    """A page with tables of costs, each a note, a head and rows, in the section that has none.

    Raises:
        FoLoRAError: it is missing, or no page of the report stage.
    """
    before, begin, rest = require(path).read_text().partition(COST_BEGIN)
    _, end, after = rest.partition(COST_END)
    if not end:
        raise FoLoRAError(f"{path}: has no place for costs: run the report stage again")
    costs = _environment().get_template("costs.html.j2").render(tables=tables)
    return f"{before}{begin}{costs}{end}{after}"


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader

    return Environment(loader=FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True)


def _json(chart: Any) -> str:
    # a closing tag within a string would end the script element
    return json.dumps(styled(chart).to_dict(), separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")


def _sections(params: Params, inputs: Inputs, study: Study) -> dict[str, Any]:
    """What the sections say about one adaptation."""
    content: dict[str, Any] = {
        "name": study.name,
        "marked": [BASE, *study.highlighted],
        "verdict": verdict(study),
        "area_note": text.area_note(study),
        "rate_note": text.rate_note(study),
        "arms": text.arm_cells(study),
        "differences": text.difference_cells(study),
        "budgets": text.budget_cells(study),
        "costs": text.cost_cells(study, params),
        "drift": drift_cells(study.drift),
        "tasks": task_cells(study.tasks),
        "at_best": at_best_cells(study.at_best),
        "pairs": text.pair_cells(study),
        "pair_columns": text.shown_methods(study),
        "pairs_note": text.pairs_note(study),
        "answered_by": list(dict.fromkeys([BASE, study.reference, study.subject])),
        "answers": side_by_side(study, inputs.evaluations, params.tasks[study.name].target),
    }
    if study.name in inputs.spectra:
        spectrum, (_, gated) = inputs.spectra[study.name], gated_method(params)
        content["health"] = health_cells(health_rows(spectrum, gated))
        content["health_note"] = health_note(spectrum)
        content["health_alarms"] = health_alarms(spectrum)
    return content


def _snippets(study: Study, inputs: Inputs) -> list[dict[str, str]]:
    """How to use the subject's result of the first seed, at its best rate: ``title`` and ``code`` of each way."""
    if not inputs.runs:
        return []
    name = study.subject
    run, _ = next(iter(study.comparison.arms[name].finals.values()))
    adapter = inputs.runs / name / run / ADAPTER
    if not (adapter / PEFT_CONFIG).exists():  # only the foundation stage knows the base model's place
        return [
            {"title": f"{name} changed whole weights; how to load them:", "code": f"folora pick --task {study.name}"}
        ]
    model = read_adapter_config(adapter).base_model_name_or_path or ""
    how = usage_of(run, adapter, model, code=inputs.manifests[run]["loading"]["trust_remote_code"])
    load = {"title": f"The adapter of {name}, in Python:", "code": how.load}
    return [load, {"title": "Served by vLLM, on a machine that has it:", "code": how.serve}]


def _digests(inputs: Inputs) -> dict[str, str]:
    """What the results were made from: the parameters and inputs of all runs, and the base model."""
    if not inputs.manifests:
        return {}
    first = next(iter(inputs.manifests.values()))
    return {"runs (parameters and inputs)": digest_of(inputs.manifests), "base model": first["model"]}
