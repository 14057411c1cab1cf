from __future__ import annotations

import csv
import re
import struct
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from conftest import ROOT
from ruamel.yaml import YAML

from folora.comparison import compare
from folora.errors import FoLoRAError
from folora.params import Params
from folora.report import checkpoint_rows, metrics, write_report
from folora.storage import read_json, write_table

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Pipeline, Refused, SaveParams

KEPT = ["home", "loud"]
# run: learning rate, then (step, target, validation, kept, kl) of every checkpoint
RESULTS = {
    "lora-low": ("lora", 0.001, [(3, 0.2, 0.9, 0.85, 0.1), (6, 0.4, 0.5, 0.8, 0.2)]),
    "lora-high": ("lora", 0.01, [(3, 0.5, 0.1, 0.5, 0.6), (6, 0.6, 0.7, 0.4, 1.0)]),
    "folora": ("folora-replay", 0.01, [(3, 0.5, 0.4, 0.75, 0.1), (6, 0.7, 0.8, 0.65, 0.3)]),
}


def record(run: str, method: str, rate: float, checkpoint: tuple[float, ...], adaptation: str) -> dict[str, Any]:
    step, target, validation, kept, kl = checkpoint
    own = {"run": run, "method": method, "adaptation": adaptation, "learning_rate": rate, "seed": 0, "step": int(step)}
    figures = {"target": target, "validation": validation, "kept": kept, "kl": kl, "perplexity": 5 + kl}
    return own | figures | {"kept/home": kept + 0.05, "kept/loud": kept - 0.05}


def write_results(folder: Path, adaptations: list[str]) -> None:
    base = [record("base", "base", 0.0, (0, 0.1, 0.1, 0.9, 0.0), adaptation) for adaptation in adaptations]
    write_table(folder / "base" / "metrics.parquet", pa.Table.from_pylist(base), {"artefact": "metrics"})
    for method in ("lora", "folora-replay"):
        records = [
            record(f"{run}-{adaptation}", method, rate, checkpoint, adaptation)
            for adaptation in adaptations
            for run, (of, rate, checkpoints) in RESULTS.items()
            for checkpoint in checkpoints
            if of == method
        ]
        write_table(folder / method / "metrics.parquet", pa.Table.from_pylist(records), {"artefact": "metrics"})


def values(adaptations: list[str]) -> dict[str, Any]:
    content = YAML(typ="safe", pure=True).load(ROOT / "workflow" / "presets" / "tiny.yaml")
    content["tasks"] = dict.fromkeys(adaptations, content["tasks"]["subtraction"])
    content["evaluation"]["kept"] = KEPT
    content["runs"] = {
        f"{run}-{adaptation}": {"task": adaptation, "method": method, "learning_rate": rate, "seed": 0}
        for adaptation in adaptations
        for run, (method, rate, _) in RESULTS.items()
    }
    return content


@pytest.fixture(scope="module")
def params() -> Params:
    return Params.model_validate(values(["subtraction"]))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, params: Params) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_results(folder / "evaluation", ["subtraction"])
    write_report(params, folder / "evaluation", folder / "report")
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
    with (report / "matches.csv").open() as file:
        pairs = {(row["method"], row["other"]): row for row in csv.DictReader(file)}
    assert pairs.keys() == {("lora", "folora-replay"), ("folora-replay", "lora")}
    assert float(pairs["lora", "folora-replay"]["kept_gain"]) == pytest.approx(-0.3)


def test_several_adaptations_are_averaged() -> None:
    records = [record(run, m, rate, c, "x") for run, (m, rate, cs) in RESULTS.items() for c in cs]
    base = record("base", "base", 0.0, (0, 0.1, 0.1, 0.9, 0.0), "x")
    better = [row | {"target": row["target"] + 0.1} for row in records]
    found = metrics([compare("x", base, records, "lora"), compare("y", base, better, "lora")], "lora")
    assert found["arms"]["lora"]["target"] == pytest.approx(0.65)
    assert found["arms"]["folora-replay"]["kl"] == pytest.approx(0.3)
    assert [one["arms"]["lora"]["target"] for one in found["adaptations"].values()] == [0.6, 0.7]
    assert found["base"]["kept"] == pytest.approx(0.9)


def test_page_needs_no_network(report: Path) -> None:
    page = (report / "index.html").read_text()
    # only tags outside of scripts load anything by themselves
    markup = re.sub(r"(<script[^>]*>).*?</script>", r"\1</script>", page, flags=re.DOTALL)
    assert not re.findall(r"""(?:src|href|srcset|data)\s*=\s*["']?\s*(?:https?:)?//""", markup)
    assert not re.findall(r"""@import|url\(\s*["']?(?:https?:)?//""", markup)
    for text in ("folora-replay", "subtraction", "0.65", "home", "0.70"):
        assert text in markup
    assert len(page) > len(markup) + 100_000  # the chart's code is in the page


def test_figure_is_a_png(report: Path) -> None:
    content = (report / "frontier.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert width > height > 400
    assert content.endswith(b"IEND\xaeB`\x82")


def test_tables(report: Path) -> None:
    with (report / "frontier.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["base", *["lora"] * 4, *["folora-replay"] * 2]
    on_front = {(row["method"], row["target"]) for row in rows if row["frontier_kept"] == "True"}
    assert ("folora-replay", "0.7") in on_front
    assert ("lora", "0.6") in on_front
    with (report / "summary.csv").open() as file:
        summary = {row["method"]: row for row in csv.DictReader(file)}
    assert list(summary) == ["base", "lora", "folora-replay"]
    assert float(summary["folora-replay"]["kept/home"]) == pytest.approx(0.7)
    assert summary["base"]["learning_rate"] == ""
    text = (report / "summary.txt").read_text()
    assert str(report / "index.html") in text
    assert all(len(line) <= 100 for line in text.splitlines() if "index.html" not in line)


def test_dominated_checkpoints_are_off_the_frontier() -> None:
    base = record("base", "base", 0.0, (0, 0.1, 0.1, 0.9, 0.0), "x")
    checkpoints = [(1, 0.3, 0, 0.5, 2), (2, 0.4, 0, 0.6, 1)]  # the second is better in everything
    rows = checkpoint_rows({"x": base}, [record("r", "lora", 0.1, checkpoint, "x") for checkpoint in checkpoints])
    assert [row["frontier_kept"] for row in rows] == [True, False, True]
    assert [row["frontier_kl"] for row in rows] == [True, False, True]


def test_results_of_the_pipeline_make_a_report(pipeline: Pipeline, evaluations: Path, tmp_path: Path) -> None:
    write_report(pipeline.params, evaluations, tmp_path / "report")
    found = read_json(tmp_path / "report" / "metrics.json")
    assert found["arms"].keys() == {"lora", "folora-replay"}
    assert found["arms"]["folora-replay"]["lr"] == 0.01
    assert found["arms"]["lora"]["kl"] > 0


def test_missing_run_is_named(save_params: SaveParams, tmp_path: Path, refused: Refused) -> None:
    write_results(tmp_path / "evaluation", ["subtraction"])
    content = values(["subtraction"])
    content["runs"]["lora-new"] = {"task": "subtraction", "method": "lora", "learning_rate": 0.5, "seed": 1}
    line = refused("report", "--evaluations", tmp_path / "evaluation", "--params", save_params(content))
    assert line.startswith(f"{tmp_path / 'evaluation'}: no result of lora-new: run `dvc repro`")


def test_missing_or_damaged_evaluation_is_named(save_params: SaveParams, tmp_path: Path, refused: Refused) -> None:
    write_results(tmp_path / "evaluation", ["subtraction"])
    path = tmp_path / "evaluation" / "folora-replay" / "metrics.parquet"
    path.write_bytes(path.read_bytes()[:-5])
    arguments = ("report", "--evaluations", tmp_path / "evaluation", "--params", save_params(values(["subtraction"])))
    assert refused(*arguments).startswith(f"{path}: damaged or truncated")
    path.unlink()
    assert refused(*arguments).startswith(f"{path}: not found")


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
