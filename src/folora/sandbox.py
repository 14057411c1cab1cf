"""Programs that a model wrote, run where they can do no harm: in bubblewrap, a process of the kernel's own namespaces.

A program sees the standard library of this Python, read-only, and an empty folder; no network, no other process, no
environment. Its processor time, memory, processes, files and what it writes are limited, and it ends with its caller.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from folora import sandboxed
from folora.errors import FoLoRAError

MIB = 1 << 20
SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")  # what Python is linked with
# inside the sandbox; the folders in which they lie here tell who is at work
PREFIX, PYTHON, RUNNER = "/python", "/python/bin/python", "/sandboxed.py"
FOLDER = "/tmp"  # of the program, empty
NAMESPACE_OF_A_USER = ["--unshare-user", "--disable-userns"]
ENVIRONMENT = {"LD_LIBRARY_PATH": f"{PREFIX}/lib", "PYTHONHASHSEED": "0"}  # sets have one order


@dataclass(frozen=True)
class Limits:
    """What a program may take.

    Attributes:
        seconds: of processor time, each of its processes.
        wall_seconds: until all of it is killed.
        memory: bytes of address space, each of its processes.
        processes: threads included, and two that start it.
        files: open at once.
        file_size: bytes of a file.
        folder_size: bytes of all files together.
    """

    seconds: int = 5
    wall_seconds: int = 15
    memory: int = 512 * MIB
    processes: int = 8
    files: int = 32
    file_size: int = 4 * MIB
    folder_size: int = 16 * MIB

    def resources(self) -> dict[str, int]:
        """Those that a process sets for itself and its children."""
        return {
            "RLIMIT_CORE": 0,
            "RLIMIT_CPU": self.seconds,
            "RLIMIT_AS": self.memory,
            "RLIMIT_NPROC": self.processes,
            "RLIMIT_NOFILE": self.files,
            "RLIMIT_FSIZE": self.file_size,
        }


LIMITS = Limits()


def passes(program: str, limits: Limits = LIMITS) -> bool:
    """Whether a program, tests included, runs to its end without an error and within the limits.

    Raises:
        FoLoRAError: there is no sandbox to be had here; nothing is run without it.
    """
    token = secrets.token_hex()  # who leaves early, with whatever exit code, does not know it
    said = _run(f"{token}\n{program}", limits)
    if not said.startswith(sandboxed.STARTED):
        reason = " ".join(said.split())[:200] or "it was not ready in time"
        raise FoLoRAError(f"evaluation.run_generated_code: bubblewrap can make no sandbox here: {reason}")
    return said == sandboxed.STARTED + token


def check_sandbox() -> None:
    """See that a sandbox can be had.

    Raises:
        FoLoRAError: it cannot.
    """
    passes("")


def describe_sandbox() -> dict[str, Any]:
    """What programs are run in, for the manifest of a result."""
    version = subprocess.run([_bubblewrap(), "--version"], check=True, capture_output=True, text=True).stdout.strip()
    return {"sandbox": version, "python": sys.version.split()[0], "limits": asdict(LIMITS)}


def _run(given: str, limits: Limits) -> str:
    """What ``sandboxed.py`` says of a token and a program, or bubblewrap of a sandbox that it cannot make."""
    # a file, not a pipe, which could fill this process; its size is limited like that of every file
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(_command(limits), stdin=subprocess.PIPE, stdout=said, stderr=said, env=ENVIRONMENT)
        try:
            process.communicate(given.encode(errors="replace"), timeout=limits.wall_seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            process.kill()  # bubblewrap's end is the end of all that it started
            process.wait()
        said.seek(0)
        return said.read(1000).decode(errors="replace")


def _command(limits: Limits) -> list[str]:
    """The command line of a sandbox that runs ``sandboxed.py``."""
    bind = []
    for folder in (f"{PREFIX}/bin", "/usr", "/etc", "/dev"):  # above what is bound bubblewrap makes them for root alone
        bind += ["--dir", folder]
    bind += ["--ro-bind", str(Path(sandboxed.__file__).resolve()), RUNNER, "--dev-bind", os.devnull, os.devnull]
    bind += ["--ro-bind", os.path.realpath(sys.executable), PYTHON]  # whatever virtual environment it stands in
    for name in dict.fromkeys(("lib", sys.platlibdir)):
        library = Path(sys.base_prefix, name)
        bind += ["--ro-bind", str(library), f"{PREFIX}/{name}"]
        for packages in library.glob("python*/site-packages"):
            bind += ["--tmpfs", f"{PREFIX}/{packages.relative_to(sys.base_prefix)}"]
    for path in SYSTEM_LIBRARIES:
        bind += ["--ro-bind-try", path, path]
    # root's processes are not counted: who starts as root becomes another user, which a user namespace would not let it
    user = ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if os.getuid() == 0 else NAMESPACE_OF_A_USER
    return [
        *("/bin/sh", "-c", 'echo 1000 > /proc/self/oom_score_adj; exec "$0" "$@"'),  # the first to go where memory ends
        *(_bubblewrap(), *user, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"),
        *("--unshare-cgroup-try", "--hostname", "sandbox", "--new-session", "--die-with-parent"),
        *bind,
        *("--perms", "1777", "--size", str(limits.folder_size), "--tmpfs", FOLDER, "--remount-ro", "/"),
        *("--chdir", FOLDER, "--"),
        *(PYTHON, "-B", "-P", "-S", "-s", RUNNER, json.dumps(limits.resources())),
    ]


def _bubblewrap() -> str:
    """The path of bubblewrap.

    Raises:
        FoLoRAError: it is not installed.
    """
    path = shutil.which("bwrap")
    if path is None:
        raise FoLoRAError(
            "evaluation.run_generated_code: needs bubblewrap, which is not here: on Linux, apt-get install bubblewrap"
        )
    return path
