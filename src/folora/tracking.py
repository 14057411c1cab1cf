"""MLflow, and nothing else in the project imports it.

Tracking is best effort: an error is reported once and ends the logging of this run, never the run itself. Runs are
found by a tag, the digest of what they were made from, so no run id is kept on disk.
"""

from __future__ import annotations

import logging
import os
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from mlflow import MlflowClient

    from folora.params import Tracking

logger = logging.getLogger(__name__)

DIGEST_TAG = "folora.digest"
PARAM_LIMIT = 500  # characters of a value that every MLflow store accepts


class RunLog:
    """Logs to one MLflow run. Every call swallows errors: the first one is reported and silences the rest."""

    def __init__(self) -> None:
        self._client: MlflowClient | None = None
        self._run_id = ""

    def open(self, settings: Tracking, name: str, digest: str, tags: dict[str, str]) -> None:
        """Find the run with this digest, or make one."""
        self._attempt(lambda: self._open(settings, name, digest, tags))

    def params(self, values: dict[str, Any]) -> None:
        """Log parameters; nested tables become dotted keys."""
        if not self._client:
            return
        from mlflow.entities import Param

        flat = {key: str(value)[:PARAM_LIMIT] for key, value in _flatten(values).items()}
        self._batch(params=[Param(key, value) for key, value in flat.items()])

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Log metrics of one step in one request."""
        if not self._client:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._batch(metrics=[Metric(key, value, now, step) for key, value in values.items()])

    def folder(self, path: Path, name: str) -> None:
        """Upload the files of a folder as artefacts."""
        if self._client:
            client = self._client
            self._attempt(lambda: client.log_artifacts(self._run_id, str(path), name))

    def close(self, status: str) -> None:
        """Mark the run ``FINISHED`` or ``FAILED``."""
        if self._client:
            client = self._client
            self._attempt(lambda: client.set_terminated(self._run_id, status))

    def _open(self, settings: Tracking, name: str, digest: str, tags: dict[str, str]) -> None:
        client, experiment = _connect(settings)
        found = client.search_runs([experiment], f"tags.`{DIGEST_TAG}` = '{digest}'", max_results=1)
        run = found[0] if found else client.create_run(experiment, run_name=name, tags={DIGEST_TAG: digest, **tags})
        self._client, self._run_id = client, run.info.run_id

    def _batch(self, **entries: Any) -> None:
        if self._client:
            client = self._client
            self._attempt(lambda: client.log_batch(self._run_id, **entries))

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            self._client = None
            logger.warning(
                "MLflow: %s; this run goes on without it", str(error).splitlines()[0] if str(error) else error
            )


@contextmanager
def run_log(settings: Tracking, name: str, digest: str, tags: dict[str, str]) -> Iterator[RunLog]:
    """Open an MLflow run for a ``with`` block and close it as finished or failed."""
    log = RunLog()
    log.open(settings, name, digest, tags)
    try:
        yield log
    except BaseException:
        log.close("FAILED")
        raise
    log.close("FINISHED")


def _connect(settings: Tracking) -> tuple[MlflowClient, str]:
    """A client and the id of the experiment. A fresh SQLite store is initialised by one process at a time."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from filelock import FileLock
    from mlflow import MlflowClient

    uri = os.environ.get("MLFLOW_TRACKING_URI", settings.uri)
    if uri.startswith("sqlite:///"):
        # several processes that open a new store at once fail in its schema migration
        with FileLock(f"{uri.removeprefix('sqlite:///')}.lock"):
            client = MlflowClient(uri)
            return client, _experiment(client, settings.experiment)
    client = MlflowClient(uri)
    return client, _experiment(client, settings.experiment)


def _experiment(client: MlflowClient, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found:
        return found.experiment_id
    try:
        return client.create_experiment(name)
    except MlflowException:  # another process was faster
        found = client.get_experiment_by_name(name)
        if not found:
            raise
        return found.experiment_id


def source_tags() -> dict[str, str]:
    """The git commit, and whether the working tree differs from it; empty outside a repository."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"mlflow.source.git.commit": commit, "git.dirty": str(bool(changes.stdout.strip())).lower()}


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
