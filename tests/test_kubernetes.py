"""The Kubernetes profile: manifests against the schemas of Kubernetes, and a stage sent to a cluster that is made up.

It speaks the part of the API that the profile uses, checks every Job, and runs its command here.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from conftest import ROOT
from ruamel.yaml import YAML
from workspace import run, same_bytes, stale

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

kubernetes_validate = pytest.importorskip("kubernetes_validate")
pytest.importorskip("kubernetes", reason="no kubernetes: pip install 'folora[kubernetes]'")

PROFILE = ROOT / "profiles" / "kubernetes"
JOBS = "/apis/batch/v1/namespaces/default/jobs"
VERSIONS = ("1.29", kubernetes_validate.latest_version())


def documents(name: str) -> list[dict[str, Any]]:
    return list(YAML(typ="safe", pure=True).load_all(PROFILE / name))


def check(manifest: dict[str, Any], version: str = VERSIONS[-1]) -> None:
    """Hold a manifest against the schema of Kubernetes, which knows no other fields."""
    kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["setup.yaml", "job.yaml"])
def test_manifests_are_what_kubernetes_takes(name: str, version: str) -> None:
    for manifest in documents(name):
        check(manifest, version)
    assert all(manifest["metadata"]["namespace"] == "default" for manifest in documents(name))


def test_a_wrong_manifest_is_seen() -> None:
    (job,) = documents("job.yaml")
    job["spec"]["template"]["spec"]["containers"][0]["workDir"] = "/work"
    with pytest.raises(kubernetes_validate.ValidationError, match="workDir"):
        check(job)


def test_what_a_pod_may_do_is_on_the_shared_folder() -> None:
    """Every pod has the volume of setup.yaml, written by many nodes, as its working folder."""
    (job,), (claim, account, *_) = documents("job.yaml"), documents("setup.yaml")
    pod = job["spec"]["template"]["spec"]
    (container,), (volume,) = pod["containers"], pod["volumes"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": container["workingDir"]}]
    assert pod["serviceAccountName"] == account["metadata"]["name"]


class Cluster:
    """Jobs by name, and the processes that are their pods; the first is evicted before it begins."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace
        self.jobs: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, subprocess.Popen[bytes]] = {}

    def create(self, job: dict[str, Any]) -> dict[str, Any]:
        check(job)
        name = f"{job['metadata']['generateName']}{len(self.jobs)}"
        self.jobs[name] = job
        (container,) = job["spec"]["template"]["spec"]["containers"]
        command = container["command"] if len(self.jobs) > 1 else ["false"]
        self.pods[name] = subprocess.Popen(command, cwd=self.workspace)
        return {**job, "metadata": {**job["metadata"], "name": name}}

    def status(self, name: str) -> dict[str, Any]:
        code = self.pods[name].poll()
        conditions = [] if code is None else [{"type": "Failed" if code else "Complete", "status": "True"}]
        return {**self.jobs[name], "status": {"conditions": conditions}}


class Handler(BaseHTTPRequestHandler):
    """The API of a cluster."""

    def __init__(self, *arguments: Any, cluster: Cluster) -> None:
        self.cluster = cluster
        super().__init__(*arguments)

    def do_POST(self) -> None:
        assert self.path == JOBS, self.path
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer(201, self.cluster.create(job))

    def do_GET(self) -> None:
        name, _, _ = self.path.removeprefix(f"{JOBS}/").partition("/")
        if name in self.cluster.jobs:
            self.answer(200, self.cluster.status(name))
        else:
            self.answer(404, {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404})

    def do_DELETE(self) -> None:
        self.cluster.pods[self.path.removeprefix(f"{JOBS}/").partition("?")[0]].kill()
        self.answer(200, {"kind": "Status", "status": "Success"})

    def answer(self, code: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def running(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A made-up cluster whose pods work in a workspace."""
    cluster = Cluster(workspace)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, cluster=cluster))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "made-up", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "me", "user": {}}],
        "contexts": [{"name": "here", "context": {"cluster": "made-up", "user": "me"}}],
        "current-context": "here",
    }
    (workspace / ".snakemake").mkdir(exist_ok=True)
    path = workspace / ".snakemake" / "kubeconfig"
    path.write_text(json.dumps(settings))
    monkeypatch.setenv("KUBECONFIG", str(path))
    try:
        yield cluster
    finally:
        server.shutdown()
        server.server_close()


def jobs(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["python", str(PROFILE / "jobs.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_job_is_sent_asked_for_and_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "script"
    script.write_text("sleep 600")
    submit = ("submit", "--cores", "2", "--megabytes", "1500", "--minutes", "5", "--gpus", "1", str(script))
    with running(tmp_path, monkeypatch) as cluster:
        names = [jobs(*submit).stdout.strip() for _ in range(2)]
        cluster.pods[names[0]].wait()
        assert [jobs("status", name).stdout for name in names] == ["failed\n", "running\n"]
        assert jobs("status", "another").stdout == "failed\n"
        assert jobs("cancel", names[1]).returncode == 0
        assert cluster.pods[names[1]].wait(10) != 0
        pod = cluster.jobs[names[1]]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    limits = {"memory": "1500M", "nvidia.com/gpu": "1"}
    assert container["resources"] == {"requests": {"cpu": "2", **limits}, "limits": limits}
    assert container["command"] == ["sh", str(script)]
    assert pod["activeDeadlineSeconds"] == 300
    assert jobs("status", names[1]).stdout == "running\n"  # while the cluster does not answer
    refused = jobs(*submit)
    assert refused.returncode == 1
    assert refused.stderr.startswith("kubernetes: ")
    assert refused.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_stage_is_sent_again_after_an_eviction_and_writes_its_bytes(
    by_dvc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("snakemake_executor_plugin_cluster_generic")
    workspace = tmp_path / "work"
    shutil.copytree(by_dvc, workspace)
    (workspace / "artifacts" / "heldout.parquet").unlink()
    command = ("snakemake", "--profile", "profiles/kubernetes", "--seconds-between-status-checks", "1", "heldout")
    with running(workspace, monkeypatch) as cluster:
        said = run(workspace, *command)
    assert [pod.returncode for pod in cluster.pods.values()] == [1, 0]
    assert said.count("Trying to restart job") == 1
    same_bytes(by_dvc, workspace)
    assert stale(workspace) == set()
