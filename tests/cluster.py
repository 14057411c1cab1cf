"""A Slurm cluster of one node, this machine: Debian's ``slurm-wlm`` and ``munge``, with everything in one folder."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# no accounting, as Debian installs it: sacct is there, and knows nothing
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=8000
PartitionName=cpu Nodes={host} Default=YES
"""


def missing() -> str:
    """Why no cluster can be started here, or nothing."""
    absent = [name for name in ("munged", "slurmctld", "slurmd") if _find(name) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm munge"
    return "" if os.getuid() == 0 else "slurmd has to run as root"


@contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """A cluster for a ``with`` block, in which Slurm's commands find it."""
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir()
    host = socket.gethostname().partition(".")[0]
    configuration = folder / "slurm.conf"
    cpus = max(2, os.cpu_count() or 1)
    configuration.write_text(CONFIGURATION.format(folder=folder, host=host, ports=_free_ports(2), cpus=cpus))
    # inside a job the executor plugin drops SLURM_CONF before it calls srun
    srun = folder / "bin" / "srun"
    srun.write_text(f'#!/bin/sh\nSLURM_CONF={configuration} exec {_find("srun")} "$@"\n')
    srun.chmod(0o700)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(64))
    key.chmod(0o600)
    files = {"socket": "socket", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
    munged = [f"--{option}={folder}/munge.{suffix}" for option, suffix in files.items()]
    with pytest.MonkeyPatch.context() as patch, ExitStack() as running:
        patch.setenv("SLURM_CONF", str(configuration))
        patch.setenv("PATH", str(srun.parent), prepend=os.pathsep)
        running.enter_context(_daemon(folder, "munged", "--foreground", "--force", f"--key-file={key}", *munged))
        running.enter_context(_daemon(folder, "slurmctld", "-D", "-i"))
        running.enter_context(_daemon(folder, "slurmd", "-D", "-N", host))
        _wait_for("idle")
        yield
        subprocess.run(["scancel", "--user=root"], check=True)
        _wait_for("idle")


@contextmanager
def _daemon(folder: Path, name: str, *arguments: str) -> Iterator[None]:
    with (folder / f"{name}.out").open("w") as output:
        process = subprocess.Popen([str(_find(name)), *arguments], stdout=output, stderr=output)
        try:
            yield
        finally:
            process.terminate()
            process.wait(30)


def _wait_for(state: str) -> None:
    """Wait until the node is in a state."""
    deadline = time.monotonic() + 60
    seen = None
    while seen != state:
        assert time.monotonic() < deadline, f"the node is {seen}, not {state}"
        said = subprocess.run(["sinfo", "--noheader", "--format=%T"], capture_output=True, text=True, check=False)
        seen = said.stdout.strip() or said.stderr
        time.sleep(0.2)


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
