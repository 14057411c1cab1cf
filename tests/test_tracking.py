from __future__ import annotations

import ast
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import ROOT
from services import BUCKET, Server, missing_postgres, postgres

import folora.tracking
from folora.commands.publish import publish_runs
from folora.errors import FoLoRAError
from folora.evaluate import evaluate_method
from folora.params import Tracking
from folora.records import Card, card_of, read_record, source_tags
from folora.selection import BASE
from folora.spectrum import read_spectrum
from folora.storage import digest_of_file, read_json, read_table
from folora.tracking import DIGEST_TAG, NOTE_TAG, run_log
from folora.train import TrainInputs, train_run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Pipeline, SaveParams

    from folora.params import Params

pytestmark = pytest.mark.usefixtures("in_tmp")

LORA, REPLAY = "lora-3e-3-s0", "folora-replay-1e-2-s0"
GOES_ON = "the run goes on, `folora publish` sends it later"

Histories = dict[tuple[str, str], list[tuple[int, float]]]


def card(digest: str = "digest", **params: Any) -> Card:
    return Card("run", "name", digest, {"method": "lora"}, params, [("task@x", "0" * 64, "training")])


def client_of(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri)


def logged(settings: Tracking) -> list[Any]:
    """Every run of the store's experiment."""
    client = client_of(settings.uri)
    experiment = client.get_experiment_by_name(settings.experiment)
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def histories(settings: Tracking) -> Histories:
    """Every reading in the store, by digest and metric, except the machine's."""
    client = client_of(settings.uri)
    return {
        (run.data.tags[DIGEST_TAG], key): [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
        for run in logged(settings)
        for key in run.data.metrics
        if not key.startswith("system/")
    }


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "folora.tracking"]


def inputs_of(pipeline: Pipeline) -> TrainInputs:
    return TrainInputs(pipeline.task, pipeline.proxy, pipeline.heldout, pipeline.spectra)


def logging_to(params: Params, settings: Tracking) -> Params:
    return params.model_copy(update={"tracking": settings})


# a store
def test_tags_parameters_metrics_and_datasets(store: Tracking) -> None:
    params = {"run.seed": 3, "deep.er.x": [1, 2], "long": "x" * 900}
    with run_log(store, card(**params), {"preset": "tiny"}) as log:
        log.metrics({"loss": 2.0, "kl": 0.5}, 1)
        log.metrics({"loss": 1.0}, 2)
    (run,) = logged(store)
    assert run.info.run_name == "name"
    assert run.info.status == "FINISHED"
    assert {DIGEST_TAG: "digest", "method": "lora", "preset": "tiny"}.items() <= run.data.tags.items()
    assert run.data.params == {"run.seed": "3", "deep.er.x": "[1, 2]", "long": "x" * 500}
    system = {key: value for key, value in run.data.metrics.items() if key.startswith("system/")}
    assert run.data.metrics.items() - system.items() == {("loss", 1.0), ("kl", 0.5)}
    assert 0 < system["system/system_memory_usage_percentage"] < 100
    assert system["system/process_memory_megabytes"] > 50
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("task@x", "0" * 36)
    assert [(tag.key, tag.value) for tag in dataset.tags] == [("mlflow.data.context", "training")]


def test_the_experiment_says_how_to_compare(store: Tracking) -> None:
    client = client_of(store.uri)
    client.create_experiment(store.experiment)  # by hand, without a note
    with run_log(store, card(), {}):
        pass
    note = client.get_experiment_by_name(store.experiment).tags[NOTE_TAG]
    assert all(word in note for word in ("`target`", "`kept`", "`kl`", "Scatter Plot"))


def test_one_run_a_digest(store: Tracking) -> None:
    for digest, value in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        with run_log(store, card(digest), {}) as log:
            log.metrics({"value": value}, int(value))
    assert {run.data.tags[DIGEST_TAG]: run.data.metrics["value"] for run in logged(store)} == {"a": 3.0, "b": 2.0}


def test_a_run_begun_again_repeats_no_reading(store: Tracking) -> None:
    for last in (2, 3):
        with run_log(store, card(), {}) as log:
            for step in range(1, last + 1):
                log.metrics({"loss": 1 / step}, step)
    assert histories(store) == {("digest", "loss"): [(step, 1 / step) for step in (1, 2, 3)]}


@pytest.mark.parametrize(
    ("code", "times", "sent"), [("BAD_REQUEST", 2, True), ("BAD_REQUEST", 3, False), ("INTERNAL_ERROR", 1, False)]
)
def test_a_database_that_refuses_is_asked_again(
    code: str,
    times: int,
    sent: bool,
    store: Tracking,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As PostgreSQL does where two runs add one data set at the same moment; see ``tests/load.py``."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import ErrorCode

    log_inputs, refusals = MlflowClient.log_inputs, [ErrorCode.Value(code)] * times

    def refuse(*arguments: Any) -> None:
        if refusals:
            raise MlflowException("duplicate key", refusals.pop())
        log_inputs(*arguments)

    monkeypatch.setattr("mlflow.MlflowClient.log_inputs", refuse)
    monkeypatch.setattr(folora.tracking, "PAUSES", (0.1, 0.1))
    with run_log(store, card(), {}) as log:
        log.metrics({"loss": 1.0}, 1)
    (run,) = logged(store)
    assert ("loss" in run.data.metrics) == (len(run.inputs.dataset_inputs) == 1) == sent
    assert len(warnings(caplog)) == (not sent)


@pytest.mark.parametrize("error", [ValueError("a mistake"), KeyboardInterrupt()])
def test_a_failing_block_fails_its_run(error: BaseException, store: Tracking) -> None:
    def fail() -> None:
        with run_log(store, card(), {}):
            raise error

    with pytest.raises(type(error)):
        fail()
    assert [run.info.status for run in logged(store)] == ["FAILED"]
    with run_log(store, card(), {}):
        assert True
    assert [run.info.status for run in logged(store)] == ["FINISHED"]


# a server that is not there
@pytest.fixture
def dead_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.mark.usefixtures("dead_server")
def test_a_dead_server_changes_nothing(
    pipeline: Pipeline, runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_run(pipeline.params, LORA, pipeline.base, inputs_of(pipeline), tmp_path / LORA)
    (warning,) = warnings(caplog)
    assert "127.0.0.1" in warning
    assert warning.endswith(GOES_ON)
    assert "\n" not in warning
    expected = runs / "lora" / LORA
    files = [path.relative_to(expected) for path in expected.rglob("*") if path.is_file()]
    assert files
    assert all((tmp_path / LORA / file).read_bytes() == (expected / file).read_bytes() for file in files)


@pytest.mark.usefixtures("dead_server")
def test_the_environment_overrides_the_address(store: Tracking) -> None:
    with run_log(store, card(), {}) as log:
        log.metrics({"x": 1.0}, 0)
    assert not logged(store)


@pytest.mark.parametrize("uri", ["sqlite:////proc/nowhere/mlflow.db", "nonsense://x"])
def test_an_impossible_store_does_not_fail_the_block(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    with run_log(Tracking(experiment="test", uri=uri), card(), {}) as log:
        log.metrics({"x": 1.0}, 0)
    assert len(warnings(caplog)) == 1


def test_an_error_on_the_way_is_reported_once(
    store: Tracking, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def break_down(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise ConnectionError("the line is dead\nand more")

    monkeypatch.setattr("mlflow.MlflowClient.log_batch", break_down)
    with run_log(store, card(), {}) as log:
        for step in range(3):
            log.metrics({"x": 1.0}, step)
    assert warnings(caplog) == [f"MLflow: the line is dead; {GOES_ON}"]
    assert calls == [1]


def test_training_waits_for_no_server(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A server that accepts and never answers."""
    monkeypatch.setattr(folora.tracking, "PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = Tracking(experiment="test", uri=f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with run_log(settings, card(), {}) as log:
            for step in range(100):
                log.metrics({"x": 1.0}, step)
            assert time.monotonic() - start < 0.5
        assert time.monotonic() - start < 2
        # before the server closes, which the sender would report too
        assert warnings(caplog) == ["MLflow takes long: `folora publish` sends what is missing"]


def test_a_locked_store_delays_nothing(store: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folora.tracking, "PATIENCE", 0.5)
    with sqlite3.connect(store.uri.removeprefix("sqlite:///")) as other:
        other.execute("BEGIN EXCLUSIVE")
        start = time.monotonic()
        with run_log(store, card(), {}) as log:
            log.metrics({"x": 1.0}, 0)
        assert time.monotonic() - start < 2


# a run, from training to publishing
def test_evaluate_adds_to_the_run_of_train(pipeline: Pipeline, runs: Path, store: Tracking, tmp_path: Path) -> None:
    params = logging_to(pipeline.params, store)
    train_run(params, REPLAY, pipeline.base, inputs_of(pipeline), tmp_path / "runs" / REPLAY)
    (run,) = logged(store)
    manifest = read_json(runs / "folora-replay" / REPLAY / "manifest.json")
    assert run.data.tags[DIGEST_TAG] == card_of(manifest).digest
    tags = {"method": "folora-replay", "kind": "folora", "task": "subtraction", "run": REPLAY, "preset": "custom"}
    assert tags.items() <= run.data.tags.items()
    assert run.data.params["run.learning_rate"] == "0.01"
    assert run.data.params["adapter.rank"] == str(params.adapter.rank)
    digests = {given.dataset.name: given.dataset.digest for given in run.inputs.dataset_inputs}
    assert digests.keys() == {"task@subtraction", "proxy", "heldout"}
    assert digests["heldout"] == digest_of_file(pipeline.heldout)[:36]
    curves = ("loss", "learning_rate", "grad_norm", "penalty", "utility", "kl", "tokens_per_second")
    assert {f"train/{key}" for key in curves} <= run.data.metrics.keys()
    evaluate_method(
        params, "folora-replay", pipeline.base, pipeline.world, pipeline.heldout, tmp_path / "runs", tmp_path / "out"
    )
    (both,) = logged(store)
    assert both.info.run_id == run.info.run_id
    assert both.info.status == "FINISHED"
    assert run.data.metrics.items() <= both.data.metrics.items()
    measured = {(row["step"], row["kept"]) for row in read_table(tmp_path / "out" / "metrics.parquet")[0].to_pylist()}
    assert set(histories(store)[card_of(manifest).digest, "kept"]) == measured
    assert len(measured) == 2


def test_the_meter_does_not_count_in_the_speed(
    pipeline: Pipeline, store: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, pause = folora.train.HeldOutText.measure, 2.0

    def slowly(*arguments: Any) -> Any:
        time.sleep(pause)
        return measure(*arguments)

    monkeypatch.setattr(folora.train.HeldOutText, "measure", slowly)
    train_run(logging_to(pipeline.params, store), LORA, pipeline.base, inputs_of(pipeline), tmp_path / LORA)
    (run,) = logged(store)
    speeds = client_of(store.uri).get_metric_history(run.info.run_id, "train/tokens_per_second")
    assert [speed.step for speed in speeds] == [1, 3, 6]
    longest = max(len(ids) for ids in read_table(pipeline.task)[0]["input_ids"].to_pylist())
    tokens = pipeline.params.train.batch_size * longest  # of a step, at most
    assert all(3 * tokens / pause < speed.value < tokens / 1e-4 for speed in speeds[1:])


def test_gates_are_those_of_the_method(pipeline: Pipeline, runs: Path) -> None:
    _, about = read_table(runs / "folora-replay" / REPLAY / "history.parquet")
    spectrum = read_spectrum(pipeline.spectrum)
    eigenvalues = {name: spectrum.inputs[name].eigenvalues for name in spectrum.groups}
    expected = {name: float((value / (value + 1)).mean()) for name, value in eigenvalues.items()}
    assert about["gates"] == pytest.approx(expected, rel=1e-5)
    assert read_table(runs / "lora" / LORA / "history.parquet")[1]["gates"] == {}


def test_the_adapter_is_a_model_that_peft_loads(
    pipeline: Pipeline, runs: Path, evaluations: Path, store: Tracking
) -> None:
    from mlflow.artifacts import download_artifacts
    from peft import PeftModel

    params = logging_to(pipeline.params, store)
    publish_runs(params, runs, evaluations, store.uri)
    client = client_of(store.uri)
    experiment = client.get_experiment_by_name(store.experiment).experiment_id
    models = {model.name: model for model in client.search_logged_models([experiment])}
    assert models.keys() == {LORA, REPLAY}
    (run,) = [run for run in logged(store) if run.data.tags["run"] == LORA]
    assert models[LORA].source_run_id == run.info.run_id
    assert models[LORA].status == "READY"
    assert {metric.key: metric.value for metric in models[LORA].metrics}["kept"] == run.data.metrics["kept"]
    assert [output.model_id for output in client.get_run(run.info.run_id).outputs.model_outputs] == [
        models[LORA].model_id
    ]
    folder = download_artifacts(artifact_uri=models[LORA].artifact_location)
    assert sorted(path.name for path in Path(folder).iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        published = PeftModel.from_pretrained(pipeline.base.load_model(), folder)(input_ids=ids).logits
        own = PeftModel.from_pretrained(pipeline.base.load_model(), runs / "lora" / LORA / "adapter")
        assert torch.equal(published, own(input_ids=ids).logits)


def test_weights_of_the_base_model_are_not_sent(pipeline: Pipeline, store: Tracking, tmp_path: Path) -> None:
    values = pipeline.values()
    values |= {"methods": values["methods"] | {"lora": {"kind": "full"}}, "tracking": store.model_dump()}
    params = type(pipeline.params).model_validate(values)
    train_run(params, LORA, pipeline.base, inputs_of(pipeline), tmp_path / LORA)
    assert read_record(tmp_path / LORA, [], {}).adapter is None
    (run,) = logged(store)
    assert run.info.status == "FINISHED"
    assert not client_of(store.uri).search_logged_models([run.info.experiment_id])


def test_a_budget_stands_beside_the_kl_it_ended_at(pipeline: Pipeline, store: Tracking, tmp_path: Path) -> None:
    values = pipeline.values()
    methods = values["methods"] | {"lora": {"kind": "lora", "kl_budget": 1e-5}}
    params = type(pipeline.params).model_validate(values | {"methods": methods, "tracking": store.model_dump()})
    train_run(params, LORA, pipeline.base, inputs_of(pipeline), tmp_path / LORA)
    kl = read_table(tmp_path / LORA / "history.parquet")[0]["kl"].to_pylist()[-1]
    expected = {"budget/allowed": 1e-5, "budget/kl": kl}
    (run,) = logged(store)
    assert run.data.metrics.items() >= expected.items()
    shutil.rmtree(".folora/tracking")  # the artefacts alone say it too
    found = {one.key: one.value for one in read_record(tmp_path / LORA, [], {}).readings}
    assert found.items() >= expected.items()


def logged_live(pipeline: Pipeline) -> dict[tuple[str, str], set[tuple[int, float]]]:
    """What the runs of the fixtures logged while they ran."""
    return {place: set(values) for place, values in histories(pipeline.logged.tracking).items()}


def test_published_twice_is_there_once(
    pipeline: Pipeline, runs: Path, evaluations: Path, store: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = logging_to(pipeline.params, store)
    monkeypatch.chdir(pipeline.folder)  # where the journals of the fixture are
    done = publish_runs(params, runs, evaluations, store.uri)
    assert (done.sent, done.unmeasured, done.missing) == ([LORA, REPLAY, BASE], [], [])
    first, stored = logged(store), histories(store)
    publish_runs(params, runs, evaluations, store.uri)
    assert [run.to_dictionary() for run in logged(store)] == [run.to_dictionary() for run in first]
    assert histories(store) == stored
    live = logged_live(pipeline)
    assert stored.keys() == live.keys()
    assert all(set(values) <= live[place] for place, values in stored.items())


def test_the_base_model_stands_beside_the_runs(
    pipeline: Pipeline, runs: Path, evaluations: Path, store: Tracking
) -> None:
    publish_runs(logging_to(pipeline.params, store), runs, evaluations, store.uri)
    (base,) = (run for run in logged(store) if run.data.tags["method"] == BASE)
    (measured,) = read_table(evaluations / BASE / "metrics.parquet")[0].to_pylist()
    for name in ("target", "kept", "perplexity"):
        assert base.data.metrics[name] == pytest.approx(measured[name])
    assert base.info.run_name == "base · subtraction"
    assert base.info.status == "FINISHED"


def test_artefacts_alone_are_enough(pipeline: Pipeline, runs: Path, evaluations: Path, store: Tracking) -> None:
    """In a folder without journals, as after ``dvc pull``, only what the machine did is not known."""
    publish_runs(logging_to(pipeline.params, store), runs, evaluations, store.uri)
    stored = histories(store)
    live = {place: v for place, v in logged_live(pipeline).items() if "second" not in place[1]}
    assert {place: set(values) for place, values in stored.items()} == live


def test_results_of_another_training_are_not_published(
    pipeline: Pipeline, runs: Path, evaluations: Path, store: Tracking, tmp_path: Path
) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    manifest = tmp_path / "runs" / "lora" / LORA / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"threads": 1', '"threads": 2'))
    shutil.rmtree(tmp_path / "runs" / "folora-replay")
    done = publish_runs(logging_to(pipeline.params, store), tmp_path / "runs", evaluations, store.uri)
    assert (done.sent, done.unmeasured, done.missing) == ([BASE], [LORA], [REPLAY])
    (run,) = (run for run in logged(store) if run.data.tags["run"] == LORA)
    assert "train/loss" in run.data.metrics
    assert "kept" not in run.data.metrics


def test_an_adapter_that_was_sent_by_half_is_sent_again(
    pipeline: Pipeline, runs: Path, evaluations: Path, store: Tracking
) -> None:
    """The last of its requests failed."""
    from mlflow import MlflowClient

    params = logging_to(pipeline.params, store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowClient, "finalize_logged_model", lambda *_: 1 / 0)
        with pytest.raises(FoLoRAError, match="then publish again"):
            publish_runs(params, runs, evaluations, store.uri)
    publish_runs(params, runs, evaluations, store.uri)
    (experiment,) = {run.info.experiment_id for run in logged(store)}
    models = client_of(store.uri).search_logged_models([experiment])
    assert sorted((model.name, str(model.status)) for model in models) == [(REPLAY, "READY"), (LORA, "READY")]


@pytest.mark.usefixtures("dead_server")
def test_publishing_to_a_dead_server_is_one_line(
    pipeline: Pipeline, runs: Path, evaluations: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        FoLoRAError, match=r"^MLflow at http://127\.0\.0\.1:9: .*: see that it runs, then publish again$"
    ):
        publish_runs(pipeline.params, runs, evaluations, "http://127.0.0.1:9")
    with pytest.raises(FoLoRAError, match="holds no finished run"):
        publish_runs(pipeline.params, tmp_path, evaluations, "http://127.0.0.1:9")


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[Server]]:
    """Two fresh servers."""
    both = [Server(tmp_path / name) for name in ("first", "second")]
    try:
        yield [server.wait() for server in both]
    finally:
        for server in both:
            server.kill()


@pytest.mark.slow
def test_a_server_killed_in_mid_run_loses_nothing(
    servers: list[Server],
    pipeline: Pipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, second = servers
    params = logging_to(pipeline.params, Tracking(experiment="test", uri=first.uri))
    record = folora.train.Recorder.on_log

    def kill_after_a_reading(recorder: Any, args: Any, state: Any, *rest: Any, **more: Any) -> None:
        record(recorder, args, state, *rest, **more)
        if state.global_step == 3:
            deadline = time.monotonic() + 60
            while not logged(params.tracking) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert logged(params.tracking)
            first.kill()
            kill_after_a_reading.at = time.monotonic()  # type: ignore[attr-defined]

    monkeypatch.setattr(folora.train.Recorder, "on_log", kill_after_a_reading)
    train_run(params, LORA, pipeline.base, inputs_of(pipeline), tmp_path / "runs" / "lora" / LORA)
    assert time.monotonic() - kill_after_a_reading.at < 30  # type: ignore[attr-defined]
    assert len(warnings(caplog)) == 1
    output = tmp_path / "evaluation" / "lora"
    arguments = (pipeline.base, pipeline.world, pipeline.heldout, tmp_path / "runs" / "lora", output)
    evaluate_method(params, "lora", *arguments)
    assert len(warnings(caplog)) == 2

    done = publish_runs(params, tmp_path / "runs", tmp_path / "evaluation", second.uri)
    assert (done.sent, done.missing) == ([LORA], [REPLAY])
    settings = Tracking(experiment="test", uri=second.uri)
    (run,) = logged(settings)
    stored = histories(settings)
    assert [step for step, _ in stored[run.data.tags[DIGEST_TAG], "train/tokens_per_second"]] == [1, 3, 6]
    assert sorted(step for step, _ in stored[run.data.tags[DIGEST_TAG], "kept"]) == [3, 6]
    publish_runs(params, tmp_path / "runs", tmp_path / "evaluation", second.uri)
    assert histories(settings) == stored
    assert len(client_of(second.uri).search_logged_models([run.info.experiment_id])) == 1


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """The address of a PostgreSQL database."""
    if reason := missing_postgres():
        pytest.skip(reason)
    with postgres() as uri:
        yield uri


def test_postgres(pipeline: Pipeline, runs: Path, evaluations: Path, database: str) -> None:
    settings = Tracking(experiment=f"test-{time.time()}", uri=database)
    params = logging_to(pipeline.params, settings)
    publish_runs(params, runs, evaluations, database)
    stored = histories(settings)
    assert {run.data.tags["run"] for run in logged(settings)} == {LORA, REPLAY, BASE}
    publish_runs(params, runs, evaluations, database)
    assert histories(settings) == stored


@pytest.mark.slow
def test_a_server_with_postgres_and_a_bucket(
    pipeline: Pipeline,
    runs: Path,
    evaluations: Path,
    database: str,
    bucket: str,
    save_params: SaveParams,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a publishing machine knows of the server is its address: no key, no password."""
    import boto3
    from mlflow.artifacts import download_artifacts

    name = f"bucket-{time.time()}"
    values = pipeline.values() | {"tracking": {"experiment": name, "uri": "sqlite:///nowhere.db"}}
    password = database.partition("@")[0].rpartition(":")[2]
    keys = {name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    objects = boto3.client("s3", endpoint_url=bucket)
    with monkeypatch.context() as of_server:
        of_server.setenv("MLFLOW_S3_ENDPOINT_URL", bucket)
        server = Server(tmp_path / "server", database, f"s3://{BUCKET}/mlflow")
    for key in keys:
        monkeypatch.delenv(key)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    arguments = ["--params", save_params(values), "--runs", runs, "--evaluations", evaluations]
    command = [sys.executable, "-c", "from folora.cli import main; main()", "publish", *map(str, arguments)]
    try:
        server.wait()
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert said.startswith("3 runs with results are in http://127.0.0.1:")
        settings = Tracking(experiment=name, uri=server.uri)
        stored = histories(settings), [run.to_dictionary() for run in logged(settings)]
        publish_runs(logging_to(pipeline.params, settings), runs, evaluations, server.uri)
        assert stored == (histories(settings), [run.to_dictionary() for run in logged(settings)])
        (experiment,) = {run.info.experiment_id for run in logged(settings)}
        models = {model.name: model for model in client_of(server.uri).search_logged_models([experiment])}
        assert models.keys() == {LORA, REPLAY}
        again = Path(download_artifacts(models[LORA].model_uri, dst_path=str(tmp_path / "again")))
    finally:
        server.kill()
    adapter = runs / "lora" / LORA / "adapter"
    listed = [one["Key"] for one in objects.list_objects_v2(Bucket=BUCKET, Prefix="mlflow/")["Contents"]]
    kept = {Path(key).name: key for key in listed if f"/{models[LORA].model_id}/" in key}
    assert kept.keys() >= {path.name for path in adapter.iterdir()} >= {"adapter_model.safetensors"}
    for path in adapter.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()
        assert objects.get_object(Bucket=BUCKET, Key=kept[path.name])["Body"].read() == path.read_bytes()
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    for secret in (password, *keys.values()):
        assert not any(secret.encode() in content for content in (said.encode(), *written))


@pytest.mark.slow
def test_eight_processes_open_a_fresh_store_at_once(tmp_path: Path) -> None:
    script = (
        "import sys, folora.tracking as t; from folora.params import Tracking; from folora.records import Card\n"
        "t.PATIENCE = 300\n"
        "card = Card('run', 'name', sys.argv[1], {}, {}, [])\n"
        "with t.run_log(Tracking(experiment='new', uri='sqlite:///fresh.db'), card, {}) as log:\n"
        "    log.metrics({'value': float(sys.argv[1])}, 0)\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script, str(i)], cwd=tmp_path) for i in range(8)]
    assert [process.wait() for process in processes] == [0] * 8
    found = logged(Tracking(experiment="new", uri=f"sqlite:///{tmp_path / 'fresh.db'}"))
    assert sorted(run.data.metrics["value"] for run in found) == list(range(8))
    assert {run.info.status for run in found} == {"FINISHED"}


def test_source_tags(pipeline: Pipeline, tmp_path: Path) -> None:
    assert source_tags(pipeline.params) == {"preset": "custom"}

    def git(*arguments: str) -> str:
        identity = {f"GIT_{who}_{what}": "x@y" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        environment = {**os.environ, **identity}
        command = ["git", *arguments]
        return subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    for name in ("dvc.lock", "params.yaml"):
        (tmp_path / name).write_text("1")
        git("add", name)
    git("commit", "--quiet", "-m", "x")
    commit = git("rev-parse", "HEAD")
    expected = {"preset": "custom", "mlflow.source.git.commit": commit, "git.dirty": "false"}
    assert source_tags(pipeline.params) == expected | {"dvc.lock": digest_of_file(tmp_path / "dvc.lock")}
    (tmp_path / "dvc.lock").write_text("2")
    changed = {"dvc.lock": digest_of_file(tmp_path / "dvc.lock")}
    assert source_tags(pipeline.params) == expected | changed
    (tmp_path / "params.yaml").write_text("2")
    assert source_tags(pipeline.params) == expected | changed | {"git.dirty": "true"}


def test_mlflow_is_imported_in_one_place() -> None:
    importers = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            importers |= {path.name for name in names if name.split(".")[0] == "mlflow"}
    assert importers == {"tracking.py"}
