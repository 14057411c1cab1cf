from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import ROOT
from dvc.repo import Repo
from typer.testing import CliRunner

from folora.cli import app
from folora.commands.clean import find_leftovers, remove, stages_that_read
from folora.dag import resolve_stages
from folora.errors import FoLoRAError
from folora.hold import hold
from folora.records import card_of, journal_path
from folora.storage import read_json

if TYPE_CHECKING:
    from conftest import Pipeline, SaveParams

    from folora.params import Params

LORA = "lora-3e-3-s0"
KEPT = [
    "artifacts/evaluation/base/metrics.parquet",
    "artifacts/evaluation/lora/metrics.parquet",
    f"artifacts/runs/lora/{LORA}/adapter/adapter_model.safetensors",
    "artifacts/task/subtraction.parquet",
    "artifacts/task/.gitignore",
    "artifacts/task/notes.txt",  # by none of the stages' names
    "artifacts/own/rows/train.jsonl",
    "artifacts/spectrum/subtraction/sampled/notes",
    "artifacts/downloads/rows/train.jsonl",  # which the task reads, whoever put it there
    "artifacts/proxy/sampled/0.parquet",
    "artifacts/covariance/proxy/sampled/0.safetensors",
    "artifacts/covariance/task/subtraction.safetensors",
    "artifacts/spectrum/subtraction/sampled/0.safetensors",
    "artifacts/foundation/model.safetensors",
    "artifacts/heldout.parquet",
    ".snakemake/conda/environment",
    "results/report/index.html",
]
LEFT = {
    "artifacts/evaluation/sgd/metrics.parquet": "artifacts/evaluation/sgd",
    "artifacts/runs/lora/lora-1e-9-s0/manifest.json": "artifacts/runs/lora/lora-1e-9-s0",
    "artifacts/runs/sgd/sgd-1/adapter/weights": "artifacts/runs/sgd/sgd-1",
    "artifacts/runs/sgd/sgd-1/.adapter.{ended}.partial": "artifacts/runs/sgd/sgd-1",
    "artifacts/downloads/old/train.jsonl": "artifacts/downloads/old",
    "artifacts/task/spelled.parquet": None,
    "artifacts/proxy/sampled/7.parquet": None,
    "artifacts/proxy/hot/0.parquet": None,
    "artifacts/covariance/proxy/sampled/7.safetensors": None,
    "artifacts/covariance/proxy/hot/0.safetensors": None,
    "artifacts/covariance/task/spelled.safetensors": None,
    "artifacts/spectrum/spelled/sampled/0.safetensors": None,
    "artifacts/spectrum/.subtraction.safetensors.{ended}.partial": None,
    "results/.report.{ended}.partial/page": "results/.report.{ended}.partial",
    ".snakemake/metadata/x": ".snakemake/metadata",
    ".snakemake/log/x.log": ".snakemake/log",
    "logs/train.log": "logs",
    ".folora/tracking/0123.jsonl": None,
    ".folora/scratch/0123/checkpoint-3/optimizer.pt": ".folora/scratch/0123",
}


@pytest.fixture
def ended() -> int:
    """Id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def params(pipeline: Pipeline) -> Params:
    return pipeline.params


@pytest.fixture
def littered(in_tmp: Path, ended: int, runs: Path, pipeline: Pipeline, save_params: SaveParams) -> Path:
    """A working folder with files to keep and files of 1000 bytes that may go."""
    manifest = (runs / "lora" / LORA / "manifest.json").read_bytes()
    alive = f"artifacts/spectrum/.subtraction.safetensors.{os.getpid()}.partial"
    digest = card_of(read_json(runs / "lora" / LORA / "manifest.json")).digest
    shutil.copy(ROOT / "dvc.yaml", in_tmp)
    values = pipeline.values()
    task = values["tasks"]["subtraction"] | {"dataset": "artifacts/downloads/rows"}
    save_params(values | {"tasks": {"subtraction": task}})
    Repo.init(no_scm=True).close()
    (in_tmp / "artifacts" / "runs" / "sgd").mkdir(parents=True)
    (in_tmp / "artifacts" / "runs" / "sgd" / ".gitignore").write_text("/sgd-1\n")
    for name in [*KEPT, alive, str(journal_path(digest)), *LEFT]:
        path = in_tmp / name.format(ended=ended)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(1000))
    (in_tmp / f"artifacts/runs/lora/{LORA}/manifest.json").write_bytes(manifest)
    return in_tmp


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def expected(ended: int) -> set[Path]:
    return {Path((folder or name).format(ended=ended)) for name, folder in LEFT.items()}


def test_only_what_is_left_over_is_found(littered: Path, params: Params, ended: int) -> None:
    stages = resolve_stages(littered)
    leftovers = find_leftovers(params, stages)
    assert {left.path for left in leftovers} == expected(ended)
    assert len(leftovers) == len(expected(ended))
    assert sum(left.size for left in leftovers) == 1000 * len(LEFT)
    assert stages_that_read(leftovers, stages) == [
        "evaluate@lora",
        "report",
        "spectrum@subtraction-sampled-0",
        "2 of train",
    ]
    before = files(littered)
    remove(leftovers)
    assert before - files(littered) == {name.format(ended=ended) for name in [*LEFT, "artifacts/runs/sgd/.gitignore"]}
    assert not any((littered / "artifacts" / gone).exists() for gone in ("runs/sgd", "proxy/hot", "spectrum/spelled"))
    assert find_leftovers(params, stages) == []


def test_asks_first(littered: Path) -> None:
    options = ["clean"]
    before = files(littered)
    refused = CliRunner().invoke(app, options, input="n\n")
    assert refused.exit_code == 1
    assert "which run again without it: evaluate@lora, report, spectrum@subtraction-sampled-0, 2 of" in refused.stdout
    assert CliRunner().invoke(app, options, input="").exit_code == 1  # no terminal to ask
    assert files(littered) == before
    assert CliRunner().invoke(app, options, input="y\n").exit_code == 0
    assert CliRunner().invoke(app, options).stdout == "nothing to delete\n"


@pytest.mark.usefixtures("littered")
def test_json_deletes_with_yes_only(ended: int) -> None:
    options = ["clean", "--json"]
    said: list[dict[str, Any]] = json.loads(CliRunner().invoke(app, options).stdout)
    assert {Path(left["path"]) for left in said} == expected(ended)
    assert all(path.exists() for path in expected(ended))
    assert json.loads(CliRunner().invoke(app, [*options, "--yes"]).stdout) == said
    assert not any(path.exists() for path in expected(ended))


def test_nothing_is_deleted_while_a_runner_works(littered: Path, params: Params) -> None:
    (littered / ".dvc" / "tmp").mkdir(parents=True, exist_ok=True)
    held = {"read": {}, "write": {"artifacts/x": {"pid": os.getpid(), "cmd": "dvc repro"}}}
    (littered / ".dvc" / "tmp" / "rwlock").write_text(json.dumps(held))
    before = files(littered)
    with pytest.raises(FoLoRAError, match="at work in this folder"):
        remove(find_leftovers(params, resolve_stages(littered)))
    assert files(littered) == before


def test_nothing_is_deleted_while_a_stage_works(littered: Path, params: Params) -> None:
    """One that was started by itself, or by a runner on another machine that shares the folder."""
    leftovers = find_leftovers(params, resolve_stages(littered))
    with (
        hold(Path("artifacts/heldout.parquet")),
        pytest.raises(FoLoRAError, match=rf"process {os.getpid()} of .* is at work in this folder"),
    ):
        remove(leftovers)
    remove(leftovers)
    assert not any(left.path.exists() for left in leftovers)
