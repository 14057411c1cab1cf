"""Many clients publish runs to one MLflow server at once; then every run, reading and adapter is looked for there.

    python tests/load.py --clients 64 --processes 8 --runs 4 --output load.json

The server is one of the loopback, of four processes as MLflow starts them, once with SQLite and once with PostgreSQL
behind it. A client is a thread, and does what ``folora publish`` does. The exit code says
whether anything was lost.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services import SQLITE, mlflow_server, postgres

from folora.errors import FoLoRAError
from folora.records import Card, Reading, RunRecord
from folora.storage import PEFT_WEIGHTS
from folora.tracking import DIGEST_TAG, send_all

if TYPE_CHECKING:
    from collections.abc import Iterator
    from threading import Barrier

DATABASES = ("sqlite", "postgresql")
EXPERIMENT = "load"
SERVER_PROCESSES = 4
PARAMS, METRICS, STEPS = 60, 8, 25  # of a run, about as many as one of the default preset has
ADAPTER = b"weights " * 2**16  # half a mebibyte


@dataclass
class Load:
    """What became of the runs.

    Attributes:
        database: behind the server.
        clients: at once.
        processes: they run in.
        runs: that were to be published.
        written: that the server has, whole: finished, each reading once, the adapter with its bytes.
        refused: whose clients were told that they are not there, and to publish again.
        lost: that are not there whole, and nobody was told.
        errors: what clients were told, each once.
        seconds: from the first publish to the end of the last.
        p50: seconds of a publish, median.
        p95: likewise, of which 95 % take less.
    """

    database: str
    clients: int
    processes: int
    runs: int
    written: int
    refused: int
    lost: int
    errors: list[str]
    seconds: float
    p50: float
    p95: float


@dataclass(frozen=True)
class Attempt:
    """A run that was published, from when to when (seconds since the epoch), and what was said against it."""

    name: str
    begun: float
    ended: float
    error: str


def main() -> None:
    """Measure each database; the exit code says whether anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--runs", type=int, default=4, help="of each client")
    parser.add_argument("--databases", nargs="+", choices=DATABASES, default=DATABASES)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    loads = []
    for database in options.databases:
        with tempfile.TemporaryDirectory() as folder:
            loads.append(measure(Path(folder), database, options.clients, options.processes, options.runs))
        one = loads[-1]
        print(
            f"{one.database}: {one.written} of {one.runs} runs written, {one.refused} refused, {one.lost} lost, in "
            f"{one.seconds:.1f} s; a publish took {one.p50:.2f} s (median), 95 % less than {one.p95:.2f} s",
            *one.errors,
            sep="\n  ",
        )
    if options.output:
        options.output.write_text(json.dumps([asdict(one) for one in loads], indent=1) + "\n")
    sys.exit(any(one.lost for one in loads))


def measure(folder: Path, database: str, clients: int, processes: int, runs: int) -> Load:
    """Let clients publish to a fresh server in a folder.

    Args:
        folder: for the server and the adapter that is published.
        database: one of ``DATABASES``.
        clients: a multiple of ``processes``.
        processes: that the clients run in.
        runs: of each client.
    """
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / PEFT_WEIGHTS).write_bytes(ADAPTER)
    context = multiprocessing.get_context("spawn")
    with (
        _address_of(database) as address,
        mlflow_server(folder / "server", address, workers=SERVER_PROCESSES) as server,
    ):
        names = [f"{client}-{number}" for client in range(clients) for number in range(runs)]
        share = clients // processes * runs
        with context.Pool(processes, _keep_barrier, [context.Barrier(processes)]) as pool:
            work = [(server.uri, names[start : start + share], runs, adapter) for start in range(0, len(names), share)]
            attempts = [one for each in pool.starmap(_publish, work, chunksize=1) for one in each]
        written = _written(server.uri, names, adapter)
    seconds = [one.ended - one.begun for one in attempts]
    refused = {one.name for one in attempts if one.error}
    return Load(
        database=database,
        clients=clients,
        processes=processes,
        runs=len(names),
        written=len(written),
        refused=len(refused),
        lost=len(set(names) - written - refused),
        errors=sorted({one.error for one in attempts if one.error}),
        seconds=max(one.ended for one in attempts) - min(one.begun for one in attempts),
        p50=statistics.median(seconds),
        p95=statistics.quantiles(seconds, n=20)[-1],
    )


def record(name: str, adapter: Path) -> RunRecord:
    """A run as ``folora publish`` sends it, of a name that is all its own."""
    params = {f"key.{number}": number for number in range(PARAMS)}
    card = Card(
        name, name, f"digest-{name}", {"method": "lora", "run": name}, params, [("task@x", "0" * 64, "training")]
    )
    readings = [
        Reading(f"metric/{metric}", metric + step / STEPS, step, 1_000 * step + 1)
        for metric in range(METRICS)
        for step in range(STEPS)
    ]
    return RunRecord(card, {"preset": "load"}, readings, STEPS - 1, adapter)


def _keep_barrier(barrier: Barrier) -> None:
    global ready
    ready = barrier


def _publish(uri: str, names: list[str], runs: int, adapter: Path) -> list[Attempt]:
    """Publish the runs of one process, a client for each so many."""

    def client(own: list[str]) -> list[Attempt]:
        attempts = []
        for name in own:
            begun, error = time.time(), ""
            try:
                send_all(uri, EXPERIMENT, [record(name, adapter)])
            except FoLoRAError as refused:
                error = str(refused)[:300]
            attempts.append(Attempt(name, begun, time.time(), error))
        return attempts

    import mlflow  # noqa: F401 - before the clock runs

    clients = [names[start : start + runs] for start in range(0, len(names), runs)]
    ready.wait()
    with ThreadPoolExecutor(len(clients)) as pool:
        return [one for each in pool.map(client, clients) for one in each]


def _written(uri: str, names: list[str], adapter: Path) -> set[str]:
    """The runs that the server has, each reading once and with the adapter's bytes."""
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    found: dict[str, list[Any]] = {}
    for run in _pages(client.search_runs, [experiment.experiment_id]):
        found.setdefault(run.data.tags[DIGEST_TAG], []).append(run)
    models = {model.source_run_id: model for model in _pages(client.search_logged_models, [experiment.experiment_id])}

    def is_whole(name: str) -> bool:
        expected = record(name, adapter)
        runs = found.get(expected.card.digest, [])
        if len(runs) != 1 or runs[0].info.status != "FINISHED" or runs[0].info.run_id not in models:
            return False
        place = runs[0].info.run_id
        stored = [
            (metric.key, metric.value, metric.step)
            for key in runs[0].data.metrics
            for metric in client.get_metric_history(place, key)
        ]
        with tempfile.TemporaryDirectory() as folder:
            again = download_artifacts(models[place].artifact_location, dst_path=folder, tracking_uri=uri)
            same = (Path(again) / PEFT_WEIGHTS).read_bytes() == ADAPTER
        return same and sorted(stored) == sorted((one.key, one.value, one.step) for one in expected.readings)

    with ThreadPoolExecutor(8) as pool:
        return {name for name, whole in zip(names, pool.map(is_whole, names), strict=True) if whole}


def _pages(search: Any, experiments: list[str]) -> Iterator[Any]:
    """Everything that a search finds, page by page."""
    token = None
    while True:
        page = search(experiments, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


@contextmanager
def _address_of(database: str) -> Iterator[str]:
    """Of a fresh database, for a ``with`` block."""
    if database == "sqlite":
        yield SQLITE
    else:
        with postgres() as uri:
            yield uri


if __name__ == "__main__":
    main()
