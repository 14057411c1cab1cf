"""The spectra of the layer inputs as rows: λ and gates for the figure, health for the table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from folora.health import breaches, too_few_tokens, too_many_loops, too_top_heavy
from folora.methods.folora import FoLoRA

if TYPE_CHECKING:
    from folora.params import Params
    from folora.report.inputs import SpectrumFigures
    from folora.storage import Record

POINTS = 60  # of each curve
LEAST = 1e-3  # a smaller λ is drawn there: a logarithmic axis has no zero
HEALTH = {  # title to field of a pencil's health record and format
    "width": ("width", "d"),
    "penalty rank": ("penalty_rank", ".1f"),
    "utility rank": ("utility_rank", ".1f"),
    "condition": ("condition", ".1e"),
    "top share": ("top_share", ".2f"),
    "residual": ("residual", ".0e"),
    "orthonormality": ("orthonormality", ".0e"),
    "shrinkage": ("shrinkage", "g"),
    "tokens per width": ("tokens_per_width", ".0f"),
    "halves differ": ("gate_difference", ".1%"),
    "tokens needed": ("tokens_needed", ",d"),
    "greatest λ": ("greatest", ".1f"),
    "mean gate": ("mean_gate", ".2f"),
    "gates over ½": ("open", ".0%"),
}


def gated_method(params: Params) -> tuple[str, FoLoRA] | tuple[None, None]:
    """The first method whose gates follow from the λ that are drawn: kind folora, soft gate, a number as τ."""
    drawn = next(iter(params.proxy.sources))
    for name, method in params.methods.items():
        if drawn not in {run.proxy for run in params.runs_of(name).values()}:
            continue
        # the control `uniform` is a FoLoRA with other gates
        if not isinstance(method, FoLoRA) or method.kind != "folora" or not isinstance(method.tau, float):
            continue
        if (method.gate, method.shrinkage) == ("soft", None) and method.basis in ("generalised", "random"):
            return name, method
    return None, None


def spectrum_rows(spectrum: SpectrumFigures, method: FoLoRA | None) -> list[Record]:
    """λ of every layer input at ``POINTS`` ranks, the greatest first, and its gate under a method if there is one."""
    rows = []
    for name, ascending in spectrum.eigenvalues.items():
        values: Any = ascending[::-1]
        opened = method.gates_of(values) if method else None
        ranks = np.unique(np.linspace(0, len(values) - 1, POINTS).round().astype(int))
        for rank in ranks.tolist():
            row = {"input": name, "kind": name.rpartition(".")[2], "share": (rank + 0.5) / len(values)}
            row |= {"eigenvalue": max(float(values[rank]), LEAST)}
            rows.append(row if opened is None else row | {"gate": float(opened[rank])})
    return rows


def health_rows(spectrum: SpectrumFigures, method: FoLoRA | None) -> list[Record]:
    """One row a layer input: its pencil's health record, the greatest λ, and what the gates leave open."""
    rows = []
    for name, ascending in spectrum.eigenvalues.items():
        values: Any = ascending
        row = {"input": name, **spectrum.health[name].model_dump(), "greatest": float(values.max())}
        if method:
            opened = method.gates_of(values)
            row |= {"mean_gate": float(opened.mean()), "open": float((opened > 0.5).mean())}
        rows.append(row)
    return rows


def health_cells(rows: list[Record]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of health records."""
    columns = {title: column for title, column in HEALTH.items() if column[0] in rows[0]}
    cells = [[row["input"], *(_cell(row[key], style) for key, style in columns.values())] for row in rows]
    return ["layer input", *columns], cells


def _cell(value: Any, style: str) -> str:
    return "–" if value is None else format(value, style)


def health_alarms(spectrum: SpectrumFigures) -> list[str]:
    """One line for whatever makes the λ of this spectrum, or gates made of them, less than certain."""
    about = spectrum.manifest
    warnings = (
        too_top_heavy(spectrum.health),
        too_few_tokens(spectrum.health, about["proxy_tokens"]),
        too_many_loops(about["sequences"], about["loops"]),
    )
    return [*breaches(spectrum.health), *filter(None, warnings)]


def health_note(spectrum: SpectrumFigures) -> str:
    """One line: how much text the moments are of, and the worst of all pencils."""
    health = spectrum.health.values()
    residual, orthonormality, condition, top_share = (
        max(getattr(one, name) for one in health) for name in ("residual", "orthonormality", "condition", "top_share")
    )
    left_out = max(one.left_out for one in health)
    shut = f" The directions that were left out have a λ of at most {left_out:.2g}, and are shut." if left_out else ""
    differences = [one.gate_difference for one in health if one.gate_difference is not None]
    halves = f"differ on at most {max(differences):.1%} of a layer's gates" if differences else "were not compared"
    return (
        f"{len(health)} layer inputs, moments of {spectrum.manifest['proxy_tokens']:,} proxy and "
        f"{spectrum.manifest['task_tokens']:,} task tokens. The worst pencil: residual {residual:.0e}, "
        f"deviation from orthonormality {orthonormality:.0e}, condition {condition:.0e}; "
        f"the greatest share of one direction in the proxy text's moment {top_share:.2f}. "
        f"Two halves of the proxy text {halves}; {spectrum.manifest['loops']:,} of its "
        f"{spectrum.manifest['sequences']:,} sequences end in a loop.{shut}"
    )
