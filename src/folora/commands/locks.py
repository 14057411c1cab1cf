"""Who works in this folder now, and which locks a killed process has left."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import psutil

DVC_LOCKS = Path(".dvc/tmp/rwlock")


def snakemake_processes() -> list[int]:
    """Ids of the Snakemake processes that work in this folder."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline", "cwd"])
        if process.info["cwd"] == str(Path.cwd())
        and any(Path(word).name == "snakemake" for word in process.info["cmdline"] or [])
    ]


def dvc_processes() -> dict[int, bool]:
    """Ids of the processes in DVC's lock file, and whether each lives."""
    with suppress(OSError, ValueError):
        held = json.loads(DVC_LOCKS.read_text() or "{}")
        readers = [info for infos in held.get("read", {}).values() for info in infos]
        holders = [*readers, *held.get("write", {}).values()]
        return {int(info["pid"]): psutil.pid_exists(int(info["pid"])) for info in holders}
    return {}


def stale_locks() -> dict[Path, str]:
    """Locks whose process has ended, and what to do about each; Snakemake's place is held as ``hold.py`` says."""
    holders = dvc_processes()
    if holders and not any(holders.values()):
        return {DVC_LOCKS: "nothing: DVC drops it when it runs next"}
    return {}


def busy() -> bool:
    """Whether a runner works in this folder."""
    return bool(snakemake_processes()) or any(dvc_processes().values())
