"""One process at a time makes an output, and one Snakemake at a time works in a folder; who comes second is told.

The kernel ends a hold with its process, however that ends, so there are no stale ones to clear away. It is an flock:
NFS, and Lustre mounted with ``flock``, tell all nodes of it. Where a file system has none, filelock makes a file in its
place, which a killed process leaves behind.
"""

from __future__ import annotations

import json
import os
import socket
from contextlib import contextmanager, suppress
from datetime import datetime
from getpass import getuser
from pathlib import Path
from typing import TYPE_CHECKING

from folora.errors import FoLoRAError
from folora.storage import check_writable, digest_of

if TYPE_CHECKING:
    from collections.abc import Iterator

HOLDS = Path(".folora/holds")


class HeldError(FoLoRAError):
    """Another process holds it."""


@contextmanager
def hold(what: Path) -> Iterator[None]:
    """Hold a path of the working folder for a ``with`` block; others may read it meanwhile.

    Raises:
        HeldError: another process holds it.
        FoLoRAError: ``.folora`` cannot be written.
    """
    from filelock import FileLock, Timeout

    path = HOLDS / f"{digest_of(os.path.relpath(what))[:16]}.lock"
    check_writable(path)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise HeldError(f"{what}: {_holder(path)} is at work on it: wait until it ends, or stop it") from error
    try:
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        who = {"process": os.getpid(), "machine": socket.gethostname(), "user": _user(), "since": since}
        with suppress(OSError):  # on a full disk a second process is told less
            path.with_suffix(".json").write_text(json.dumps(who))
        yield
    finally:
        lock.release()


def at_work() -> str | None:
    """Who holds anything in the working folder, on any machine that shares it; None where nobody does.

    It looks by taking each for a moment; a stage that wants it in that moment is told that it is taken.

    Raises:
        FoLoRAError: a hold is another user's and cannot be looked at.
    """
    from filelock import FileLock, Timeout

    for path in HOLDS.glob("*.lock"):
        try:
            with FileLock(path).acquire(timeout=0):
                pass
        except Timeout:
            return _holder(path)
        except OSError as error:
            raise FoLoRAError(f"{path}: cannot be looked at ({error.strerror}): see who owns it") from error
    return None


def _user() -> str:
    try:
        return getuser()
    except (KeyError, OSError):  # a container may run a user id without a name
        return str(os.getuid())


def _holder(path: Path) -> str:
    """Who holds it, as far as that can be read."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        who = json.loads(path.with_suffix(".json").read_text())
        return f"process {who['process']} of {who['user']} on {who['machine']} (since {who['since']})"
    return "another process"
