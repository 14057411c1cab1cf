"""The tiny pipeline from params.yaml to the report, under both runners."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import zipfile
from contextlib import chdir
from pathlib import Path

import pytest
from workspace import AUTHOR, change, make_workspace, run, same_bytes, stale

from folora.hold import hold

pytestmark = pytest.mark.slow

LORA, FOLORA = "train@lora-3e-3-s0", "train@folora-replay-1e-2-s0"


@pytest.fixture(scope="module")
def by_snakemake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = make_workspace(tmp_path_factory.mktemp("snakemake"))
    run(workspace, "env", "PYTHONHASHSEED=2", "snakemake", "--cores", "8")
    return workspace


def test_both_runners_write_the_same_bytes(by_dvc: Path, by_snakemake: Path) -> None:
    """At one job and at eight, under two hash seeds."""
    same_bytes(by_dvc, by_snakemake)
    assert "level 1: " in run(by_dvc, "folora", "verify", "--against", str(by_snakemake))


def test_after_either_runner_the_other_has_nothing_to_do(by_dvc: Path, by_snakemake: Path) -> None:
    for workspace in (by_dvc, by_snakemake):
        assert stale(workspace) == set()
        assert "Nothing to be done" in run(workspace, "snakemake", "--cores", "8")


def test_report_metrics_and_tracking(by_dvc: Path) -> None:
    metrics = json.loads((by_dvc / "results/report/metrics.json").read_text())
    assert metrics["arms"].keys() == {"lora", "folora-replay"}
    assert {"lr", "target", "kept", "kl", "perplexity"} <= metrics["arms"]["lora"].keys()
    assert "Infinity" not in (by_dvc / "results/report/metrics.json").read_text()
    shown = json.loads(run(by_dvc, "dvc", "metrics", "show", "--json"))
    assert shown[""]["data"]["results/report/metrics.json"]["data"] == metrics
    assert "frontier.csv" in run(by_dvc, "dvc", "plots", "show", "--json")
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{by_dvc}/mlflow.db")
    experiment = client.get_experiment_by_name("folora")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.data.tags["run"] for run in runs) == ["base", "folora-replay-1e-2-s0", "lora-3e-3-s0"]
    assert all({"target", "kept", "kl"} <= run.data.metrics.keys() for run in runs)
    assert all("train/loss" in run.data.metrics for run in runs if run.data.tags["run"] != "base")


def test_snakemake_s_report_carries_the_page_and_its_figures(by_snakemake: Path, tmp_path: Path) -> None:
    run(by_snakemake, "snakemake", "--report", str(tmp_path / "report.zip"))
    with zipfile.ZipFile(tmp_path / "report.zip") as archive:
        held = {name.rpartition("/")[2]: archive.read(name) for name in archive.namelist()}
    for name in ("index.html", "frontier.png", "frontier.csv", "metrics.json"):
        assert held[name] == (by_snakemake / "results/report" / name).read_bytes()


def test_an_experiment_runs_with_another_value(by_dvc: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "copy"
    shutil.copytree(by_dvc, workspace)
    run(workspace, "git", "add", "dvc.lock")
    run(workspace, "git", *AUTHOR, "commit", "--quiet", "-m", "results")
    done = run(workspace, "dvc", "exp", "run", "--name", "shorter", "-S", "train.steps=4")
    assert f"Running stage '{LORA}'" in done
    assert "Running stage 'foundation'" not in done
    manifest = json.loads((workspace / "artifacts/runs/lora/lora-3e-3-s0/manifest.json").read_text())
    assert manifest["params"]["train"]["steps"] == 4
    assert "shorter" in run(workspace, "dvc", "exp", "list", "--name-only")


def test_a_changed_parameter_reruns_only_what_depends_on_it(by_dvc: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "copy"
    shutil.copytree(by_dvc, workspace)
    for weight_decay in (0.1, 0.2):  # twice: Snakemake remembers the inputs of a job that it has run
        change(workspace, "methods.lora.weight_decay", weight_decay)
        assert LORA in stale(workspace)
        run(workspace, "snakemake", "--cores", "2", "train_lora_3e_3_s0")
        assert stale(workspace) == {"evaluate@lora", "report"}
    done = run(workspace, "dvc", "repro")
    assert "Running stage 'evaluate@lora'" in done
    assert "Running stage 'evaluate@folora-replay'" not in done
    assert "Nothing to be done" in run(workspace, "snakemake", "--cores", "2")


def test_a_killed_run_is_finished_by_the_other_runner(by_dvc: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "copy"
    shutil.copytree(by_dvc, workspace)
    change(workspace, "train.log_every", 2)  # another history, the same adapters
    command = ["env", "PYTHONHASHSEED=3", "snakemake", "--cores", "2"]
    process = subprocess.Popen(command, cwd=workspace, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list((workspace / "artifacts/runs").glob("*/*.partial")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert {LORA, FOLORA} & stale(workspace)
    run(workspace, "env", "PYTHONHASHSEED=3", "dvc", "repro")
    assert stale(workspace) == set()
    assert "Nothing to be done" in run(workspace, "snakemake", "--cores", "2")
    for run_folder in ("lora/lora-3e-3-s0", "folora-replay/folora-replay-1e-2-s0"):
        weights = f"artifacts/runs/{run_folder}/adapter/adapter_model.safetensors"
        assert (workspace / weights).read_bytes() == (by_dvc / weights).read_bytes()


def test_a_second_snakemake_is_told_who_is_at_work(by_dvc: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "copy"
    shutil.copytree(by_dvc, workspace)
    change(workspace, "train.log_every", 2)
    with chdir(workspace), hold(Path(".snakemake")):
        second = subprocess.run(["snakemake", "--cores", "1"], capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert f"process {os.getpid()} of " in second.stderr
    assert "is at work on it" in second.stderr
    assert LORA in stale(workspace)
