"""GPUs and memory of this machine: stages that run side by side take their own GPU, and wait where it is taken."""

from __future__ import annotations

import os
import socket
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

from folora.errors import FoLoRAError
from folora.hold import HeldError, hold
from folora.spread import MAX_MEMORY

VISIBLE = "CUDA_VISIBLE_DEVICES"
OWN_GROUPS = Path("/proc/self/cgroup")
# where control groups of version 2, which name no controller, and of version 1 keep their limit of memory
LIMITS = {
    "": (Path("/sys/fs/cgroup"), "memory.max"),
    "memory": (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
}
POLL = 5.0  # seconds between two looks for a free device


def main_memory() -> int:
    """Bytes of main memory that processes here may have: the machine's, or less in a container or a batch job."""
    limits = [psutil.virtual_memory().total]
    with suppress(OSError):  # there are no control groups but on Linux
        for line in OWN_GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in LIMITS:
                continue
            root, limit = LIMITS[controllers]
            group = root / path.lstrip("/")
            for folder in (group, *group.parents):  # a container sees its own as the root
                with suppress(OSError, ValueError):  # not there, or "max"
                    limits.append(int((folder / limit).read_text()))
    return min(limits)


def take_devices(held: ExitStack, count: int) -> None:
    """Hold so many of the visible GPUs until ``held`` closes, and let CUDA, which has not started yet, see no others.

    Nothing is taken where there is none, or where somebody (Slurm, the user) has chosen as few already: several stages
    may share those.

    Raises:
        FoLoRAError: there are some, but fewer.
    """
    if not count:
        return
    chosen = os.environ.get(VISIBLE)
    devices = _devices() if chosen is None else [device for device in chosen.split(",") if device]
    if not devices or (chosen is not None and len(devices) == count):
        return
    if len(devices) < count:
        raise FoLoRAError(f"{MAX_MEMORY}: names {count} GPUs, there are {len(devices)}: name those that there are")
    told = False
    while True:
        with ExitStack() as free:  # all of them or none, so that two stages never wait for each other
            taken: list[str] = []
            for device in devices:
                with suppress(HeldError):
                    # by machine: nodes of a cluster share the folder in which holds lie
                    free.enter_context(hold(Path(f"GPU {device} of {socket.gethostname()}")))
                    taken.append(device)
                if len(taken) == count:
                    held.enter_context(free.pop_all())
                    os.environ[VISIBLE] = ",".join(taken)
                    return
        if not told:
            print(f"folora: GPUs are at work ({', '.join(devices)}): waiting for {count}", file=sys.stderr)
            told = True
        time.sleep(POLL)


def _devices() -> list[str]:
    """The indices of this machine's GPUs; asking does not start CUDA."""
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]
