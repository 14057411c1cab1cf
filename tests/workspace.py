"""A repository as a user has it after a clone, with the tiny preset, and what is done in one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
AUTHOR = ("-c", "user.name=t", "-c", "user.email=t@t")


def run(workspace: Path, *command: str) -> str:
    """Run a command in a workspace; its output."""
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    result = subprocess.run(command, cwd=workspace, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def make_workspace(folder: Path) -> Path:
    """A repository as a user has it after a clone, with the tiny preset and rows that are downloaded from a folder."""
    for name in ("src", "workflow", "profiles"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("dvc.yaml", "Snakefile", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copy(ROOT / "workflow" / "presets" / "tiny.yaml", folder / "params.yaml")
    (folder / "rows").mkdir()
    rows = ({"prompt": f"{a}-{b}>", "response": str(a - b)} for a in range(8) for b in range(a + 1))
    (folder / "rows" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    change(folder, "downloads", {"mine": {"dataset": "rows", "config": None, "split": "train", "revision": None}})
    change(folder, "tasks.subtraction.dataset", "artifacts/downloads/mine")
    run(folder, "git", "init", "--quiet")
    run(folder, "dvc", "init", "--quiet")
    run(folder, "git", "add", ".")
    run(folder, "git", *AUTHOR, "commit", "--quiet", "-m", "start")
    return folder


def lock(workspace: Path) -> object:
    """The content of dvc.lock, whatever the order its stages were recorded in."""
    return YAML(typ="safe", pure=True).load(workspace / "dvc.lock")


def stale(workspace: Path) -> set[str]:
    return set(json.loads(run(workspace, "dvc", "status", "--json")))


def same_bytes(one: Path, other: Path) -> None:
    """Assert that two workspaces hold the same artefacts and record the same with DVC."""
    files = sorted(path.relative_to(one) for path in (one / "artifacts").rglob("*") if path.is_file())
    assert any(path.name == "adapter_model.safetensors" for path in files)
    for path in files:
        assert (one / path).read_bytes() == (other / path).read_bytes(), path
    assert lock(one) == lock(other)


def change(workspace: Path, key: str, value: object) -> None:
    """Set a dotted key of params.yaml."""
    yaml = YAML()
    content = yaml.load(workspace / "params.yaml")
    *parents, last = key.split(".")
    table = content
    for parent in parents:
        table = table[parent]
    table[last] = value
    yaml.dump(content, workspace / "params.yaml")
