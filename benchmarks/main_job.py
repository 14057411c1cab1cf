"""The main job from clean, under both runners on two cores, against what was asked of it; both make the same bytes.

It takes as long as the job does, so each runner has one turn, whatever ``--repeats`` says; the tiny size is the
first stage of the tiny preset. Packages are those of this environment.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from bench import Row, main
from nothing_to_do import ROOT, fresh_workspace

from folora.storage import digest_of_folder, require

if TYPE_CHECKING:
    from collections.abc import Iterator

RUNNERS = {"snakemake --cores 2": ["snakemake", "--cores", "2"], "dvc repro": ["dvc", "repro"]}
FIRST = "foundation"
SECONDS, BYTES = 600.0, 6e9  # that were asked


def rows(size: str, repeats: int) -> Iterator[Row]:
    """Time one run of each runner, and watch its memory."""
    del repeats
    work, target = ("default preset", []) if size == "full" else (f"{FIRST} of the tiny preset", [FIRST])
    made = []
    for name, command in RUNNERS.items():
        with tempfile.TemporaryDirectory() as folder:
            workspace = Path(folder) / "folora"
            fresh_workspace(workspace)
            if size == "tiny":
                shutil.copy(ROOT / "workflow" / "presets" / "tiny.yaml", workspace / "params.yaml")
            seconds, memory = watched(workspace, command + target)
            made.append(digest_of_folder(require(workspace / "artifacts")))
        yield asked(f"main job, {name}", work, seconds, SECONDS, "s")
        yield asked(f"the same, memory of all its processes, {name}", work, memory, BYTES, "bytes")
    assert made[0] == made[1], "both runners make the same bytes"


def watched(workspace: Path, command: list[str]) -> tuple[float, float]:
    """Seconds of a command that must succeed, and the most bytes that it and its processes held, twice a second."""
    log, most = workspace / ".folora.log", 0
    begun = time.monotonic()
    with log.open("w") as output, psutil.Popen(command, cwd=workspace, stdout=output, stderr=output) as process:
        while process.poll() is None:
            most = max(most, sum(map(resident, [process, *process.children(recursive=True)])))
            time.sleep(0.5)
    assert process.returncode == 0, log.read_text()
    return time.monotonic() - begun, float(most)


def resident(process: psutil.Process) -> int:
    """Bytes in memory, none once it has ended; pages that processes share count for each."""
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def asked(what: str, work: str, found: float, bound: float, unit: str) -> Row:
    """A row of one measurement."""
    ratio = found / bound
    return Row(what, "what was asked", work, "within 1", ratio <= 1, ratio, [found], [bound], "one run", unit)


if __name__ == "__main__":
    main(rows)
