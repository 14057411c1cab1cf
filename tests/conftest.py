"""Fixtures: a tiny offline world and an untrained foundation, made in memory once a session."""

from __future__ import annotations

import contextlib
import gc
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from services import s3
from workspace import make_workspace, run

from folora.base import Base, open_base
from folora.errors import FoLoRAError
from folora.params import Params, Tracking
from folora.storage import CONDITIONS

ROOT = Path(__file__).parent.parent
Refused = Callable[..., str]
SaveParams = Callable[[dict[str, Any]], Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: of several workers none is then left with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def _own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep tests away from a tracking server, the network and the user's caches; one thread, for equal bytes."""
    torch.set_num_threads(1)
    CONDITIONS["threads"] = 1  # as the command line says it
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    CONDITIONS["threads"] = 1


@pytest.fixture(scope="session")
def tiny_values() -> dict[str, Any]:
    """The content of the smallest parameter file that runs the whole pipeline."""
    return dict(YAML(typ="safe", pure=True).load(ROOT / "workflow" / "presets" / "tiny.yaml"))


@pytest.fixture(scope="session")
def tiny_params(tiny_values: dict[str, Any]) -> Params:
    return Params.model_validate(tiny_values)


@pytest.fixture(scope="session")
def tiny_foundation(tmp_path_factory: pytest.TempPathFactory, tiny_params: Params) -> Path:
    """A folder with ``foundation`` (a model trained for a few steps) and ``world``."""
    from folora.foundation import train_foundation
    from folora.world import write_world

    folder = tmp_path_factory.mktemp("tiny")
    train_foundation(tiny_params.foundation, tiny_params.world, folder / "foundation")  # type: ignore[arg-type]
    write_world(tiny_params.world, folder / "world")
    return folder


@pytest.fixture
def tiny(tiny_foundation: Path, tmp_path: Path) -> Path:
    """A copy of the tiny foundation and world that a test may change."""
    shutil.copytree(tiny_foundation, tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture(scope="session")
def tiny_base(tiny_foundation: Path) -> Base:
    return open_base(tiny_foundation / "foundation")


@dataclass(frozen=True)
class Pipeline:
    """The artefacts of the stages before training, laid out as in ``dvc.yaml``, and the parameters they are made of."""

    folder: Path
    params: Params
    base: Base

    @property
    def foundation(self) -> Path:
        return self.folder / "foundation"

    @property
    def world(self) -> Path:
        return self.folder / "world"

    @property
    def task(self) -> Path:
        return self.folder / "task" / "subtraction.parquet"

    @property
    def proxy(self) -> Path:
        return self.folder / "proxy" / "sampled"

    @property
    def heldout(self) -> Path:
        return self.folder / "heldout.parquet"

    @property
    def proxy_moments(self) -> Path:
        return self.folder / "covariance" / "proxy" / "sampled"

    @property
    def task_moments(self) -> Path:
        return self.folder / "covariance" / "task" / "subtraction.safetensors"

    @property
    def spectra(self) -> Path:
        return self.folder / "spectrum" / "subtraction" / "sampled"

    @property
    def spectrum(self) -> Path:
        """The one part that there is."""
        return self.spectra / "0.safetensors"

    def copy(self, folder: Path) -> Pipeline:
        """A copy that a test may damage; the parameters still name the data set of the original."""
        shutil.copytree(self.folder, folder)
        return Pipeline(folder, self.params, Base(folder / "foundation", self.base.manifest))

    @property
    def logged(self) -> Params:
        """The parameters with an experiment for the runs of the fixtures alone: tests train into that of ``params``."""
        return self.params.model_copy(
            update={"tracking": self.params.tracking.model_copy(update={"experiment": "fixtures"})}
        )

    def values(self) -> dict[str, Any]:
        """The parameters as plain values, to change and write."""
        return self.params.model_dump(mode="json", serialize_as_any=True)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store without runs, to copy: making one takes seconds."""
    from folora.tracking import Store

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    with contextlib.chdir(path.parent):
        Store(f"sqlite:///{path}", "empty")
    return path


@pytest.fixture
def store(empty_store: Path, tmp_path: Path) -> Tracking:
    """A store of the test's own."""
    return Tracking(experiment="test", uri=f"sqlite:///{shutil.copy(empty_store, tmp_path / 'mlflow.db')}")


@pytest.fixture(scope="session")
def pipeline(
    tmp_path_factory: pytest.TempPathFactory, tiny_values: dict[str, Any], tiny_foundation: Path, empty_store: Path
) -> Pipeline:
    """Every stage before training, run once a session; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("made") / "pipeline"
    shutil.copytree(tiny_foundation, folder)
    uri = f"sqlite:///{shutil.copy(empty_store, folder / 'mlflow.db')}"
    made = make_pipeline(folder, tiny_values | {"tracking": {"experiment": "tiny", "uri": uri}})
    gc.freeze()  # transformers' Trainer collects garbage at every start: spare it all that was imported
    return made


def make_pipeline(folder: Path, values: dict[str, Any]) -> Pipeline:
    """Run every stage between foundation and training in a folder that holds the foundation and the world."""
    from folora.covariance import compute_covariance
    from folora.proxy import generate_heldout, generate_proxy
    from folora.spectrum import compute_spectrum
    from folora.task import prepare_task

    dataset = {"subtraction": values["tasks"]["subtraction"] | {"dataset": str(folder / "world" / "subtraction")}}
    params = Params.model_validate(values | {"tasks": dataset})
    made = Pipeline(folder, params, open_base(folder / "foundation"))
    prepare_task(params.tasks["subtraction"], made.base, made.task)
    for shard in params.proxy.shards:
        generate_proxy(params.proxy, "sampled", str(shard), made.base, made.proxy / f"{shard}.parquet")
        compute_covariance(
            params, made.base, made.proxy / f"{shard}.parquet", made.proxy_moments / f"{shard}.safetensors"
        )
    generate_heldout(params.proxy, made.base, made.heldout)
    compute_covariance(params, made.base, made.task, made.task_moments)
    compute_spectrum(
        params, "subtraction", "sampled", 0, made.base, made.proxy_moments, made.task_moments, made.spectrum
    )
    return made


@pytest.fixture(scope="session")
def runs(pipeline: Pipeline) -> Path:
    """``METHOD/RUN`` folders of both runs of the pipeline's parameters."""
    from folora.train import TrainInputs, train_run

    inputs = TrainInputs(pipeline.task, pipeline.proxy, pipeline.heldout, pipeline.spectra)
    with contextlib.chdir(pipeline.folder):  # MLflow keeps artefacts below the working folder
        for name, run in pipeline.params.runs.items():
            train_run(pipeline.logged, name, pipeline.base, inputs, pipeline.folder / "runs" / run.method / name)
    return pipeline.folder / "runs"


@pytest.fixture(scope="session")
def evaluations(pipeline: Pipeline, runs: Path) -> Path:
    """Results of the base model and of both methods."""
    from folora.evaluate import evaluate_base, evaluate_method

    folder = pipeline.folder / "evaluation"
    with contextlib.chdir(pipeline.folder):
        evaluate_base(pipeline.logged, pipeline.base, pipeline.world, pipeline.heldout, folder / "base")
        for method in pipeline.params.methods:
            evaluate_method(
                pipeline.logged,
                method,
                pipeline.base,
                pipeline.world,
                pipeline.heldout,
                runs / method,
                folder / method,
            )
    return folder


@pytest.fixture(scope="session")
def by_dvc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which DVC has run everything; tests that change something copy it."""
    workspace = make_workspace(tmp_path_factory.mktemp("dvc"))
    run(workspace, "env", "PYTHONHASHSEED=1", "dvc", "repro")
    return workspace


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an S3 server with a bucket; its keys are in the environment."""
    pytest.importorskip("moto.server", reason="no moto[server]")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, secrets.token_hex(16))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with s3() as url:
        yield url


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, for what MLflow writes beside its store."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def save_params(tmp_path: Path) -> SaveParams:
    """Write values as a parameter file."""

    def save(values: dict[str, Any]) -> Path:
        path = tmp_path / "params.yaml"
        yaml = YAML(typ="safe")  # as params.py and DVC read it
        yaml.sort_base_mapping_type_on_output = False
        yaml.dump(values, path)
        return path

    return save


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, in_tmp: Path) -> Iterator[Refused]:
    """Run a command line that must fail: exit code 1, one line, nothing written; the line is returned."""
    from folora.cli import main

    def run(*arguments: object, output: Path = in_tmp / "output") -> str:
        monkeypatch.setattr(sys, "argv", ["folora", *map(str, arguments), "--output", str(output)])
        existed = output.exists()
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 1
        *noise, line = capsys.readouterr().err.splitlines()
        assert line.startswith("folora: ")
        assert not any("folora: " in other or "Traceback" in other for other in noise)
        assert output.exists() == existed
        assert not list(output.parent.glob("**/.*.partial"))
        return line.removeprefix("folora: ")

    yield run
    torch.use_deterministic_algorithms(mode=False)


@pytest.fixture
def sandbox() -> None:
    """Skip where the machine has no bubblewrap, or forbids it namespaces."""
    from folora.sandbox import check_sandbox

    try:
        check_sandbox()
    except FoLoRAError as error:
        pytest.skip(str(error))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", disk)
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=False, capture_output=True)  # a test may still be in it


@pytest.fixture
def read_only_disk(small_disk: Path) -> Path:
    """A file system that cannot be written, not even by root."""
    mount("-o", "remount,ro", small_disk)
    return small_disk


def mount(*arguments: str | Path) -> None:
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command here")
    done = subprocess.run(["mount", *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")


GRAPH = """
stages:
  first:
    cmd: cp source first.txt
    deps: [source]
    params: [scale, table.depth]
    outs: [first.txt]
    meta: {threads: 1, mem_mb: 1, runtime: 1}
  second:
    foreach: [a, b]
    do:
      cmd: cat first.txt first.txt > ${item}.txt
      deps: [first.txt]
      outs: ["${item}.txt"]
      meta: {threads: 1, mem_mb: 1, runtime: 1}
  third:
    cmd: cat a.txt b.txt > third.txt
    deps: [a.txt, b.txt]
    outs: [third.txt]
    meta: {threads: 1, mem_mb: 1, runtime: 1}
"""
GRAPH_PARAMS = "scale: 1\ntable: {depth: {left: 2, right: 3}}\n"


@pytest.fixture(scope="session")
def made_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository in which every stage has run."""
    folder = tmp_path_factory.mktemp("graph")
    (folder / "dvc.yaml").write_text(GRAPH)
    (folder / "params.yaml").write_text(GRAPH_PARAMS)
    (folder / "source").write_text("text\n")
    for command in (["dvc", "init", "--no-scm", "--quiet"], ["dvc", "repro", "--quiet"]):
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def graph(made_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to change, as working folder."""
    shutil.copytree(made_graph, tmp_path / "graph")
    monkeypatch.chdir(tmp_path / "graph")
    return tmp_path / "graph"
