from __future__ import annotations

import csv
import math
import re
import shutil
import struct
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import ROOT
from ruamel.yaml import YAML

from folora.comparison import compare
from folora.errors import FoLoRAError
from folora.params import Params
from folora.report import write_report
from folora.report.drift import TASK_FIGURES, task_rows
from folora.report.text import BUDGETS_NOTE, COSTS_NOTE, MEANS_NOTE, RATE_NOTE, TASKS_NOTE, differences_note
from folora.significance import RESAMPLES, SEED
from folora.storage import digest_of_file, read_json, read_table, read_tensors, write_table, write_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Pipeline, Refused, SaveParams

KEPT = ["home", "loud"]
ITEMS = 20
Results = dict[str, tuple[str, float, list[tuple[float, ...]]]]
# run: method, learning rate, then (step, target, validation, kept, kl) of every checkpoint
RESULTS: Results = {
    "lora-low": ("lora", 0.001, [(3, 0.2, 0.9, 0.85, 0.1), (6, 0.4, 0.5, 0.8, 0.2)]),
    "lora-high": ("lora", 0.01, [(3, 0.5, 0.1, 0.5, 0.6), (6, 0.6, 0.7, 0.4, 1.0)]),
    "folora": ("folora-replay", 0.01, [(3, 0.5, 0.4, 0.75, 0.1), (6, 0.7, 0.8, 0.65, 0.3)]),
}
MANY: Results = RESULTS | {
    f"other-{n}": (f"other-{n}", 0.01, [(6, 0.05 * (n % 12 + 2), 0.5, 0.1 + 0.03 * n, 0.1 * (n + 1))])
    for n in range(23)
}
SECTIONS = [
    "verdict",
    "frontier",
    "methods",
    "kept",
    "drift",
    "training",
    "spectrum",
    "answers",
    "cost",
    "reproduce",
    "serve",
]


def record(run: str, method: str, rate: float, checkpoint: tuple[float, ...], adaptation: str) -> dict[str, Any]:
    step, target, validation, kept, kl = checkpoint
    own = {"run": run, "method": method, "adaptation": adaptation, "learning_rate": rate, "seed": 0, "step": int(step)}
    figures = {"target": target, "validation": validation, "kept": kept, "kl": kl, "perplexity": 5 + kl}
    cost = {} if method == "base" else {"trainable": 1234, "export": "LoRA", "rank": 4, "bytes": 56_789}
    return own | figures | {"kept/home": kept + 0.05, "kept/loud": kept - 0.05} | cost


def answers(row: dict[str, Any]) -> list[dict[str, Any]]:
    """As many right answers as the record says, to the first items of each task."""
    own = {name: row[name] for name in ("run", "method", "adaptation", "learning_rate", "seed", "step")}
    shares = {"subtraction": row["target"], **{task: row[f"kept/{task}"] for task in KEPT}}
    return [
        own
        | {"task": task, "item": item, "prompt": f"{task} <{item}>", "expected": "yes"}
        | {"answer": "yes" if item < round(ITEMS * share) else "</script>", "score": float(item < round(ITEMS * share))}
        for task, share in shares.items()
        for item in range(ITEMS)
    ]


def write_results(folder: Path, adaptations: list[str], results: Results = RESULTS) -> None:
    base = [record("base", "base", 0.0, (0, 0.1, 0.1, 0.9, 0.0), adaptation) for adaptation in adaptations]
    write_evaluation(folder / "base", base)
    for method in {method for method, _, _ in results.values()}:
        records = [
            record(f"{run}-{adaptation}", method, rate, checkpoint, adaptation)
            for adaptation in adaptations
            for run, (of, rate, checkpoints) in results.items()
            for checkpoint in checkpoints
            if of == method
        ]
        write_evaluation(folder / method, records)


def write_evaluation(folder: Path, records: list[dict[str, Any]]) -> None:
    write_table(folder / "metrics.parquet", pa.Table.from_pylist(records), {"artefact": "metrics"})
    manifest = {"artefact": "answers", "metrics": digest_of_file(folder / "metrics.parquet")}
    rows = [row for one in records for row in answers(one)]
    write_table(folder / "answers.parquet", pa.Table.from_pylist(rows), manifest)
    tokens = [
        {"run": one["run"], "step": one["step"], "text": "heldout", "row": row}
        | {"kl": [one["kl"]] * (row + 1), "loss": [math.log(one["perplexity"])] * (row + 1)}
        for one in records
        for row in range(4)
    ]
    write_table(folder / "tokens.parquet", pa.Table.from_pylist(tokens), manifest | {"artefact": "tokens"})


def values(adaptations: list[str], results: Results = RESULTS) -> dict[str, Any]:
    content = YAML(typ="safe", pure=True).load(ROOT / "workflow" / "presets" / "tiny.yaml")
    content["tasks"] = dict.fromkeys(adaptations, content["tasks"]["subtraction"])
    content["evaluation"]["kept"] = KEPT
    content["methods"] |= {method: {"kind": "lora"} for method, _, _ in results.values() if method.startswith("other")}
    content["runs"] = {
        f"{run}-{adaptation}": {
            "task": adaptation,
            "proxy": "sampled",
            "method": method,
            "learning_rate": rate,
            "seed": 0,
        }
        for adaptation in adaptations
        for run, (method, rate, _) in results.items()
    }
    return content


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


class Page(HTMLParser):
    """Checks that every element is closed where it should be; collects ids, links and text outside of scripts."""

    VOID = frozenset({"meta", "link", "br", "img", "hr", "input"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(path.read_text())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [str(value) for name, value in attrs if name == "id"]
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


@pytest.fixture(scope="module")
def params() -> Params:
    return Params.model_validate(values(["subtraction"]))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, params: Params) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_results(folder / "evaluation", ["subtraction"])
    write_report(params, folder / "evaluation", folder / "report")
    return folder / "report"


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, pipeline: Pipeline, runs: Path, evaluations: Path) -> Path:
    """The report of the tiny pipeline, with every section."""
    folder = tmp_path_factory.mktemp("full") / "report"
    write_report(pipeline.params, evaluations, folder, runs=runs, spectra=pipeline.spectra.parent.parent)
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of 25 methods."""
    folder = tmp_path_factory.mktemp("many")
    write_results(folder / "evaluation", ["subtraction"], MANY)
    write_report(Params.model_validate(values(["subtraction"], MANY)), folder / "evaluation", folder / "report")
    return folder / "report"


def test_metrics(report: Path) -> None:
    found = read_json(report / "metrics.json")
    assert found.keys() == {"base", "arms"}
    assert found["base"] == {"target": 0.1, "kept": 0.9, "perplexity": 5.0}
    lora, folora = found["arms"]["lora"], found["arms"]["folora-replay"]
    # the rate with the better validation accuracy at the last checkpoint
    assert lora.items() >= {"lr": 0.01, "target": 0.6, "kept": 0.4, "kl": 1.0, "perplexity": 6.0}.items()
    assert folora.items() >= {"lr": 0.01, "target": 0.7, "kept": 0.65, "kl": 0.3, "perplexity": 5.3}.items()
    # at LoRA's target accuracy, halfway between its own two checkpoints
    expected = {"target": 0.6, "kept": 0.7, "kl": 0.2, "kept_gain": 0.3, "kl_ratio": 5.0}
    for name, value in expected.items():
        assert folora[f"matched_{name}"] == pytest.approx(value)
        assert f"matched_{name}" not in lora  # the reference has no match with itself; DVC shows no nulls
    assert folora["matched_kept_gain_low"] < 0.3 < folora["matched_kept_gain_high"]
    assert folora["hypervolume"] == pytest.approx(0.4 * 0.75 + 0.2 * 0.65)
    pairs = {(row["method"], row["other"]): row for row in read_csv(report / "matches.csv")}
    assert pairs.keys() == {("lora", "folora-replay"), ("folora-replay", "lora")}
    assert float(pairs["lora", "folora-replay"]["kept_gain"]) == pytest.approx(-0.3)


def test_several_adaptations_are_averaged(tmp_path: Path) -> None:
    better = {run: (m, rate, [(c[0], c[1] + 0.1, *c[2:]) for c in cs]) for run, (m, rate, cs) in RESULTS.items()}
    write_results(tmp_path / "evaluation", ["x", "y"])
    write_results(tmp_path / "better", ["y"], better)
    for method in ("lora", "folora-replay"):
        path = f"{method}/metrics.parquet"
        rows = [r for r in read_table(tmp_path / "evaluation" / path)[0].to_pylist() if r["adaptation"] == "x"]
        write_evaluation(tmp_path / "evaluation" / method, rows + read_table(tmp_path / "better" / path)[0].to_pylist())
    write_report(Params.model_validate(values(["x", "y"])), tmp_path / "evaluation", tmp_path / "report")
    found = read_json(tmp_path / "report" / "metrics.json")
    assert found["arms"]["lora"]["target"] == pytest.approx(0.65)
    assert found["arms"]["folora-replay"]["kl"] == pytest.approx(0.3)
    assert [one["arms"]["lora"]["target"] for one in found["adaptations"].values()] == pytest.approx([0.6, 0.7])
    assert found["base"]["kept"] == pytest.approx(0.9)
    assert "kl" not in found["base"]
    gains = [one["arms"]["folora-replay"]["matched_kept_gain"] for one in found["adaptations"].values()]
    assert found["arms"]["folora-replay"]["matched_kept_gain"] == pytest.approx(sum(gains) / 2)
    _, _, means = (tmp_path / "report" / "summary.md").read_text().partition("### Mean\n")
    assert "| lora | 0.65 |" in means
    assert "| folora-replay |" in means
    assert MEANS_NOTE in (tmp_path / "report" / "index.html").read_text()
    assert len((tmp_path / "report" / "summary.txt").read_text().splitlines()) <= 30
    assert {row["adaptation"] for row in read_csv(tmp_path / "report" / "kept.csv")} == {"x", "y"}


@pytest.mark.parametrize("name", ["report", "full", "many"])
def test_page_is_whole_and_needs_no_network(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    page = Page(folder / "index.html")
    assert [section for section in page.ids if section in SECTIONS] == SECTIONS
    assert not [link for link in page.links if not link.startswith("#")]
    content = (folder / "index.html").read_text()
    style = content[content.index("<style>") : content.index("</style>")]
    assert not re.findall(r"@import|url\(", style)
    assert "prefers-color-scheme" in style
    assert str(folder.parent) not in content
    drawn = set(re.findall(r'data-chart="([^"]+)"', content))
    assert drawn == set(re.findall(r'<script type="application/json" id="([^"]+)"', content))
    assert {chart.partition("-")[0] for chart in drawn} >= {"frontier", "kept"}


@pytest.mark.parametrize("figure", ["frontier", "training"])
def test_methods_are_chosen_in_the_legend(figure: str, full: Path) -> None:
    from vl_convert import vegalite_to_vega

    content = (full / "index.html").read_text()
    spec = re.search(f'<script type="application/json" id="{figure}-0">(.*?)</script>', content, re.DOTALL)
    assert spec is not None
    (legend,) = vegalite_to_vega(spec[1])["legends"]
    assert legend["encode"]["labels"]["interactive"]


def test_page_tells_what_the_tables_tell(report: Path) -> None:
    text = Page(report / "index.html").text
    (lora, folora) = (row for row in read_csv(report / "summary.csv") if row["method"] != "base")
    gain = [float(folora[f"matched_kept_gain{end}"]) for end in ("", "_low", "_high")]
    assert "{:+.2f} [{:.2f}, {:.2f}]".format(*gain) in text
    assert "{:.2f} more than lora at the target accuracy 0.60 (95 % interval {:.2f} to {:.2f})".format(*gain) in text
    assert f"{float(lora['hypervolume']):.2f}" in text
    assert "1,234" in text
    assert "57 kB" in text
    assert f"{float(folora['kept_gain_p']):.3f}" in text
    for sentence in ("The report was made without --runs.", "The report was made without --spectra."):
        assert sentence in text
    assert "home <" in text  # a prompt, escaped
    assert "✗" not in text  # it is drawn by the style sheet


def test_page_of_the_pipeline(full: Path, pipeline: Pipeline, runs: Path) -> None:
    text = Page(full / "index.html").text
    assert "The report was made without" not in text
    assert pipeline.base.identity["model"] in text
    run = "folora-replay-1e-2-s0"
    adapter = runs / "folora-replay" / run / "adapter"
    served = f"--enable-lora --max-lora-rank 8 --lora-modules {run}={adapter}"
    assert f"vllm serve {pipeline.foundation} {served}" in text
    assert f"{str(adapter)!r})" in text
    assert "share of the update that folora-replay keeps" in text
    assert "model.layers.0.self_attn.q_proj" in text


@pytest.mark.parametrize(
    ("name", "pictures"), [("report", ["frontier", "kept"]), ("full", ["frontier", "kept", "training"])]
)
def test_figures_are_pngs(name: str, pictures: list[str], request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    assert sorted(path.stem for path in folder.glob("*.png")) == pictures
    for picture in pictures:
        content = (folder / f"{picture}.png").read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", content[16:24])
        assert width > 300
        assert height > 100
        assert content.endswith(b"IEND\xaeB`\x82")


def test_tables(report: Path) -> None:
    rows = read_csv(report / "frontier.csv")
    assert [row["method"] for row in rows] == ["base", *["lora"] * 4, *["folora-replay"] * 2]
    best = [row for row in rows if row["kept_low"]]
    assert [(row["method"], row["learning_rate"], row["step"]) for row in best] == [
        ("lora", "0.01", "6"),
        ("folora-replay", "0.01", "6"),
    ]
    for row in best:
        for figure in ("target", "kept"):
            assert float(row[f"{figure}_low"]) < float(row[figure]) < float(row[f"{figure}_high"])
    on_front = {(row["method"], row["target"]) for row in rows if row["frontier_kept"] == "True"}
    assert on_front >= {("folora-replay", "0.7"), ("lora", "0.6"), ("base", "0.1")}
    summary = {row["method"]: row for row in read_csv(report / "summary.csv")}
    assert list(summary) == ["base", "lora", "folora-replay"]
    assert float(summary["folora-replay"]["kept/home"]) == pytest.approx(0.7)
    assert (summary["folora-replay"]["trainable"], summary["folora-replay"]["export"]) == ("1234", "LoRA")
    assert summary["base"]["learning_rate"] == summary["lora"]["kept_gain"] == ""
    # at the best rates: 5 of 20 items of each kept task are right with folora-replay only
    assert float(summary["folora-replay"]["kept_gain"]) == pytest.approx(0.25)
    assert float(summary["folora-replay"]["kept_gain_p"]) == pytest.approx(2 / 2**10)
    kept = {(row["method"], row["task"]): row for row in read_csv(report / "kept.csv")}
    assert float(kept["lora", "home"]["change"]) == pytest.approx(-0.5)
    assert float(kept["lora", "home"]["p"]) == pytest.approx(4 * 2 / 2**10)  # Holm, the smallest of four
    assert "–" in (report / "summary.md").read_text()


def test_both_tell_what_is_trained_and_which_differences_are_told_apart(report: Path) -> None:
    text, page = (report / "summary.md").read_text(), Page(report / "index.html").text
    row = next(row for row in read_csv(report / "summary.csv") if row["method"] == "folora-replay")
    cells = []
    for figure in ("kept", "target"):
        value, low, high, p = (float(row[f"{figure}_gain{end}"]) for end in ("", "_low", "_high", "_p"))
        cells += [f"{value:+.2f} [{low:z.2f}, {high:z.2f}]", f"{p:.3f}"]
    assert f"| folora-replay | {' | '.join(cells)} |" in text
    assert "| lora | 1,234 | unchanged | LoRA | 4 | 57 kB |" in text
    for note in (differences_note("lora"), COSTS_NOTE):
        assert note in text
        assert note in page
    assert "folora cost shows them" in COSTS_NOTE


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("pissa", "W - s B₀A₀"),
        ("lora-null", "W - s B₀A₀"),
        ("osf", "trained"),
        ("full", "trained"),
        ("dora", "unchanged"),
    ],
)
def test_a_method_that_changes_the_base_weights_says_so(kind: str, expected: str, tmp_path: Path) -> None:
    write_results(tmp_path / "evaluation", ["subtraction"])
    content = values(["subtraction"])
    content["methods"]["lora"] = {"kind": kind}
    write_report(Params.model_validate(content), tmp_path / "evaluation", tmp_path / "report")
    assert f"| lora | 1,234 | {expected} |" in (tmp_path / "report" / "summary.md").read_text()
    assert f"<td>{expected}</td>" in (tmp_path / "report" / "index.html").read_text()


@pytest.mark.parametrize(
    ("validation", "best", "expected", "shown"),
    [
        ((0.5, 0.7, 0.6), "0.01", "", "0.01"),
        ((0.5, 0.6, 0.7), "0.1", "highest", "0.1 ↑"),
        ((0.7, 0.6, 0.7), "0.001", "lowest", "0.001 ↓"),
    ],
)
def test_a_best_rate_at_an_end_of_those_tried_is_marked(
    validation: tuple[float, ...], best: str, expected: str, shown: str, tmp_path: Path
) -> None:
    tried: Results = {
        f"lora-{n}": ("lora", 10 ** (n - 3), [(6, 0.5, value, 0.5, 0.1)]) for n, value in enumerate(validation)
    }
    results = tried | {"folora": RESULTS["folora"]}  # with one rate, which is no end
    write_results(tmp_path / "evaluation", ["subtraction"], results)
    write_report(Params.model_validate(values(["subtraction"], results)), tmp_path / "evaluation", tmp_path / "report")
    rows = {
        row["method"]: (row["learning_rate"], row["rate_is"]) for row in read_csv(tmp_path / "report" / "summary.csv")
    }
    assert rows == {"base": ("", ""), "lora": (best, expected), "folora-replay": ("0.01", "")}
    text = (tmp_path / "report" / "summary.md").read_text()
    assert f"| lora | {shown} |" in text
    assert "| folora-replay | 0.01 |" in text
    page = Page(tmp_path / "report" / "index.html")
    assert f"<td>{shown}</td>" in (tmp_path / "report" / "index.html").read_text()
    assert (RATE_NOTE in text, RATE_NOTE in page.text) == (bool(expected), bool(expected))


def test_drift_has_intervals_over_the_rows_of_a_text(full: Path, evaluations: Path) -> None:
    drift = {(row["method"], row["text"]): row for row in read_csv(full / "drift.csv")}
    assert drift.keys() == {(method, "heldout") for method in ("base", "lora", "folora-replay")}
    for (method, _), row in drift.items():
        metrics = read_table(evaluations / method / "metrics.parquet")[0].to_pylist()[-1]
        for figure in ("kl", "perplexity"):
            value, low, high = (float(row[f"{figure}{end}"]) for end in ("", "_low", "_high"))
            assert value == pytest.approx(metrics[figure], rel=1e-5)
            assert low < value < high or low == value == high == 0
    page = Page(full / "index.html").text
    assert f"{float(drift['lora', 'heldout']['kl']):.3f} [" in page


def test_tasks_of_the_best_rate_are_shown(tmp_path: Path) -> None:
    write_results(tmp_path / "evaluation", ["subtraction"])
    for folder in (tmp_path / "evaluation").iterdir():
        table, about = read_table(folder / "answers.parquet")
        asked = [
            row | {"task": "exact"} for row in table.to_pylist() if row["task"] == "home" and row["step"] in (0, 6)
        ]
        write_table(folder / "answers.parquet", pa.Table.from_pylist([*table.to_pylist(), *asked]), about)
    content = values(["subtraction"])
    content["evaluation"]["at_best"] = ["exact"]
    write_report(Params.model_validate(content), tmp_path / "evaluation", tmp_path / "report")
    scores = {row["method"]: row for row in read_csv(tmp_path / "report" / "at_best.csv")}
    assert [round(float(scores[m]["score"]), 2) for m in ("base", "lora", "folora-replay")] == [0.95, 0.45, 0.7]
    assert float(scores["lora"]["score_low"]) < 0.45 < float(scores["lora"]["score_high"])
    assert "0.45 [" in (tmp_path / "report" / "summary.md").read_text()


def bootstrapped(values: Any) -> tuple[float, float, float]:
    """Mean over seeds and items of (seeds, items), and its 95 % interval, resample by resample."""
    values = np.atleast_2d(values)
    seeds, items = values.shape
    by_item, by_seed = np.random.default_rng(SEED + 1), np.random.default_rng(SEED)
    means = [
        by_seed.multinomial(seeds, [1 / seeds] * seeds)
        @ values
        @ by_item.multinomial(items, [1 / items] * items)
        / (seeds * items)
        for _ in range(RESAMPLES)
    ]
    return values.mean(), *np.quantile(means, [0.025, 0.975])


def test_tasks_scored_by_likelihood_have_a_log_loss(tmp_path: Path, params: Params) -> None:
    """The target is scored by likelihood, ``home`` with shares of which some are 0, ``loud`` right or wrong."""
    write_results(tmp_path / "evaluation", ["subtraction"])
    generator, scores = np.random.default_rng(3), {}
    for method in ("base", "folora-replay", "lora"):
        path = tmp_path / "evaluation" / method / "answers.parquet"
        table, about = read_table(path)
        rows = table.to_pylist()
        for row in rows:
            if row["task"] == "subtraction":
                row["score"] = generator.uniform(0.01, 0.99)
            elif row["task"] == "home":
                row["score"] *= 0.5
        write_table(path, pa.Table.from_pylist(rows), about)
        last = rows[-3 * ITEMS :]
        scores[method] = {
            task: np.array([r["score"] for r in last if r["task"] == task]) for task in ("subtraction", *KEPT)
        }
    write_report(params, tmp_path / "evaluation", tmp_path / "report")
    rows = {(row["method"], row["task"]): row for row in read_csv(tmp_path / "report" / "tasks.csv")}
    assert list(rows) == [(m, t) for t in ("subtraction", *KEPT) for m in ("base", "lora", "folora-replay")]
    text = (tmp_path / "report" / "summary.md").read_text()
    page = (tmp_path / "report" / "index.html").read_text()
    assert TASKS_NOTE in text
    assert TASKS_NOTE in page
    subjects = scores["folora-replay"]
    for (method, task), row in rows.items():
        own, its = scores[method][task], subjects[task]
        expected = {"score": own, "score_difference": its - own}
        if task == "subtraction":
            expected |= {"log_loss": -np.log(own), "log_loss_difference": np.log(own) - np.log(its)}
        cells = []
        for figure in TASK_FIGURES:
            found = [row[figure + end] for end in ("", "_low", "_high")]
            if figure not in expected or (method == "folora-replay" and figure.endswith("difference")):
                assert found == [""] * 3
                cells.append("–")
            else:
                assert [float(one) for one in found] == pytest.approx(bootstrapped(expected[figure]), abs=1e-9)
                cells.append("{:z.3f} [{:z.3f}, {:z.3f}]".format(*map(float, found)))
        assert f"| {method} | {task} | {' | '.join(cells)} |" in text
        assert "".join(f"<td>{cell}</td>" for cell in (task, *cells)) in page


def test_budgets_stand_beside_the_kl(report: Path, tmp_path: Path) -> None:
    content = values(["subtraction"])
    content["methods"]["lora"]["kl_budget"] = 1.25
    write_results(tmp_path / "evaluation", ["subtraction"])
    write_report(Params.model_validate(content), tmp_path / "evaluation", tmp_path / "report")
    summary = {row["method"]: row for row in read_csv(tmp_path / "report" / "summary.csv")}
    assert (summary["lora"]["kl_budget"], summary["lora"]["greatest_kl"]) == ("1.25", "1.0")
    assert summary["base"]["kl_budget"] == summary["folora-replay"]["kl_budget"] == ""
    assert "| lora | 1.25 | 1 | 1 |\n\n" in (tmp_path / "report" / "summary.md").read_text()
    assert BUDGETS_NOTE in Page(tmp_path / "report" / "index.html").text
    # nothing of it without a budget
    assert "kl_budget" not in "".join((report / f"summary.{end}").read_text() for end in ("csv", "md"))
    assert BUDGETS_NOTE not in (report / "index.html").read_text()


def test_without_likelihoods_there_is_no_log_loss(report: Path) -> None:
    rows = {(row["method"], row["task"]): row for row in read_csv(report / "tasks.csv")}
    assert float(rows["lora", "home"]["score"]) == pytest.approx(0.45)
    assert float(rows["lora", "home"]["score_difference"]) == pytest.approx(0.25)
    assert {row["log_loss"] for row in rows.values()} == {""}
    for name in ("summary.md", "index.html"):
        assert "log-loss" not in (report / name).read_text()


def test_tasks_are_compared_on_the_seeds_of_the_reference() -> None:
    """FoLoRA has a seed more than the reference, another method one less."""
    seeds = {"lora": [0, 1], "folora": [1, 2, 0], "other": [0]}
    records = [
        record(f"{method}-{seed}", method, 0.01, (6, 0.5, 0.5, 0.5, 0.1), "x") | {"seed": seed}
        for method, own in seeds.items()
        for seed in own
    ]
    base = record("base", "base", 0.0, (0, 0.1, 0.1, 0.9, 0.0), "x")
    generator = np.random.default_rng(4)
    scores = {(row["run"], row["step"]): generator.uniform(0.1, 1, ITEMS) for row in (base, *records)}
    inputs: Any = SimpleNamespace(answers={"x": {one: {"t": own} for one, own in scores.items()}})
    comparison = compare("x", base, records, "lora")
    rows = {row["method"]: row for row in task_rows(comparison, inputs, ["t"], "folora")}
    loss = {method: {seed: -np.log(scores[f"{method}-{seed}", 6]) for seed in own} for method, own in seeds.items()}
    loss["base"] = dict.fromkeys([0, 1], -np.log(scores["base", 0]))
    for method, row in rows.items():
        own = list(loss[method].values())[: 1 if method == "base" else None]
        assert [row[f"log_loss{end}"] for end in ("", "_low", "_high")] == pytest.approx(bootstrapped(own))
        found = [row[f"log_loss_difference{end}"] for end in ("", "_low", "_high")]
        if method in ("lora", "base"):
            difference = [loss["folora"][seed] - loss[method][seed] for seed in (0, 1)]
            assert found == pytest.approx(bootstrapped(difference))
        else:
            assert found == [None] * 3
    for row in task_rows(comparison, inputs, ["t"], "other"):  # which lacks a seed of the reference
        assert row["score_difference"] is None


def test_training_curves_are_those_of_the_best_rates(full: Path, runs: Path) -> None:
    rows = [row for row in read_csv(full / "training.csv") if row["method"] == "lora"]
    history = read_table(runs / "lora" / "lora-3e-3-s0" / "history.parquet")[0].to_pylist()
    assert [(int(row["step"]), float(row["penalty"]), float(row["kl"])) for row in rows] == [
        (row["step"], row["penalty"], row["kl"]) for row in history
    ]


def test_spectrum_is_read_without_torch_and_gated_as_in_training(full: Path, pipeline: Pipeline) -> None:
    from folora.report.inputs import read_figures
    from folora.spectrum import read_spectrum as read_with_torch

    found, expected = read_figures(pipeline.spectrum), read_with_torch(pipeline.spectrum)
    assert found.eigenvalues.keys() == expected.inputs.keys()
    method: Any = pipeline.params.methods["folora-replay"]
    rows = read_csv(full / "spectrum.csv")
    for name, layer in expected.inputs.items():
        assert (found.eigenvalues[name] == layer.eigenvalues.numpy()).all()
        gates = method.gates_of(layer.eigenvalues).flip(0)
        own = [row for row in rows if row["input"] == name]
        assert float(own[0]["gate"]) == pytest.approx(float(gates[0]))
        assert float(own[-1]["gate"]) == pytest.approx(float(gates[-1]))
        shares = [float(row["share"]) for row in own]
        assert shares == sorted(shares)
        assert len(own) <= 60


def test_what_makes_a_spectrum_uncertain_is_said_in_red(
    full: Path, pipeline: Pipeline, evaluations: Path, tmp_path: Path
) -> None:
    assert "Two halves of the proxy text differ on at most" in (full / "index.html").read_text()
    tensors, manifest = read_tensors(pipeline.spectrum)
    for record in manifest["health"].values():
        record["top_share"] = 0.5
    write_tensors(tmp_path / "well" / "subtraction" / "sampled" / "0.safetensors", tensors, manifest)
    write_report(pipeline.params, evaluations, tmp_path / "well" / "report", spectra=tmp_path / "well")
    assert 'class="alarm"' not in (tmp_path / "well" / "report" / "index.html").read_text()
    sick, weak, heavy, *_ = manifest["health"]
    manifest["health"][heavy]["top_share"] = 0.83
    manifest["health"][sick]["residual"] = 0.5
    manifest["health"][weak] |= {"gate_difference": 0.4, "tokens_needed": 123_456}
    manifest["health"][sick] |= {"gate_difference": None, "tokens_needed": None}
    write_tensors(tmp_path / "subtraction" / "sampled" / "0.safetensors", tensors, manifest)
    write_report(pipeline.params, evaluations, tmp_path / "report", spectra=tmp_path)
    page = (tmp_path / "report" / "index.html").read_text()
    alarms = re.findall('<p class="alarm">(.*?)</p>', page)
    assert [alarms[0].startswith(f"health: {sick}: the residual"), len(alarms)] == [True, 3]
    assert "1 of 8 layer inputs have more than 50% of the proxy text" in alarms[1]
    assert f"most of all {heavy} (83%)" in alarms[1]
    assert "set covariance.proxy_positions to without_first" in alarms[1]
    assert "1 of 8 layer inputs have gates of which two halves of the proxy text differ on more than 5%" in alarms[2]
    assert "some 123,456 are needed" in alarms[2]
    assert "<td>–</td>" in page


def test_one_screen_with_few_methods(report: Path) -> None:
    lines = (report / "summary.txt").read_text().splitlines()
    assert str(report / "index.html") in "".join(lines)
    assert all(len(line) <= 100 for line in lines if str(report) not in line)
    assert "…" not in "".join(lines)
    assert len(lines) <= 24


def test_one_screen_with_many_methods(many: Path) -> None:
    lines = (many / "summary.txt").read_text().splitlines()
    assert len([line for line in lines if str(many) not in line]) <= 24
    rows = {row["method"]: row for row in read_csv(many / "summary.csv") if row["method"] != "base"}
    best = sorted((m for m in rows if m != "lora"), key=lambda method: -float(rows[method]["hypervolume"]))[:10]
    shown = [line.split()[0] for line in lines if line.split() and line.split()[0] in rows]
    assert shown[:11] == ["lora", *best]
    assert f"The best by area; 14 more in {many / 'summary.csv'}" in lines


def test_verdict_on_many_methods_names_numbers_and_extremes(many: Path) -> None:
    text = Page(many / "index.html").text
    assert re.search(r"keeps more than \d+ methods, from other-\d+ \(\+0\.\d\d at 0\.\d\d\) to other-\d+", text)


def test_another_process_writes_the_same_bytes_and_imports_no_torch(
    full: Path, pipeline: Pipeline, runs: Path, evaluations: Path, save_params: SaveParams, tmp_path: Path
) -> None:
    """Torch is barred once the parameters are read: their methods may have loaded it."""
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from folora.params import load_params\n"
        "params = load_params(Path(sys.argv[1]))\n"
        "sys.modules['torch'] = None\n"
        "from folora.report import write_report\n"
        "evaluations, output, runs, spectra = map(Path, sys.argv[2:])\n"
        "write_report(params, evaluations, output, runs=runs, spectra=spectra)\n"
    )
    paths = (save_params(pipeline.values()), evaluations, tmp_path / "report", runs, pipeline.spectra.parent.parent)
    command = [sys.executable, "-c", script, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for path in full.iterdir():
        if path.name != "summary.txt":  # names its own folder
            assert path.read_bytes() == (tmp_path / "report" / path.name).read_bytes(), path.name


def test_results_of_the_pipeline_make_a_report(full: Path) -> None:
    found = read_json(full / "metrics.json")
    assert found["arms"].keys() == {"lora", "folora-replay"}
    assert found["arms"]["folora-replay"]["lr"] == 0.01
    assert found["arms"]["lora"]["kl"] > 0


def test_missing_run_is_named(save_params: SaveParams, tmp_path: Path, refused: Refused) -> None:
    write_results(tmp_path / "evaluation", ["subtraction"])
    content = values(["subtraction"])
    content["runs"]["lora-new"] = {
        "task": "subtraction",
        "proxy": "sampled",
        "method": "lora",
        "learning_rate": 0.5,
        "seed": 1,
    }
    line = refused("report", "--evaluations", tmp_path / "evaluation", "--params", save_params(content))
    assert line.startswith(f"{tmp_path / 'evaluation'}: no result of lora-new: run `dvc repro`")


@pytest.mark.parametrize("name", ["metrics.parquet", "answers.parquet"])
def test_missing_or_damaged_evaluation_is_named(
    name: str, save_params: SaveParams, tmp_path: Path, refused: Refused
) -> None:
    write_results(tmp_path / "evaluation", ["subtraction"])
    path = tmp_path / "evaluation" / "folora-replay" / name
    path.write_bytes(path.read_bytes()[:-5])
    arguments = ("report", "--evaluations", tmp_path / "evaluation", "--params", save_params(values(["subtraction"])))
    assert refused(*arguments).startswith(f"{path}: damaged or truncated")
    path.unlink()
    assert refused(*arguments).startswith(f"{path}: not found")


def test_answers_of_other_metrics_or_items_are_refused(params: Params, tmp_path: Path) -> None:
    write_results(tmp_path / "evaluation", ["subtraction"])
    path = tmp_path / "evaluation" / "lora" / "answers.parquet"
    table, manifest = read_table(path)
    write_table(path, table, manifest | {"metrics": "0"})
    with pytest.raises(FoLoRAError, match=r"answers\.parquet: made with metrics 0, but"):
        write_report(params, tmp_path / "evaluation", tmp_path / "report")
    write_table(path, table.slice(1), manifest)
    with pytest.raises(FoLoRAError, match="answered other items than the base model"):
        write_report(params, tmp_path / "evaluation", tmp_path / "report")


def test_missing_run_folder_or_spectrum_is_named(
    pipeline: Pipeline, runs: Path, evaluations: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs / "lora", tmp_path / "runs" / "lora")
    with pytest.raises(FoLoRAError, match=r"folora-replay-1e-2-s0/manifest\.json: not found"):
        write_report(pipeline.params, evaluations, tmp_path / "report", runs=tmp_path / "runs")
    with pytest.raises(FoLoRAError, match=r"subtraction/sampled/0\.safetensors: not found"):
        write_report(pipeline.params, evaluations, tmp_path / "report", spectra=tmp_path)
    (tmp_path / "subtraction" / "sampled").mkdir(parents=True)
    (tmp_path / "subtraction" / "sampled" / "0.safetensors").write_bytes(pipeline.spectrum.read_bytes()[:-5])
    with pytest.raises(FoLoRAError, match=r"subtraction/sampled/0\.safetensors: damaged or truncated"):
        write_report(pipeline.params, evaluations, tmp_path / "report", spectra=tmp_path)


def test_reference_without_a_run_is_named(tmp_path: Path) -> None:
    write_results(tmp_path / "evaluation", ["subtraction", "other"])
    content = values(["subtraction", "other"])
    for run in ("lora-low-other", "lora-high-other"):
        del content["runs"][run]
    with pytest.raises(FoLoRAError, match=r"report\.reference: lora has no run on other"):
        write_report(Params.model_validate(content), tmp_path / "evaluation", tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_full_disk_leaves_no_half_report(params: Params, small_disk: Path, tmp_path: Path) -> None:
    write_results(tmp_path / "evaluation", ["subtraction"])
    with pytest.raises(FoLoRAError, match="report: cannot be written"):
        write_report(params, tmp_path / "evaluation", small_disk / "report")
    assert not list(small_disk.iterdir())
