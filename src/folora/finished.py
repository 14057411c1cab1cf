"""Stages that Snakemake has finished, and their recording with DVC while the others run.

A job leaves a mark when its command has ended well. Recording one stage costs DVC the reading and writing of its whole
lock file, so the process that runs the workflow records what has been marked in batches, and the rest when it ends.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from threading import Event, Thread

MARKS = Path(".snakemake/finished")
INTERVAL = 60.0  # seconds between two batches; what a killed workflow has finished since the last is run again
SHARE = 0.05  # of the time that recording may take: with hundreds of stages a batch costs DVC many seconds


def mark_of(stage: str) -> Path:
    """The file that marks a stage as finished; its name is the stage's."""
    return MARKS / stage


class Recording:
    """Records marked stages in a thread until ``finish`` is called."""

    def __init__(self, interval: float = INTERVAL) -> None:
        self._interval = interval
        self._done = Event()
        self._thread = Thread(target=self._work, name="dvc", daemon=True)

    def start(self) -> None:
        """Forget the marks of a workflow that was killed: nobody knows what has changed since. Then begin."""
        shutil.rmtree(MARKS, ignore_errors=True)
        MARKS.mkdir(parents=True)
        self._thread.start()

    def finish(self) -> None:
        """Record what is left."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        self._record()

    def _work(self) -> None:
        pause = self._interval
        while not self._done.wait(pause):
            begun = time.monotonic()
            self._record()
            pause = max(self._interval, (time.monotonic() - begun) / SHARE)

    def _record(self) -> None:
        marks = sorted(MARKS.iterdir(), key=lambda mark: mark.stat().st_mtime_ns) if MARKS.is_dir() else []
        if not marks:
            return
        # a process of its own: DVC's work would hold up the scheduler's
        command = [
            sys.executable,
            "-c",
            "from folora.cli import main; main()",
            "record",
            *(mark.name for mark in marks),
        ]
        if subprocess.run(command, check=False).returncode == 0:
            for mark in marks:
                mark.unlink(missing_ok=True)
