"""Results in an S3 bucket: pushed on one machine, pulled on another, where nothing has to run again."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from services import BUCKET
from workspace import AUTHOR, run, same_bytes, stale

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow
pytest.importorskip("dvc_s3", reason="no dvc-s3")


def test_what_one_machine_pushes_another_pulls_and_publishes(by_dvc: Path, tmp_path: Path, bucket: str) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    shutil.copytree(by_dvc, one)
    run(one, "dvc", "remote", "add", "--default", "bucket", f"s3://{BUCKET}/folora")
    run(one, "dvc", "remote", "modify", "bucket", "endpointurl", bucket)
    keys = {name: os.environ[f"AWS_{name.upper()}"] for name in ("access_key_id", "secret_access_key")}
    for name, key in keys.items():
        run(one, "dvc", "remote", "modify", "--local", "bucket", name, key)
    run(one, "dvc", "push")
    run(one, "git", "add", ".")
    run(one, "git", *AUTHOR, "commit", "--quiet", "-m", "results")
    run(tmp_path, "git", "clone", "--quiet", str(one), str(other))
    for key in keys.values():
        assert key in (one / ".dvc" / "config.local").read_text()
        assert not any(key.encode() in content for content in _in_git(other))
    run(other, "dvc", "pull")
    same_bytes(one, other)
    assert stale(other) == set()
    assert "up to date" in run(other, "dvc", "repro")
    run(other, "folora", "publish", "--uri", f"sqlite:///{tmp_path}/mlflow.db")
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("folora")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(found.data.tags["run"] for found in runs) == ["base", "folora-replay-1e-2-s0", "lora-3e-3-s0"]


def _in_git(clone: Path) -> Iterator[bytes]:
    """The content of every object, on branches or not, and of every tracked file."""
    listing = ["git", "cat-file", "--batch-all-objects", "--batch"]
    yield subprocess.run(listing, cwd=clone, capture_output=True, check=True).stdout
    for name in run(clone, "git", "ls-files").splitlines():
        yield (clone / name).read_bytes()
