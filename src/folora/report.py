"""The report stage: the comparison as a page, a figure, tables, ``metrics.json`` and a summary for the terminal."""

from __future__ import annotations

import csv
from dataclasses import asdict, fields
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from folora.comparison import FIGURES, Comparison, Match, compare, points
from folora.errors import FoLoRAError
from folora.frontier import pareto
from folora.storage import publish, read_table, write_json

if TYPE_CHECKING:
    import altair as alt

    from folora.comparison import Record
    from folora.params import Params

BASE = "base"
COLUMNS = ("method", "rate", "target", "kept", "KL", "ppl", "target*", "kept*", "gain*", "KL*", "ratio*")
PAIRS_NOTE = (
    "Every method (row) against every other (column) where both have the same target accuracy, that of the reference "
    "or the highest that both reach: what it keeps more, and how many times smaller its KL is."
)
TEMPLATES = Path(__file__).parent / "templates"


def write_report(params: Params, evaluations: Path, output: Path) -> None:
    """Compare all methods, write the report folder and print the summary.

    Raises:
        FoLoRAError: an evaluation is missing or damaged, or lacks a run of params.yaml.
    """
    bases = {record["adaptation"]: record for record in _read(evaluations / BASE / "metrics.parquet")}
    records = [r for method in params.methods for r in _read(evaluations / method / "metrics.parquet")]
    records = [record for record in records if record["run"] in params.runs]
    missing = params.runs.keys() - {record["run"] for record in records}
    missing |= {run.task for run in params.runs.values()} - bases.keys()
    missing |= {name for name in params.evaluation.kept for r in bases.values() if f"kept/{name}" not in r}
    if missing:
        raise FoLoRAError(f"{evaluations}: no result of {min(missing)}: run `dvc repro` for what is missing")

    comparisons = []
    for adaptation in dict.fromkeys(run.task for run in params.runs.values()):
        own = [record for record in records if record["adaptation"] == adaptation]
        if not any(record["method"] == params.report.reference for record in own):
            raise FoLoRAError(f"report.reference: {params.report.reference} has no run on {adaptation}: add one")
        comparisons.append(compare(adaptation, bases[adaptation], own, params.report.reference))
    reference = params.report.reference
    rows = checkpoint_rows(bases, records)
    chart = frontier_chart(rows)
    text = summary(comparisons, params, output)
    with publish(output) as folder:
        folder.mkdir()
        write_json(folder / "metrics.json", metrics(comparisons, reference))
        _write_csv(folder / "frontier.csv", rows)
        _write_csv(folder / "matches.csv", match_rows(comparisons))
        _write_csv(
            folder / "summary.csv", [_summary_row(c, m, reference) for c in comparisons for m in (BASE, *c.arms)]
        )
        chart.save(str(folder / "frontier.png"), format="png", scale_factor=2)
        (folder / "index.html").write_text(page(comparisons, chart, params))
        (folder / "summary.txt").write_text(text)
        (folder / "summary.md").write_text(markdown(comparisons, params))
    print(text, end="")


def _read(path: Path) -> list[Record]:
    table, _ = read_table(path, artefact="metrics")
    return table.to_pylist()


def metrics(comparisons: list[Comparison], reference: str) -> dict[str, Any]:
    """``{"base", "arms"}``; of several adaptations their means, and each by itself under ``adaptations``."""
    each: dict[str, dict[str, Any]] = {
        c.adaptation: {
            "base": {name: c.base[name] for name in ("target", "kept", "perplexity")},
            "arms": {
                arm.method: {"lr": arm.learning_rate}
                | {name: arm.figures[name] for name in ("target", "kept", "kl", "perplexity")}
                | _defined(_matched(arm.matches.get(reference)))
                for arm in c.arms.values()
            },
        }
        for c in comparisons
    }
    if len(each) == 1:
        return next(iter(each.values()))
    shared = [method for method in comparisons[0].arms if all(method in c.arms for c in comparisons)]
    return {
        "base": _means([one["base"] for one in each.values()]),
        "arms": {method: _means([one["arms"][method] for one in each.values()]) for method in shared},
        "adaptations": each,
    }


def _matched(match: Match | None) -> dict[str, float | None]:
    """A match as columns; empty cells for a method without one, as the reference itself."""
    return {f"matched_{field.name}": getattr(match, field.name, None) for field in fields(Match)}


def _defined(figures: dict[str, float | None]) -> dict[str, float]:
    """Without what has no value: DVC drops nulls when it shows metrics, so there are none."""
    return {name: value for name, value in figures.items() if value is not None}


def match_rows(comparisons: list[Comparison]) -> list[Record]:
    """One row for each ordered pair of methods."""
    names = ["adaptation", "method", "other", *(field.name for field in fields(Match))]
    return [
        dict(zip(names, (c.adaptation, arm.method, other, *asdict(match).values()), strict=True))
        for c in comparisons
        for arm in c.arms.values()
        for other, match in arm.matches.items()
    ]


def _means(tables: list[dict[str, Any]]) -> dict[str, float]:
    """Key-wise means of the figures; rates and matches differ between adaptations and stay with them."""
    return {
        name: fmean(t[name] for t in tables) for name in ("target", "kept", "kl", "perplexity") if name in tables[0]
    }


def checkpoint_rows(bases: dict[str, Record], records: list[Record]) -> list[Record]:
    """One row a checkpoint, and whether it lies on its method's frontier of kept accuracy or of KL."""
    names = ("adaptation", "method", "learning_rate", "seed", "step", *FIGURES)
    rows = [{name: record[name] for name in names} for record in (*bases.values(), *records)]
    for row in rows:
        base = bases[row["adaptation"]]
        own = [r for r in records if r["adaptation"] == row["adaptation"]]
        fronts = points(base, own, row["method"], row["seed"])
        for cost in ("kept", "kl"):
            on_front = {(p.target, getattr(p, cost)) for p in pareto(fronts, cost)}
            row[f"frontier_{cost}"] = (row["target"], row[cost]) in on_front
    return rows


def _write_csv(path: Path, rows: list[Record]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def _summary_row(comparison: Comparison, method: str, reference: str) -> Record:
    arm = comparison.arms.get(method)
    match = arm.matches.get(reference) if arm else None
    values = arm.figures if arm else comparison.base
    return {
        "adaptation": comparison.adaptation,
        "method": method,
        "learning_rate": arm.learning_rate if arm else None,
        **values,
        **_matched(match),
    }


def table_rows(comparison: Comparison, reference: str) -> list[list[str]]:
    """The comparison as cells, one row a method, after ``COLUMNS``."""

    def number(value: float | None, digits: int = 2) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    rows = []
    for method in (BASE, *comparison.arms):
        row = _summary_row(comparison, method, reference)
        rate = "–" if row["learning_rate"] is None else f"{row['learning_rate']:g}"
        figures = [number(row["target"]), number(row["kept"]), number(row["kl"], 3), number(row["perplexity"])]
        matched = [number(row["matched_target"]), number(row["matched_kept"]), number(row["matched_kept_gain"])]
        matched += [number(row["matched_kl"], 3), number(row["matched_kl_ratio"], 1)]
        rows.append([method, rate, *figures, *matched])
    return rows


def summary(comparisons: list[Comparison], params: Params, output: Path) -> str:
    """The comparison on one screen of a terminal, and where to look next."""
    from io import StringIO

    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(file=StringIO(), width=100)
    for comparison in comparisons:
        title = f"{comparison.adaptation}: each method at its best learning rate"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for column in COLUMNS:
            table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
        for row in table_rows(comparison, params.report.reference):
            table.add_row(*row)
        console.print(table)
        console.print(f"* {matched_note(params.report.reference)}")
    console.print(f"\nThe page: {output / 'index.html'}   The figure: {output / 'frontier.png'}")
    console.print(f"Every run: mlflow ui --backend-store-uri {params.tracking.uri}   Figures: dvc metrics show")
    return console.file.getvalue()  # type: ignore[attr-defined]


def markdown(comparisons: list[Comparison], params: Params) -> str:
    """The tables of the comparison in Markdown, to paste where results are discussed."""

    def table(head: tuple[str, ...], rows: list[list[str]]) -> str:
        lines = [head, ("---",) + ("---:",) * (len(head) - 1), *rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    parts = []
    for comparison in comparisons:
        kept = params.evaluation.kept
        reference = params.report.reference
        parts += [f"### {comparison.adaptation}\n", table(COLUMNS, table_rows(comparison, reference))]
        parts += [f"\\* {matched_note(reference)}\n", table(("method", *kept), kept_rows(comparison, kept))]
        parts += [f"{PAIRS_NOTE}\n", table(("method", *comparison.arms), pair_rows(comparison))]
    return "\n".join(parts)


def matched_note(reference: str) -> str:
    """What the starred columns mean."""
    return (
        f"on the frontier over rates and checkpoints, at the target accuracy of {reference} or the highest that the "
        f"method also reaches: kept accuracy and what it gains over {reference}'s, KL and how many times smaller it is"
    )


def pair_rows(comparison: Comparison) -> list[list[str]]:
    """Every method (row) against every other (column) as cells, after ``PAIRS_NOTE``."""
    return [
        [name, *(_pair(arm.matches[other]) if other in arm.matches else "" for other in comparison.arms)]
        for name, arm in comparison.arms.items()
    ]


def _pair(match: Match) -> str:
    ratio = "–" if match.kl_ratio is None else f"{match.kl_ratio:.1f}×"
    return f"{match.kept_gain:+.2f}, {ratio}"


def kept_rows(comparison: Comparison, kept: list[str]) -> list[list[str]]:
    """Accuracy of each kept task as cells, one row a method."""
    return [
        [method, *(f"{figures[f'kept/{name}']:.2f}" for name in kept)]
        for method, figures in {BASE: comparison.base, **{n: a.figures for n, a in comparison.arms.items()}}.items()
    ]


def page(comparisons: list[Comparison], chart: alt.TopLevelMixin, params: Params) -> str:
    """The report as one HTML page that needs no network."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    kept = params.evaluation.kept
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True)
    adaptations = [
        {
            "name": comparison.adaptation,
            "rows": table_rows(comparison, params.report.reference),
            "pairs": pair_rows(comparison),
            "kept_rows": kept_rows(comparison, kept),
        }
        for comparison in comparisons
    ]
    return environment.get_template("report.html.j2").render(
        comparison=adaptations,
        columns=COLUMNS,
        kept=kept,
        matched_note=matched_note(params.report.reference),
        pairs_note=PAIRS_NOTE,
        chart=Markup(chart.to_html(inline=True, fullhtml=False)),
    )


def frontier_chart(rows: list[Record]) -> alt.TopLevelMixin:
    """Target against kept accuracy, and target against KL: a point a checkpoint, a line a method's frontier."""
    import altair as alt

    methods = [method for method in dict.fromkeys(row["method"] for row in rows) if method != BASE]
    charts = []
    for adaptation in dict.fromkeys(row["adaptation"] for row in rows):
        own = [row for row in rows if row["adaptation"] == adaptation]
        kept = alt.Y("kept:Q", title="kept accuracy (mean, test)", scale=alt.Scale(domain=[0, 1]))
        kl = alt.Y("kl:Q", title="KL to the base (nats per token)", scale=alt.Scale(type="log"))
        title = f"{adaptation} (black: the base model)"
        charts.append(
            alt.hconcat(_panel(own, methods, "kept", kept), _panel(own, methods, "kl", kl)).properties(title=title)
        )
    return alt.vconcat(*charts).configure_view(strokeWidth=0)


def _panel(rows: list[Record], methods: list[str], cost: str, y: alt.Y) -> alt.LayerChart | alt.FacetChart:
    import altair as alt

    x = alt.X("target:Q", title="target accuracy (test)", scale=alt.Scale(domain=[0, 1]))
    color = alt.Color("method:N", scale=alt.Scale(domain=methods, scheme="tableau10"), title=None)
    adapted = [row for row in rows if row["method"] != BASE]
    front = [row for row in adapted if row[f"frontier_{cost}"]]
    if cost == "kept":  # every method starts at the base; its KL is zero and has no place on a logarithmic axis
        bases = [row for row in rows if row["method"] == BASE]
        starts = dict.fromkeys((row["method"], row["seed"]) for row in adapted)
        front = [{**base, "method": method, "seed": seed} for base in bases for method, seed in starts] + front
    every = alt.Chart(alt.Data(values=adapted))
    tooltip = ["method:N", "learning_rate:Q", "seed:N", "step:Q", "target:Q", "kept:Q", "kl:Q"]
    layers = [
        alt.Chart(alt.Data(values=front)).mark_line(strokeWidth=2).encode(x, y, color, detail="seed:N"),
        every.mark_point(filled=True, size=45, opacity=0.6).encode(x, y, color, tooltip=tooltip),
    ]
    if cost == "kept":
        start = alt.Chart(alt.Data(values=bases))
        layers.append(start.mark_point(shape="diamond", filled=True, size=110, color="black").encode(x, y))
    return alt.layer(*layers).properties(width=360, height=320)
