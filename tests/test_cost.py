from __future__ import annotations

import json
from typing import TYPE_CHECKING

import psutil
import pytest
from typer.testing import CliRunner

from folora import energy
from folora.cli import app
from folora.commands.cost import costs_here, write_page
from folora.costs import LEDGER, Cost, keep_cost, read_costs
from folora.errors import FoLoRAError
from folora.params import Params
from folora.report import write_report

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Pipeline, SaveParams

    from folora.params import Tracking

RUNS = {"lora": "lora-3e-3-s0", "folora-replay": "folora-replay-1e-2-s0"}


def write(costs: list[Cost]) -> None:
    LEDGER.parent.mkdir()
    LEDGER.write_text("".join(json.dumps(vars(cost)) + "\n" for cost in costs))


def place(method: str, runs: Path) -> str:
    return f"{runs}/{method}/{RUNS[method]}"


def test_a_finished_stage_keeps_its_cost(pipeline: Pipeline, save_params: SaveParams, in_tmp: Path) -> None:
    options = ("--foundation", pipeline.foundation, "--params", save_params(pipeline.values()), "--output", "out/rows")
    result = CliRunner().invoke(app, list(map(str, ("task", "subtraction", *options))))
    assert result.exit_code == 0, result.output
    cost = read_costs()["out/rows"]
    process = psutil.Process()
    times = process.cpu_times()
    assert cost.stage == "task"
    assert cost.step is None
    assert cost.cpu == pytest.approx(times.user + times.system, rel=0.1)
    assert cost.wall > 0
    assert process.memory_info().rss / 4 < cost.peak < psutil.virtual_memory().total
    assert in_tmp.joinpath("out/rows").exists()


def test_the_last_cost_of_an_output_holds_and_broken_lines_are_passed_over(in_tmp: Path) -> None:
    keep_cost("train", in_tmp / "a", 0.5)
    keep_cost("train", in_tmp / "b", 0.25)
    keep_cost("train", in_tmp / "a", 0.75)
    with LEDGER.open("ab") as file:
        file.write(b'\xff\x00\n{"stage": "tra')
    steps = {name: cost.step for name, cost in read_costs().items()}
    assert steps == {f"{in_tmp}/a": 0.75, f"{in_tmp}/b": 0.25}


def test_energy_is_kept_where_the_machine_counts_it(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", in_tmp)
    monkeypatch.setattr(energy, "_gpus", dict)
    assert energy.EnergyMeter().joules() is None
    counters = [in_tmp / name / "energy_uj" for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0")]
    for counter in counters:
        counter.parent.mkdir()
        counter.write_text("5000000\n")
    meter = energy.EnergyMeter()
    for counter in counters:
        counter.write_text("7500000\n")
    assert meter.joules() == 5.0  # of both packages, the part of one not counted again
    counters[0].write_text("1\n")  # begun anew
    assert meter.joules() is None


def test_the_energy_of_a_stage_is_known_when_that_of_all_its_outputs_is(pipeline: Pipeline, in_tmp: Path) -> None:
    write([Cost("task", "a", 2.0, 1.0, 100, None, 3600.0), Cost("task", "b", 2.0, 1.0, 100, None, 1800.0)])
    (stage,), _ = costs_here(pipeline.params, in_tmp)
    assert stage.cells()[-1] == "1.5 Wh"
    keep_cost("task", in_tmp / "c")
    assert costs_here(pipeline.params, in_tmp)[0][0].cells()[-1] == "–"


def test_methods_are_set_against_the_reference(pipeline: Pipeline, in_tmp: Path) -> None:
    runs = in_tmp / "runs"
    write(
        [
            Cost("task", "rows", 2.0, 1.0, 100),
            Cost("train", place("lora", runs), 20.0, 10.0, 400, 0.04),
            Cost("train", place("folora-replay", runs), 40.0, 30.0, 500, 0.06),
            Cost("train", "of/another/preset", 1.0, 1.0, 900, 9.0),
        ]
    )
    stages, methods = costs_here(pipeline.params, runs)
    assert [(one.stage, one.outputs, one.wall, one.cpu, one.peak) for one in stages] == [
        ("task", 1, 2.0, 1.0, 100),
        ("train", 3, 61.0, 41.0, 900),
    ]
    assert [one.method for one in methods] == ["lora", "folora-replay"]
    assert [one.relative_step for one in methods] == pytest.approx([1.0, 1.5])
    assert [one.relative_peak for one in methods] == pytest.approx([1.0, 1.25])


def test_a_copy_of_the_page_has_the_costs(
    pipeline: Pipeline, runs: Path, evaluations: Path, save_params: SaveParams, in_tmp: Path
) -> None:
    write_report(pipeline.params, evaluations, in_tmp / "report")
    write([Cost("train", place("lora", runs), 20.0, 10.0, 400 * 2**20, 0.04)])
    options = ("--params", save_params(pipeline.values()), "--runs", runs, "--report", "report", "--page", "cost.html")
    result = CliRunner().invoke(app, list(map(str, ("cost", *options))))
    assert (result.exit_code, result.output) == (0, "cost.html\n")
    page, copy = ((in_tmp / name).read_text() for name in ("report/index.html", "cost.html"))
    before, after = page.split("<!-- cost -->")[0], page.split("<!-- /cost -->")[1]
    assert copy.startswith(before)
    assert copy.endswith(after)
    added = copy[len(before) : -len(after)]
    assert all(f"<td>{cell}</td>" in added for cell in ("20 s", "10 s", "400 MiB", "40.0 ms", "1.00 ×"))
    assert "folora cost --page" in page
    assert "folora cost --page" not in copy


def test_a_page_without_a_place_for_costs_is_refused(in_tmp: Path) -> None:
    (in_tmp / "report").mkdir()
    (in_tmp / "report" / "index.html").write_text("<p>a page</p>")
    with pytest.raises(FoLoRAError, match=r"report/index\.html: has no place for costs: run the report stage again"):
        write_page([], [], in_tmp / "report", in_tmp / "cost.html")
    assert not (in_tmp / "cost.html").exists()


def test_without_the_reference_nothing_is_relative(pipeline: Pipeline, in_tmp: Path) -> None:
    runs = in_tmp / "runs"
    write([Cost("train", place("folora-replay", runs), 40.0, 30.0, 500, 0.06)])
    (method,) = costs_here(pipeline.params, runs)[1]
    assert method.relative_step is method.relative_peak is None
    assert method.cells()[3] == method.cells()[5] == "–"


def test_a_run_resumed_with_no_step_left_has_no_time_of_a_step(pipeline: Pipeline, in_tmp: Path) -> None:
    runs = in_tmp / "runs"
    second = "folora-replay-1e-2-s1"
    values = pipeline.values()
    values["runs"][second] = values["runs"][RUNS["folora-replay"]] | {"seed": 1}
    folder = f"{runs}/folora-replay"
    resumed = Cost("train", f"{folder}/{second}", 4.0, 3.0, 300)
    costs = [Cost("train", f"{folder}/{RUNS['folora-replay']}", 40.0, 30.0, 500, 0.06), resumed]
    write([*costs, Cost("train", place("lora", runs), 4.0, 3.0, 300)])
    lora, replay = costs_here(Params.model_validate(values), runs)[1]
    assert (replay.runs, replay.step, replay.peak) == (2, 0.06, 400)
    assert lora.step is lora.relative_step is replay.relative_step is None
    assert lora.cells() == ["lora", "1", "–", "–", "0 MiB", "1.00 ×"]


def test_a_folder_where_nothing_ran_says_so(pipeline: Pipeline, in_tmp: Path) -> None:
    with pytest.raises(FoLoRAError, match="no stage has run"):
        costs_here(pipeline.params, in_tmp)


def test_training_returns_the_time_of_a_step(pipeline: Pipeline, store: Tracking, in_tmp: Path) -> None:
    from folora.train import TrainInputs, train_run

    inputs = TrainInputs(pipeline.task, pipeline.proxy, pipeline.heldout, pipeline.spectra)
    params = pipeline.params.model_copy(update={"tracking": store})
    step = train_run(params, RUNS["lora"], pipeline.base, inputs, in_tmp / "run")
    assert 0 < step < 10
