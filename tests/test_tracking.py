from __future__ import annotations

import ast
import logging
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from conftest import ROOT

from folora.evaluate import evaluate_method
from folora.params import Tracking
from folora.storage import digest_of, read_json
from folora.tracking import DIGEST_TAG, run_log, source_tags
from folora.train import TrainInputs, train_run

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Pipeline

pytestmark = pytest.mark.usefixtures("in_tmp")

LORA = "lora-3e-3-s0"


def logged(settings: Tracking) -> list[Any]:
    """Every run of the store's experiment."""
    from mlflow import MlflowClient

    client = MlflowClient(settings.uri)
    experiment = client.get_experiment_by_name(settings.experiment)
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def test_tags_parameters_and_metrics(store: Tracking, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.txt").write_text("content")
    with run_log(store, "name", "digest", {"method": "lora"}) as log:
        log.params({"run": {"seed": 3}, "deep": {"er": {"x": [1, 2]}}, "long": "x" * 900})
        log.metrics({"loss": 2.0, "kl": 0.5}, 1)
        log.metrics({"loss": 1.0}, 2)
        log.folder(tmp_path / "files", "adapter")
    (run,) = logged(store)
    assert run.info.run_name == "name"
    assert run.info.status == "FINISHED"
    assert (run.data.tags[DIGEST_TAG], run.data.tags["method"]) == ("digest", "lora")
    assert run.data.params == {"run.seed": "3", "deep.er.x": "[1, 2]", "long": "x" * 500}
    assert run.data.metrics == {"loss": 1.0, "kl": 0.5}
    assert [path.read_text() for path in (tmp_path / "mlruns").rglob("adapter/a.txt")] == ["content"]


def test_one_run_a_digest(store: Tracking) -> None:
    for digest, value in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        with run_log(store, "name", digest, {}) as log:
            log.metrics({"value": value}, int(value))
    assert {run.data.tags[DIGEST_TAG]: run.data.metrics["value"] for run in logged(store)} == {"a": 3.0, "b": 2.0}


@pytest.mark.parametrize("error", [ValueError("a mistake"), KeyboardInterrupt()])
def test_a_failing_block_fails_its_run(error: BaseException, store: Tracking) -> None:
    def fail() -> None:
        with run_log(store, "name", "digest", {}):
            raise error

    with pytest.raises(type(error)):
        fail()
    assert [run.info.status for run in logged(store)] == ["FAILED"]


@pytest.fixture
def dead_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")


@pytest.mark.usefixtures("dead_server")
def test_a_dead_server_changes_nothing(
    pipeline: Pipeline, runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = TrainInputs(pipeline.task, pipeline.proxy, pipeline.heldout, pipeline.spectrum)
    with caplog.at_level(logging.WARNING, "folora.tracking"):
        train_run(pipeline.params, LORA, pipeline.base, inputs, tmp_path / LORA)
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "folora.tracking"]
    assert "127.0.0.1" in warning
    assert "goes on without it" in warning
    assert "\n" not in warning
    expected = runs / "lora" / LORA
    files = [path.relative_to(expected) for path in expected.rglob("*") if path.is_file()]
    assert files
    assert all((tmp_path / LORA / file).read_bytes() == (expected / file).read_bytes() for file in files)


@pytest.mark.usefixtures("dead_server")
def test_the_environment_overrides_the_address(store: Tracking) -> None:
    with run_log(store, "name", "digest", {}) as log:
        log.metrics({"x": 1.0}, 0)
    assert not logged(store)


@pytest.mark.parametrize("uri", ["sqlite:////proc/nowhere/mlflow.db", "nonsense://x"])
def test_an_impossible_store_does_not_fail_the_block(uri: str) -> None:
    reached = False
    with run_log(Tracking(experiment="test", uri=uri), "name", "digest", {}) as log:
        log.params({"a": 1})
        log.metrics({"x": 1.0}, 0)
        reached = True
    assert reached


def test_an_error_on_the_way_is_reported_once(
    store: Tracking, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def break_down(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise ConnectionError("the line is dead\nand more")

    monkeypatch.setattr("mlflow.MlflowClient.log_batch", break_down)
    with run_log(store, "name", "digest", {}) as log:
        for step in range(3):
            log.metrics({"x": 1.0}, step)
    warnings = [record.getMessage() for record in caplog.records if record.name == "folora.tracking"]
    assert warnings == ["MLflow: the line is dead; this run goes on without it"]
    assert calls == [1]


def test_evaluate_adds_to_the_run_of_train(pipeline: Pipeline, runs: Path, store: Tracking, tmp_path: Path) -> None:
    params = pipeline.params.model_copy(update={"tracking": store})
    inputs = TrainInputs(pipeline.task, pipeline.proxy, pipeline.heldout, pipeline.spectrum)
    train_run(params, LORA, pipeline.base, inputs, tmp_path / "runs" / LORA)
    (run,) = logged(store)
    assert run.data.tags[DIGEST_TAG] == digest_of(read_json(runs / "lora" / LORA / "manifest.json"))
    assert {"method": "lora", "task": "subtraction", "run": LORA}.items() <= run.data.tags.items()
    assert run.data.params["run.learning_rate"] == "0.003"
    assert run.data.params["adapter.rank"] == str(params.adapter.rank)
    assert {"train/loss", "train/kl", "train/penalty", "train/utility"} <= run.data.metrics.keys()
    evaluate_method(
        params, "lora", pipeline.base, pipeline.world, pipeline.heldout, tmp_path / "runs", tmp_path / "evaluation"
    )
    (both,) = logged(store)
    assert both.info.run_id == run.info.run_id
    assert both.info.status == "FINISHED"
    assert run.data.metrics.items() <= both.data.metrics.items()
    assert {"target", "validation", "kept", "kl", "perplexity"} <= both.data.metrics.keys()


@pytest.mark.slow
def test_eight_processes_open_a_fresh_store_at_once(tmp_path: Path) -> None:
    script = (
        "import sys; from folora.params import Tracking; from folora.tracking import run_log\n"
        "with run_log(Tracking(experiment='new', uri='sqlite:///fresh.db'), 'name', sys.argv[1], {}) as log:\n"
        "    log.metrics({'value': float(sys.argv[1])}, 0)\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script, str(i)], cwd=tmp_path) for i in range(8)]
    assert [process.wait() for process in processes] == [0] * 8
    found = logged(Tracking(experiment="new", uri=f"sqlite:///{tmp_path / 'fresh.db'}"))
    assert sorted(run.data.metrics["value"] for run in found) == list(range(8))
    assert {run.info.status for run in found} == {"FINISHED"}


def test_source_tags(tmp_path: Path) -> None:
    assert source_tags() == {}

    def git(*arguments: str) -> str:
        identity = {f"GIT_{who}_{what}": "x@y" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        environment = {**os.environ, **identity}
        command = ["git", *arguments]
        return subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "--quiet", "-m", "x")
    commit = git("rev-parse", "HEAD")
    assert source_tags() == {"mlflow.source.git.commit": commit, "git.dirty": "false"}
    (tmp_path / "a").write_text("2")
    assert source_tags() == {"mlflow.source.git.commit": commit, "git.dirty": "true"}


def test_mlflow_is_imported_in_one_place() -> None:
    importers = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            importers |= {path.name for name in names if name.split(".")[0] == "mlflow"}
    assert importers == {"tracking.py"}
