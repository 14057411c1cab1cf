"""What stands on other machines in earnest, on the loopback: an MLflow server, a PostgreSQL cluster, an S3 bucket."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError
from urllib.request import urlopen

if TYPE_CHECKING:
    from collections.abc import Iterator

POSTGRES_URI = "FOLORA_TEST_POSTGRES_URI"  # a database to use in the place of a cluster of our own
BUCKET = "results"
SQLITE = "sqlite:///server.db"


class Server:
    """An MLflow server in a process of its own.

    Args:
        folder: of the server, made here; ``server.log`` holds what it says.
        backend: address of its database. It is passed in the environment, as its password should be.
        artifacts: where it keeps artefacts.
        workers: processes that answer.
    """

    def __init__(self, folder: Path, backend: str = SQLITE, artifacts: str = "artifacts", *, workers: int = 1) -> None:
        port = free_port()
        self.uri = f"http://127.0.0.1:{port}"
        folder.mkdir()
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", str(workers)]
        command += ["--artifacts-destination", artifacts]
        environment = os.environ | {"MLFLOW_BACKEND_STORE_URI": backend, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (folder / "server.log").open("w") as log:
            self._process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> Server:
        """Wait until it answers."""
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            try:
                with urlopen(f"{self.uri}/health", timeout=5):
                    return self
            except (URLError, OSError):
                time.sleep(0.5)
        raise TimeoutError(f"no MLflow server at {self.uri}")

    def kill(self) -> None:
        """End it at once."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@contextmanager
def mlflow_server(
    folder: Path, backend: str = SQLITE, artifacts: str = "artifacts", *, workers: int = 1
) -> Iterator[Server]:
    """A server for a ``with`` block."""
    server = Server(folder, backend, artifacts, workers=workers)
    try:
        yield server.wait()
    finally:
        server.kill()


def missing_postgres() -> str:
    """Why there is no database here, or nothing."""
    if find_spec("psycopg2") is None:
        return "no psycopg2: pip install psycopg2-binary"
    if POSTGRES_URI in os.environ or _postgres_programs() is not None:
        return ""
    return f"no PostgreSQL: apt-get install postgresql, or {POSTGRES_URI}=postgresql://..."


@contextmanager
def postgres() -> Iterator[str]:
    """The address of a database for a ``with`` block: ``FOLORA_TEST_POSTGRES_URI``, or one in a cluster of its own."""
    if POSTGRES_URI in os.environ:
        yield os.environ[POSTGRES_URI]
        return
    programs = _postgres_programs()
    assert programs is not None, missing_postgres()
    user = "postgres" if os.getuid() == 0 else None  # PostgreSQL refuses to run as root
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as name:
        folder, password, port = Path(name), secrets.token_hex(16), free_port()
        (folder / "password").write_text(password)
        if user:
            for path in (folder, folder / "password"):
                shutil.chown(path, user, user)

        def run(program: str, *arguments: str) -> None:
            command = [str(programs / program), "--pgdata", str(folder / "data"), *arguments]
            subprocess.run(command, cwd=folder, user=user, group=user, check=True, stdout=subprocess.DEVNULL)

        run("initdb", "--username=folora", f"--pwfile={folder / 'password'}", "--auth=scram-sha-256", "--no-sync")
        # a database that lives for minutes need not survive a power cut
        options = f"-h 127.0.0.1 -p {port} -k {folder} -F"
        run("pg_ctl", "start", "--wait", f"--log={folder / 'log'}", f"--options={options}")
        try:
            yield f"postgresql://folora:{password}@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "stop", "--mode=immediate")


def _postgres_programs() -> Path | None:
    """Folder of the server's programs, which Debian keeps off the PATH."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    versions = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    return max((path.parent for path in versions), key=lambda folder: int(folder.parent.name), default=None)


@contextmanager
def s3() -> Iterator[str]:
    """The address of a server that speaks S3, with a bucket, for a ``with`` block; the environment needs the keys."""
    import boto3
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        host, port = running.get_host_and_port()
        url = f"http://{host}:{port}"
        boto3.client("s3", endpoint_url=url).create_bucket(Bucket=BUCKET)
        yield url
    finally:
        running.stop()


def free_port() -> int:
    """A port of the loopback that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
