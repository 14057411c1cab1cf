"""A Slurm cluster of one node, this machine, with accounting or without; everything it makes is in one folder.

Two partitions have the node, ``cpu`` and ``gpu``; jobs may ask for one GPU, which is made up.

Debian's packages ``slurm-wlm`` and ``munge``; for accounting ``slurmdbd``, ``mariadb-server-core`` and
``mariadb-client-core``, which start no service.
"""

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

ACCOUNT = "lab"  # of a cluster with accounting
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
SlurmdParameters=config_overrides
KillWait=5
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=8000 Gres=gpu:1
PartitionName=cpu Nodes={host} Default=YES
PartitionName=gpu Nodes={host}
"""
MADE_UP_GPU = "Name=gpu File=/dev/null\n"  # Slurm hands it out all the same
# as Debian installs it: sacct is there, and knows nothing
WITHOUT_ACCOUNTING = "JobAcctGatherType=jobacct_gather/none\n"
# sacct lists every job, and each needs an account
WITH_ACCOUNTING = """JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={folder}/munge.socket
AccountingStorageEnforce=associations
"""
DATABASE_DAEMON = """
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdPort={port}
SlurmUser=root
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageUser=root
"""


def missing(*, accounting: bool = False) -> str:
    """Why no cluster can be started here, or nothing."""
    needed = {"slurm-wlm munge": ("munged", "slurmctld", "slurmd")}
    if accounting:
        needed["slurmdbd"] = ("slurmdbd",)
        needed["mariadb-server-core mariadb-client-core"] = ("mariadbd", "mariadb-install-db", "my_print_defaults")
    for packages, names in needed.items():
        if absent := [name for name in names if _find(name) is None]:
            return f"no {', '.join(absent)}: apt-get install {packages}"
    return "" if os.getuid() == 0 else "slurmd has to run as root"


@contextmanager
def cluster(folder: Path, *, accounting: bool = False) -> Iterator[None]:
    """A cluster for a ``with`` block, in which Slurm's commands find it.

    Args:
        folder: an empty one, which holds everything that the cluster writes.
        accounting: keep every job in a database, on an account: root's default one, ``root``, or ``ACCOUNT``.
    """
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir()
    host = socket.gethostname().partition(".")[0]
    configuration = folder / "slurm.conf"
    cpus = max(2, os.cpu_count() or 1)
    *ports, port = _free_ports(3)
    configuration.write_text(
        CONFIGURATION.format(folder=folder, host=host, ports=ports, cpus=cpus)
        + (WITH_ACCOUNTING.format(folder=folder, port=port) if accounting else WITHOUT_ACCOUNTING)
    )
    (folder / "gres.conf").write_text(MADE_UP_GPU)
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
        if accounting:
            running.enter_context(_accounting(folder, port))
        running.enter_context(_daemon(folder, "slurmctld", "-D", "-i"))
        running.enter_context(_daemon(folder, "slurmd", "-D", "-N", host))
        _wait_for("idle", "sinfo", "--noheader", "--format=%T")
        yield
        subprocess.run(["scancel", "--user=root"], check=True)
        _wait_for("idle", "sinfo", "--noheader", "--format=%T")


@contextmanager
def _accounting(folder: Path, port: int) -> Iterator[None]:
    """slurmdbd, in front of a MariaDB that listens at a socket in the folder and nowhere else."""
    database = ["--no-defaults", "--user=root", f"--datadir={folder}/database"]
    install = [str(_find("mariadb-install-db")), *database, "--skip-test-db"]
    subprocess.run(install, check=True)
    configuration = folder / "slurmdbd.conf"
    configuration.write_text(DATABASE_DAEMON.format(folder=folder, port=port))
    configuration.chmod(0o600)
    listening = folder / "mariadb.socket"
    files = (f"--socket={listening}", f"--pid-file={folder}/mariadb.pid")
    with pytest.MonkeyPatch.context() as patch, ExitStack() as running:
        running.enter_context(_daemon(folder, "mariadbd", *database, *files, "--skip-networking"))
        _wait_for(str(listening), "ls", str(listening))
        patch.setenv("MYSQL_UNIX_PORT", str(listening))  # slurmdbd.conf has no place for it
        running.enter_context(_daemon(folder, "slurmdbd", "-D"))
        _wait_for("", "sacctmgr", "--noheader", "list", "cluster")
        for added in (["cluster", "test"], ["account", ACCOUNT], ["user", "root", f"account={ACCOUNT}"]):
            subprocess.run(["sacctmgr", "--immediate", "add", *added], check=True)
        yield


@contextmanager
def _daemon(folder: Path, name: str, *arguments: str) -> Iterator[None]:
    with (folder / f"{name}.out").open("w") as output:
        process = subprocess.Popen([str(_find(name)), *arguments], stdout=output, stderr=output)
        try:
            yield
        finally:
            process.terminate()
            process.wait(30)


def _wait_for(answer: str, *command: str) -> None:
    """Wait until a command says something."""
    deadline = time.monotonic() + 60
    seen = None
    while seen != answer:
        assert time.monotonic() < deadline, f"{command[0]} says {seen}, not {answer}"
        said = subprocess.run(command, capture_output=True, text=True, check=False)
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
