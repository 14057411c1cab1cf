"""MLflow, and nothing else in the project imports it.

Runs are found by a tag, the digest of what they were made from, so no run id is kept on disk, and whatever is sent
twice is there once. While a run trains, a thread sends what comes; training waits for no server, and an error ends the
sending, never the run. What was not sent is in the run's artefacts and journal (``records.py``); the evaluate stage
and ``folora publish`` send what a store lacks.
"""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from queue import SimpleQueue
from random import SystemRandom
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from folora.errors import FoLoRAError
from folora.records import Journal, Reading

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from mlflow.entities import Run

    from folora.params import Tracking
    from folora.records import Card, RunRecord

logger = logging.getLogger(__name__)
T = TypeVar("T")

DIGEST_TAG = "folora.digest"
NOTE_TAG = "mlflow.note.content"
PARAM_LIMIT = 500  # characters of a value that every MLflow store accepts
DATASET_DIGEST_LIMIT = 36
METRICS_LIMIT = 1000  # of one request
PATIENCE = 30.0  # seconds that the end of a run waits for what is still being sent
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds, at most, before a database is asked again
IMPATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
NOTE = """FoLoRA: one MLflow run for each entry of `runs:` in params.yaml, and one for the base model.

**At a glance.** Columns: the metrics `target`, `kept` and `kl`, the parameters `run.method` and `run.learning_rate`; \
group by the tag `method`. Chart: select all runs, *Compare*, *Scatter Plot* with x = `target`, y = `kept`: the upper \
right learned the task and kept the rest. In *Charts*, `train/kl` against the step shows when each run forgets.

`target`, `validation`, `kept`, `kept/TASK`, `kl` and `perplexity` are measured at each checkpoint's step on the test \
data, `train/*` while training, `gate/*` is the mean gate of a layer input, `budget/*` a `kl_budget` and the KL that \
training ended at, `system/*` the machine. Each run's adapter is a logged model. `folora publish` sends what is \
missing here.
"""


class Store:
    """A tracking server or database with its experiment; methods raise what MLflow raises."""

    def __init__(self, uri: str, experiment: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # standard output is the command's
        from mlflow import MlflowClient

        # several processes that open a new store at once fail in its schema migration
        with _lock_of(uri):
            self._client = MlflowClient(uri)
            self._experiment = self._open_experiment(experiment)
        self._known: dict[tuple[str, str], set[tuple[int, float]]] = {}

    def start(self, card: Card, source: dict[str, str], started: int | None = None) -> Run:
        """Find the run with this card's digest, or make it; log its parameters and data sets."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        query = f"tags.`{DIGEST_TAG}` = '{card.digest}'"
        found = self._client.search_runs([self._experiment], query, max_results=1)
        tags = {DIGEST_TAG: card.digest, **card.tags, **source}
        run = found[0] if found else self._client.create_run(self._experiment, started, tags, card.title)
        params = [Param(key, str(value)[:PARAM_LIMIT]) for key, value in card.params.items()]
        self._client.log_batch(run.info.run_id, params=params)
        datasets = [
            DatasetInput(
                Dataset(name, sha256[:DATASET_DIGEST_LIMIT], "dvc", json.dumps({"stage": name, "sha256": sha256})),
                [InputTag("mlflow.data.context", context)],
            )
            for name, sha256, context in card.datasets
        ]
        self._client.log_inputs(run.info.run_id, datasets)
        return run

    def add(self, run: Run, readings: Iterable[Reading], models: dict[int, str] | None = None) -> None:
        """Log the readings that the run lacks; those at a step of ``models`` (step to model id) are the model's too."""
        from mlflow.entities import Metric

        metrics = [
            Metric(one.key, one.value, one.time, one.step, (models or {}).get(one.step))
            for one in readings
            if (one.step, one.value) not in self._history(run, one.key)
        ]
        for start in range(0, len(metrics), METRICS_LIMIT):
            self._client.log_batch(run.info.run_id, metrics=metrics[start : start + METRICS_LIMIT])

    def add_adapter(self, run: Run, card: Card, folder: Path, step: int) -> str:
        """Keep an adapter as a logged model of the run, once; returns the model's id."""
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        query = f"source_run_id = '{run.info.run_id}'"
        found = self._client.search_logged_models([self._experiment], query, max_results=1)
        about = (self._experiment, card.run, run.info.run_id, card.tags, None, "PEFT adapter")
        model = found[0] if found else self._client.create_logged_model(*about)
        if model.status != LoggedModelStatus.READY:
            self._client.log_model_artifacts(model.model_id, str(folder))
            outputs = self._client.get_run(run.info.run_id).outputs
            known = {output.model_id for output in outputs.model_outputs} if outputs else set()
            if model.model_id not in known:  # a second time is refused
                self._client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step)])
            self._client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        return model.model_id

    def set_status(self, run: Run, status: str, ended: int | None = None) -> None:
        """Mark a run ``RUNNING``, or ended as ``FINISHED`` or ``FAILED``."""
        if status == "RUNNING":
            self._client.update_run(run.info.run_id, status)
        else:
            self._client.set_terminated(run.info.run_id, status, ended)

    def send(self, record: RunRecord) -> None:
        """Bring the store up to a finished run: what is there stays, what is missing is added."""
        times = [reading.time for reading in record.readings]
        run = self.start(record.card, record.source, min(times))
        models = {}
        if record.adapter:
            models[record.final_step] = self.add_adapter(run, record.card, record.adapter, record.final_step)
        self.add(run, record.readings, models)
        if run.info.status != "FINISHED":
            self.set_status(run, "FINISHED", max(times))

    def _history(self, run: Run, key: str) -> set[tuple[int, float]]:
        """Step and value of every reading of a metric when the run was found; none of a run made since."""
        place = (run.info.run_id, key)
        if place not in self._known:
            stored = self._client.get_metric_history(*place) if key in run.data.metrics else []
            self._known[place] = {(metric.step, metric.value) for metric in stored}
        return self._known[place]

    def _open_experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return self._client.create_experiment(name, tags={NOTE_TAG: NOTE})
            except MlflowException:  # another process was faster
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        if NOTE_TAG not in found.tags:
            self._client.set_experiment_tag(found.experiment_id, NOTE_TAG, NOTE)
        return found.experiment_id


def _lock_of(uri: str) -> Any:
    from filelock import FileLock

    return FileLock(f"{uri.removeprefix('sqlite:///')}.lock") if uri.startswith("sqlite:///") else nullcontext()


def address(settings: Tracking) -> str:
    """Where runs are sent: ``MLFLOW_TRACKING_URI``, or what params.yaml says."""
    return os.environ.get("MLFLOW_TRACKING_URI", settings.uri)


def send_all(uri: str, experiment: str, records: Iterable[RunRecord]) -> None:
    """Send finished runs to a store; sent twice they are there once.

    Raises:
        FoLoRAError: the store cannot be reached or refuses.
    """
    try:
        store = _insist(partial(Store, uri, experiment))
        for record in records:
            _insist(partial(store.send, record))
    except FoLoRAError:
        raise
    except Exception as error:
        raise FoLoRAError(f"MLflow at {uri}: {_first_line(error)}: see that it runs, then publish again") from error


def _insist(action: Callable[[], T]) -> T:
    """Do something with a store, a few times where its database refuses, since what is done twice is there once.

    MLflow answers so where two runs add a data set at the same moment, and where too many wait for a connection.
    """
    from mlflow.exceptions import MlflowException

    for pause in PAUSES:
        try:
            return action()
        except MlflowException as error:
            if error.error_code != "BAD_REQUEST":
                raise
            time.sleep(pause * SystemRandom().random())  # not in step with the others
    return action()


class Sender:
    """Does things with a store in a thread, in order; the first error ends it and is reported once."""

    def __init__(self, settings: Tracking) -> None:
        self._settings = settings
        self._actions: SimpleQueue[Callable[[Store], object] | None] = SimpleQueue()
        self._thread: Thread | None = None

    def do(self, action: Callable[[Store], object]) -> None:
        """Queue an action and return at once."""
        if self._thread is None:
            # a daemon: a process may end while a server keeps it waiting
            self._thread = Thread(target=self._work, name="mlflow", daemon=True)
            self._thread.start()
        self._actions.put(action)

    def send(self, record: RunRecord) -> None:
        """Queue a finished run."""
        self.do(lambda store: store.send(record))

    def finish(self) -> None:
        """Wait for what is queued, but not for long."""
        self._actions.put(None)
        if self._thread:
            self._thread.join(PATIENCE)
            if self._thread.is_alive():
                logger.warning("MLflow takes long: `folora publish` sends what is missing")

    def _work(self) -> None:
        for name, value in IMPATIENT.items():
            os.environ.setdefault(name, value)
        try:
            store = _insist(partial(Store, address(self._settings), self._settings.experiment))
            while action := self._actions.get():
                _insist(partial(action, store))
        except Exception as error:
            logger.warning("MLflow: %s; the run goes on, `folora publish` sends it later", _first_line(error))


@contextmanager
def sending(settings: Tracking) -> Iterator[Sender]:
    """A sender for a ``with`` block."""
    sender = Sender(settings)
    try:
        yield sender
    finally:
        sender.finish()


class RunLog:
    """Logs a run while it trains, at once to its journal, later to MLflow."""

    def __init__(self, card: Card, source: dict[str, str], sender: Sender, begun: int) -> None:
        self._card, self._sender = card, sender
        self._journal = Journal(card.digest, source, begun)
        self._process = psutil.Process()
        self._run: Run | None = None

        def start(store: Store) -> None:
            self._run = store.start(card, source)
            store.set_status(self._run, "RUNNING")

        sender.do(start)
        self._machine()  # a load is measured since the call before

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Log metrics of one step, and what the machine does meanwhile."""
        self._add(values | self._machine(), step)

    def constants(self, values: dict[str, float]) -> None:
        """Log metrics that do not change while training, at step 0."""
        self._add(values, 0)

    def adapter(self, folder: Path, step: int) -> None:
        """Keep the trained adapter."""
        self._sender.do(lambda store: store.add_adapter(self._started, self._card, folder, step))

    def close(self, status: str) -> None:
        """Mark the run ``FINISHED`` or ``FAILED``."""
        ended = int(time.time() * 1000)
        self._sender.do(lambda store: store.set_status(self._started, status, ended))

    def _add(self, values: dict[str, float], step: int) -> None:
        readings = self._journal.add(values, step)
        self._sender.do(lambda store: store.add(self._started, readings))

    @property
    def _started(self) -> Run:
        assert self._run is not None, "the sender works in order, and start came first"
        return self._run

    def _machine(self) -> dict[str, float]:
        """Load and memory of the machine, by the names of MLflow's own system metrics, and of this process."""
        memory = psutil.virtual_memory()
        return {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_percentage": memory.percent,
            "system/process_cpu_percentage": self._process.cpu_percent(),
            "system/process_memory_megabytes": self._process.memory_info().rss / 1e6,
        }


@contextmanager
def run_log(settings: Tracking, card: Card, source: dict[str, str], begun: int = 0) -> Iterator[RunLog]:
    """Log a training for a ``with`` block and close it as finished or failed; ``begun``: the step it goes on from."""
    with sending(settings) as sender:
        log = RunLog(card, source, sender, begun)
        try:
            yield log
        except BaseException:
            log.close("FAILED")
            raise
        log.close("FINISHED")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
