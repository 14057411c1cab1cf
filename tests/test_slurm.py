"""The tiny pipeline on Slurm clusters of one node, with accounting and without, by the profile users start from."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from contextlib import chdir
from importlib.util import find_spec
from typing import TYPE_CHECKING

import psutil
import pytest
from cluster import ACCOUNT, cluster, missing
from dvc.repo import Repo
from workspace import change, make_workspace, run, same_bytes, stale

from folora.records import read_journal
from folora.storage import identity_of, read_json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PLUGIN = find_spec("snakemake_executor_plugin_slurm")
REASON = missing() or ("" if PLUGIN else "no executor plugin: pip install 'folora[slurm]'")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]

COMMAND = ("snakemake", "--profile", "profiles/slurm", "--slurm-init-seconds-before-status-checks", "1")


@pytest.fixture
def _without_accounting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with cluster(tmp_path_factory.mktemp("slurm")):
        yield


@pytest.fixture(scope="module")
def _with_accounting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if reason := missing(accounting=True):
        pytest.skip(reason)
    with cluster(tmp_path_factory.mktemp("slurm"), accounting=True):
        yield


@pytest.mark.usefixtures("_without_accounting")
def test_a_cluster_writes_the_bytes_of_a_local_run(by_dvc: Path, tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    said = run(workspace, *COMMAND)
    assert said.count("submitted with SLURM jobid") == len(list((workspace / "logs").glob("*.log"))) > 10
    same_bytes(by_dvc, workspace)
    assert stale(workspace) == set()
    assert "Nothing to be done" in run(workspace, *COMMAND)


PARTITIONS = {"  - slurm_partition=cpu  # yours: sinfo\n": "", "# slurm-partition-config": "slurm-partition-config"}


@pytest.mark.usefixtures("_without_accounting")
def test_a_stage_with_a_gpu_goes_to_a_partition_that_has_them(by_dvc: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "work"
    shutil.copytree(by_dvc, workspace)
    _edit(workspace / "profiles" / "slurm" / "profile.yaml", PARTITIONS)
    outputs = {"heldout": workspace / "artifacts" / "heldout.parquet"}
    outputs["task_subtraction"] = workspace / "artifacts" / "task" / "subtraction.parquet"
    for output in outputs.values():
        output.unlink()
    run(workspace, *COMMAND, "--set-resources", "heldout:gpu=1", "--", *outputs)
    same_bytes(by_dvc, workspace)
    jobs = run(workspace, "squeue", "--states=all", "--noheader", "--Format=comment:40,partition,tres-per-job")
    assert sorted(line.split() for line in jobs.splitlines()) == [
        ["rule_heldout", "gpu", "gres:gpu:1"],
        ["rule_task_subtraction", "cpu", "N/A"],
    ]


@pytest.mark.usefixtures("_without_accounting")
def test_a_job_needs_no_lock_of_dvc(by_dvc: Path, tmp_path: Path) -> None:
    """Somebody holds it from before the job starts until it has ended; what records the stage comes after."""
    workspace = tmp_path / "work"
    shutil.copytree(by_dvc, workspace)
    (workspace / "artifacts" / "heldout.parquet").unlink()
    with subprocess.Popen([*COMMAND, "heldout"], cwd=workspace, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any("submitted with SLURM jobid" in line for line in process.stderr)
        with Repo(str(workspace)).lock:
            _wait_for(workspace, ".snakemake/finished/heldout")
        said = process.communicate()[1]
    assert process.returncode == 0, said
    same_bytes(by_dvc, workspace)
    assert stale(workspace) == set()


AS_IT_IS: dict[str, str] = {}
AS_IT_SAYS = {"command: squeue": "command: sacct", "# - slurm_account=NAME": f"- slurm_account={ACCOUNT}"}


@pytest.mark.usefixtures("_with_accounting")
@pytest.mark.parametrize(
    ("name", "profile", "stop", "listed"),
    [
        ("lora-3e-3-s0", AS_IT_IS, "scancel {job}", "root|CANCELLED by 0"),
        ("folora-replay-1e-2-s0", AS_IT_SAYS, "scontrol update JobId={job} EndTime=now", f"{ACCOUNT}|TIMEOUT"),
    ],
    ids=["cancelled", "out-of-time"],
)
def test_a_job_that_is_stopped_is_sent_again_and_goes_on(
    name: str, profile: dict[str, str], stop: str, listed: str, by_dvc: Path, tmp_path: Path
) -> None:
    undisturbed, workspace = tmp_path / "undisturbed", tmp_path / "disturbed"
    for folder in (undisturbed, workspace):
        shutil.copytree(by_dvc, folder)
        change(folder, "train.steps", 60)
        change(folder, "train.log_every", 1)
        change(folder, "spectrum.parts", [0, 1])
    _edit(workspace / "profiles" / "slurm" / "profile.yaml", profile)
    rule = f"train_{name.replace('-', '_')}"
    saving = os.environ | {"FOLORA_SAVE_SECONDS": "0"}
    with subprocess.Popen([*COMMAND, rule], cwd=workspace, env=saving, stderr=subprocess.PIPE, text=True) as process:
        _freeze_training(workspace)
        running = run(workspace, "squeue", "--noheader", "--states=R", "--format=%i %k")
        job = next(line.split()[0] for line in running.splitlines() if rule in line)
        stopped = time.time()
        run(workspace, *stop.format(job=job).split())
        said = process.communicate()[1]
    assert process.returncode == 0, said
    assert said.count("Trying to restart job") == 1
    assert ("status command is not 'sacct'" in said) == (profile is AS_IT_IS)
    jobs = run(workspace, "sacct", "--allocations", "--noheader", "--parsable2", "--format=JobIDRaw,Account,State")
    assert f"{job}|{listed}" in jobs.splitlines()
    (folder,) = workspace.glob(f"artifacts/runs/*/{name}")
    with chdir(workspace):
        _, readings = read_journal(identity_of(read_json(folder / "manifest.json")))
    first = next(reading for reading in readings if reading.key == "train/loss")
    assert first.time / 1000 < stopped  # it went on
    run(undisturbed, "dvc", "repro", f"train@{name}")
    same_bytes(undisturbed, workspace)


def _edit(path: Path, changes: dict[str, str]) -> None:
    """Change lines of a file, as a user does."""
    text = path.read_text()
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)


def _wait_for(workspace: Path, pattern: str) -> None:
    """Wait until a workspace has such a file."""
    deadline = time.monotonic() + 600
    while not list(workspace.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.05)


def _freeze_training(workspace: Path) -> None:
    """Stop the only training of a workspace once it has saved a state; Slurm wakes it to end it."""
    _wait_for(workspace, ".folora/scratch/*/checkpoint-*/seal.json")
    for process in psutil.process_iter(["cmdline", "cwd"]):
        if process.info["cwd"] == str(workspace) and "--task-rows" in (process.info["cmdline"] or []):
            process.suspend()
