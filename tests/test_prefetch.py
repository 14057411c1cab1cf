"""A model, rows and evaluation tasks of a hub, fetched once; then the whole pipeline without it."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
from fake_hub import COMMIT, hub
from test_pipeline import change, make_workspace, run

from folora.foundation import LOADING
from folora.storage import read_json

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

TASK = {
    "dataset_path": "me/items",
    "test_split": "test",
    "output_type": "loglikelihood",
    "doc_to_text": "prompt",
    "doc_to_target": "response",
    "target_delimiter": "",
    "metadata": {"version": 1.0},
}


def write_rows(path: Path, numbers: range) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"prompt": f"{a}+1>", "response": str(a + 1)} for a in numbers)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.usefixtures("sandbox")
def test_after_prefetch_no_stage_needs_a_network(
    tiny_foundation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "hub"
    shutil.copytree(tiny_foundation / "foundation", root / "models" / "me" / "tiny")
    (root / "models" / "me" / "tiny" / "manifest.json").unlink()
    write_rows(root / "datasets" / "me" / "rows" / "train.jsonl", range(30))
    write_rows(root / "datasets" / "me" / "items" / "test.jsonl", range(30, 40))
    workspace = make_workspace(tmp_path / "workspace")
    (workspace / "tasks" / "evaluation").mkdir(parents=True)
    for name in ("target", "validation", "kept"):
        (workspace / "tasks" / "evaluation" / f"{name}.yaml").write_text(json.dumps({"task": name, **TASK}))
    loading = LOADING.model_dump()
    change(workspace, "foundation", {"source": "pretrained", "model": "me/tiny", "revision": None, "loading": loading})
    change(workspace, "downloads.mine.dataset", "me/rows")
    change(workspace, "tasks.subtraction.target", "target")
    change(workspace, "tasks.subtraction.validation", "validation")
    change(workspace, "evaluation.tasks", "tasks")
    change(workspace, "evaluation.kept", ["kept"])
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("HF_DATASETS_CACHE")
    with hub(root) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        said = run(workspace, "folora", "prefetch")
    assert "stages: foundation, download@mine\nevaluation tasks: target, validation, kept\n" in said
    for artefact in ("foundation", "downloads/mine"):
        assert read_json(workspace / "artifacts" / artefact / "manifest.json")["commit"] == COMMIT
    run(workspace, "bwrap", "--dev-bind", "/", "/", "--unshare-net", "dvc", "repro")
    config = read_json(workspace / "artifacts/runs/lora/lora-3e-3-s0/adapter/adapter_config.json")
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/tiny", COMMIT)
    metrics = read_json(workspace / "results/report/metrics.json")
    assert metrics["base"]["target"] == metrics["base"]["kept"] > 0


def test_the_offline_preset_fetches_its_downloads_only(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")
    assert "stages: download@mine\nevaluation tasks: none of a hub\n" in run(workspace, "folora", "prefetch")
    assert not (workspace / "artifacts/foundation").exists()
