"""The figures: frontiers, kept abilities, forgetting over training, spectra. Each draws rows prepared elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt

from folora.paired import SIGNIFICANT

if TYPE_CHECKING:
    from folora.report.study import Study
    from folora.storage import Record

INK = "currentColor"  # of the page around it, dark or light; black in a picture
COLORS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2", "#9d755d", "#2ca6a4", "#d6a700", "#7f7f7f", "#ff7fb3")
SHAPES = ("circle", "square", "triangle-up", "diamond")  # the next one when the colours are used up
CROWD = 8  # with more methods, those that are not highlighted start faint
WIDTH, HEIGHT = 360, 300
DIVERGING = ["#b2182b", "#f4f4f4", "#2166ac"]


def draw(study: Study, rows: dict[str, list[Record]]) -> dict[str, Any]:
    """A chart for each of the figures that there are rows for.

    Args:
        study: names methods and tasks.
        rows: of ``tables.figure_rows``.
    """
    charts: dict[str, Any] = {
        "frontier": frontier_chart(study, rows["frontier"]),
        "kept": kept_chart(study, rows["kept"]),
    }
    if "training" in rows:
        charts["training"] = training_chart(study, rows["training"])
    if "spectrum" in rows:
        charts["spectrum"] = spectrum_chart(rows["spectrum"])
    return charts


def frontier_chart(study: Study, rows: list[Record]) -> alt.HConcatChart:
    """Target against kept accuracy, and target against KL: a point a checkpoint, a line a seed's frontier.

    The last checkpoints at a method's best rate have their intervals as thin lines.

    Args:
        study: names the methods.
        rows: of ``tables.checkpoint_rows``.
    """
    look = Look(study)
    target = _accuracy_axis(alt.X("target:Q", title="target accuracy"))
    tooltip: list[Any] = ["method:N", alt.Tooltip("learning_rate:Q", title="rate"), "seed:N", "step:Q"]
    tooltip += [alt.Tooltip(f"{name}:Q", format=".3f") for name in ("target", "kept", "kl")]
    kept = _accuracy_axis(alt.Y("kept:Q", title="kept accuracy"))
    kl = _log_axis(alt.Y("kl:Q", title="KL to the base (nats per token)"))
    base = _chart(rows[:1]).mark_point(shape="diamond", filled=True, size=160, color=INK, opacity=1)
    adapted = rows[1:]
    # every method starts at the base; its KL is zero and has no place on a logarithmic axis
    starts = dict.fromkeys((row["method"], row["seed"]) for row in adapted)
    start = [{**rows[0], "method": method, "seed": seed} for method, seed in starts]
    by_kept = [*start, *(row for row in adapted if row["frontier_kept"])]
    by_kl = [row for row in adapted if row["frontier_kl"]]
    left = alt.layer(
        look.lines(by_kept).encode(target, kept, detail="seed:N").add_params(look.selection),
        look.intervals(adapted, "kept").encode(target),
        look.intervals(adapted, "target").encode(kept),
        look.points(adapted).encode(target, kept, tooltip=tooltip),
        base.encode(target, kept, tooltip=alt.value("the base model")),
    )
    right = alt.layer(
        look.lines(by_kl).encode(target, kl, detail="seed:N"),
        look.intervals(adapted, "kl").encode(target),
        look.intervals(adapted, "target").encode(kl),
        look.points(adapted).encode(target, kl, tooltip=tooltip),
    )
    return _side_by_side(left, right)


def training_chart(study: Study, rows: list[Record]) -> alt.HConcatChart:
    """Penalty and KL against the training step, a line a seed.

    Args:
        study: names the methods.
        rows: of ``tables.history_rows``.
    """
    look = Look(study)
    step = alt.X("step:Q", title="step")
    panels: list[Any] = []
    for name, title in (("penalty", "penalty (relative change on proxy text)"), ("kl", "KL to the base")):
        positive = [row for row in rows if row[name] > 0]  # a logarithmic axis has no zero
        value = _log_axis(alt.Y(f"{name}:Q", title=title))
        tooltip: list[Any] = ["method:N", "seed:N", "step:Q", alt.Tooltip(f"{name}:Q", format=".3g")]
        lines = look.lines(positive).encode(step, value, detail="seed:N")
        points = look.points(positive, size=18).encode(step, value, tooltip=tooltip)
        panels.append(alt.layer(lines if panels else lines.add_params(look.selection), points))
    return _side_by_side(*panels)


def kept_chart(study: Study, rows: list[Record]) -> alt.LayerChart:
    """Change of every kept ability from the base model as a heat map; a star marks the significant ones.

    Args:
        study: names methods and tasks.
        rows: of ``tables.kept_rows``.
    """
    shown = [row | {"mark": f"{row['change']:+z.2f}{'*' if row['p'] < SIGNIFICANT else ''}"} for row in rows]
    chart = _chart(shown).encode(
        alt.X("task:N", title=None, sort=study.kept).axis(orient="top", labelAngle=0),
        alt.Y("method:N", title=None, sort=list(study.comparison.arms)).axis(labelLimit=200),
        tooltip=[
            *("method:N", "task:N"),
            *(alt.Tooltip(f"{name}:Q", format=".3f") for name in ("accuracy", "base", "change")),
            alt.Tooltip("p:Q", title="corrected p", format=".2g"),
        ],
    )
    color = alt.Color("change:Q", title="change").scale(domain=[-1, 0, 1], range=DIVERGING).legend(None)
    ink = alt.when("abs(datum.change) > 0.55").then(alt.value("white")).otherwise(alt.value("#222"))
    return (chart.mark_rect().encode(color) + chart.mark_text(fontSize=11).encode(text="mark:N", color=ink)).properties(
        width=alt.Step(60), height=alt.Step(24)
    )


def spectrum_chart(rows: list[Record]) -> alt.HConcatChart:
    """λ of every layer input by the rank of the direction, and the gate of each.

    Args:
        rows: of ``spectra.spectrum_rows``; without ``gate`` the right panel is left out.
    """
    share = alt.X("share:Q", title="share of the directions").axis(format="%", tickCount=5)
    color = alt.Color("kind:N", title=None)
    tooltip = ["input:N", alt.Tooltip("eigenvalue:Q", format=".3g", title="λ"), alt.Tooltip("share:Q", format=".0%")]
    lines = _chart(rows).mark_line(strokeWidth=1.5, opacity=0.7).encode(share, color, detail="input:N")
    left = lines.encode(_log_axis(alt.Y("eigenvalue:Q", title="λ: utility per penalty")), tooltip=tooltip)
    if "gate" not in rows[0]:
        return _side_by_side(left)
    gate = alt.Tooltip("gate:Q", format=".2f")
    right = lines.encode(_accuracy_axis(alt.Y("gate:Q", title="gate")), tooltip=[*tooltip, gate])
    return _side_by_side(left, right)


def stacked(charts: list[tuple[str, Any]]) -> alt.VConcatChart:
    """Charts of several adaptations below each other, for a picture on white ground."""
    titled = [chart.properties(title=title) for title, chart in charts]
    return styled(alt.vconcat(*titled, spacing=30).resolve_scale(color="independent", shape="independent"))


def styled(chart: Any) -> Any:
    """A chart in the ink of what is around it."""
    soft = "#88888844"
    axis = {"labelColor": INK, "titleColor": INK, "domainColor": soft, "tickColor": soft, "gridColor": soft}
    legend = {"labelColor": INK, "orient": "bottom", "columns": 5, "symbolLimit": 0, "labelLimit": 200}
    title = {"color": INK, "anchor": "start"}
    return chart.configure(view={"stroke": None}, axis=axis, title=title, legend=legend)


class Look:
    """How the methods of a study look in every figure: a colour and a shape each, faint unless chosen in the legend.

    The first layer of a figure must hold ``selection``: the legend of all is made from that layer's.
    """

    def __init__(self, study: Study) -> None:
        names = list(dict.fromkeys([*study.highlighted, *study.comparison.arms]))
        chosen = [{"method": name} for name in study.highlighted] if len(names) > CROWD else alt.Undefined
        count = len(COLORS)
        name = "chosen_" + "".join(c if c.isalnum() else "_" for c in study.name)
        self.selection = alt.selection_point(name, fields=["method"], bind="legend", toggle="true", value=chosen)
        colors = [COLORS[i % count] for i in range(len(names))]
        shapes = [SHAPES[i // count % len(SHAPES)] for i in range(len(names))]
        self._color = alt.Color("method:N", title=None).scale(domain=names, range=colors)
        self._shape = alt.Shape("method:N", title=None).scale(domain=names, range=shapes)
        self._opacity = alt.when(self.selection).then(alt.value(0.9)).otherwise(alt.value(0.07))
        bold = alt.FieldOneOfPredicate(field="method", oneOf=study.highlighted)
        self._width = alt.when(bold).then(alt.value(3)).otherwise(alt.value(1.5))

    def lines(self, rows: list[Record]) -> alt.Chart:
        """Lines in the methods' colours, the highlighted ones bold."""
        return _chart(rows).mark_line().encode(self._color, opacity=self._opacity, strokeWidth=self._width)

    def points(self, rows: list[Record], size: int = 55) -> alt.Chart:
        """Points in the methods' colours and shapes."""
        marks = _chart(rows).mark_point(filled=True, size=size)
        return marks.encode(self._color, self._shape, opacity=self._opacity)

    def intervals(self, rows: list[Record], figure: str) -> alt.Chart:
        """Thin lines over the interval of a figure, along its axis, where a row has one."""
        low, high = f"{figure}_low", f"{figure}_high"
        marks = _chart([row for row in rows if row[low] is not None]).mark_rule(strokeWidth=1)
        ends = {"x": low, "x2": high} if figure == "target" else {"y": low, "y2": high}
        encoded = {axis: f"{name}:Q" if axis in "xy" else name for axis, name in ends.items()}
        return marks.encode(self._color, opacity=self._opacity, **encoded)


def _accuracy_axis(axis: Any) -> Any:
    return axis.scale(domain=[0, 1])


def _log_axis(axis: Any) -> Any:
    return axis.scale(type="log").axis(tickCount=5, format="~g")


def _chart(rows: list[Record]) -> alt.Chart:
    return alt.Chart(alt.Data(values=rows))


def _side_by_side(*panels: Any) -> alt.HConcatChart:
    return alt.hconcat(*(panel.properties(width=WIDTH, height=HEIGHT) for panel in panels), spacing=30)
