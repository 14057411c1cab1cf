from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import ROOT
from typer.testing import CliRunner

from folora.cli import app
from folora.commands import doctor, locks
from folora.commands.doctor import OK, PROBLEM, WARNING, Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import SaveParams

pytestmark = pytest.mark.usefixtures("in_tmp")


@pytest.fixture
def ended() -> int:
    """Id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_packages_out_of_range_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torch<2", "numpy>=1", "no-such-package>=1", 'pytest>=99; extra == "test"']
    monkeypatch.setattr(metadata, "requires", lambda _: wanted)
    findings = {finding.what: finding for finding in doctor.packages()}
    assert findings.keys() == {"torch", "no-such-package"}
    assert findings["torch"] == Finding("torch", PROBLEM, metadata.version("torch"), "pip install 'torch<2'")
    assert findings["no-such-package"].seen == "not installed"


def test_packages_in_range_are_one_line() -> None:
    (finding,) = doctor.packages()
    assert finding.level == OK
    assert f"mlflow {metadata.version('mlflow')}" in finding.seen


def test_python_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.python().level == OK
    monkeypatch.setattr("platform.python_version", lambda: "3.8.1")
    assert doctor.python().level == PROBLEM


def test_a_sandbox_is_looked_for_where_it_is_needed(
    tiny_values: dict[str, Any], save_params: SaveParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor.generated_code(save_params(tiny_values)) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    values = tiny_values | {"evaluation": tiny_values["evaluation"] | {"run_generated_code": True}}
    (finding,) = doctor.generated_code(save_params(values))
    assert finding.level == PROBLEM
    assert "needs bubblewrap" in finding.seen


@pytest.mark.parametrize(("free", "level"), [(0.5, PROBLEM), (2, WARNING), (50, OK)])
def test_disk_space(free: float, level: str) -> None:
    assert doctor.disk(free).level == level


@pytest.mark.parametrize(("kind", "level"), [("nfs4", WARNING), ("9p", WARNING), ("ext4", OK), ("apfs", OK)])
def test_network_file_systems(kind: str, level: str) -> None:
    assert doctor.file_system(kind).level == level


def test_the_innermost_mount_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Mount:
        def __init__(self, mountpoint: str, fstype: str) -> None:
            self.mountpoint, self.fstype = mountpoint, fstype

    mounts = [Mount("/", "ext4"), Mount(str(tmp_path.resolve()), "nfs"), Mount(f"{tmp_path.resolve()}x", "tmpfs")]
    monkeypatch.setattr("psutil.disk_partitions", lambda **_: mounts)
    assert doctor._type_of_file_system(tmp_path) == "nfs"
    assert doctor._type_of_file_system(tmp_path.parent) == "ext4"


def test_missing_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "dvc" else f"/elsewhere/{name}")
    levels = {finding.what: finding.level for finding in doctor.commands()}
    assert levels == {"git": OK, "dvc": PROBLEM, "folora": PROBLEM}


def test_threads_beyond_the_cores(
    save_params: SaveParams, tiny_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert doctor.threads(save_params(tiny_values)).level == OK
    values = tiny_values | {"threads": tiny_values["threads"] | {"train": 3}}
    found = doctor.threads(save_params(values))
    assert (found.level, found.advice) == (WARNING, "set threads.* to 2 or less")


def test_locks_of_processes_that_ended(in_tmp: Path, ended: int) -> None:
    assert [finding.level for finding in doctor.locks()] == [OK]
    (in_tmp / ".dvc" / "tmp").mkdir(parents=True)
    held = {"write": {"out": {"pid": ended, "cmd": "dvc repro"}}, "read": {"in": [{"pid": ended, "cmd": "dvc repro"}]}}
    (in_tmp / ".dvc" / "tmp" / "rwlock").write_text(json.dumps(held))
    assert [finding.level for finding in doctor.locks()] == [WARNING]
    assert list(locks.stale_locks()) == [Path(".dvc/tmp/rwlock")]
    assert not locks.busy()
    held["write"]["out"]["pid"] = os.getpid()
    (in_tmp / ".dvc" / "tmp" / "rwlock").write_text(json.dumps(held))
    assert locks.stale_locks() == {}
    assert locks.busy()


@pytest.fixture
def a_snakemake(in_tmp: Path) -> Iterator[int]:
    """A process in this folder that is called snakemake."""
    (in_tmp / "snakemake").write_text("import time; time.sleep(60)")
    process = subprocess.Popen([sys.executable, "snakemake"], cwd=in_tmp)
    yield process.pid
    process.kill()
    process.wait()


def test_a_running_snakemake_is_seen(a_snakemake: int) -> None:
    assert locks.snakemake_processes() == [a_snakemake]
    assert locks.busy()


def test_the_clone_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    findings = doctor.examine(Path("params.yaml"))
    unwell = [finding for finding in findings if finding.level == PROBLEM]
    assert not unwell
    assert {"python", "packages", "git", "dvc", "folder", "parameters", "threads", "gpu", "disk", "locks"} <= {
        finding.what for finding in findings
    }


def test_a_problem_is_exit_code_1() -> None:
    """An empty folder has no params.yaml and no dvc.yaml."""
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 1
    problems = {finding["what"] for finding in json.loads(done.stdout) if finding["level"] == PROBLEM}
    assert problems == {"folder", "parameters"}
    said = CliRunner().invoke(app, ["doctor"])
    assert said.exit_code == 1
    assert "problem  folder: no dvc.yaml here: go to the folder of the clone" in said.stdout.splitlines()
