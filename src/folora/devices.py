"""GPUs of this machine: stages that run side by side take their own, and wait where they are taken."""

from __future__ import annotations

import os
import socket
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from folora.errors import FoLoRAError
from folora.hold import HeldError, hold
from folora.spread import MAX_MEMORY

VISIBLE = "CUDA_VISIBLE_DEVICES"
POLL = 5.0  # seconds between two looks for a free device


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
