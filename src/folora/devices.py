"""GPUs of this machine: stages that run side by side take one each, and wait where all are taken."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from folora.hold import HeldError, hold

if TYPE_CHECKING:
    from contextlib import ExitStack

VISIBLE = "CUDA_VISIBLE_DEVICES"
POLL = 5.0  # seconds between two looks for a free device


def take_device(held: ExitStack) -> None:
    """Hold one of the visible GPUs until ``held`` closes, and let CUDA, which has not started yet, see no other.

    Nothing is taken where there is none, or where somebody (Slurm, the user) has chosen one already: several stages may
    share that one.
    """
    chosen = os.environ.get(VISIBLE)
    devices = _devices() if chosen is None else [device for device in chosen.split(",") if device]
    if not devices or (chosen is not None and len(devices) == 1):
        return
    told = False
    while True:
        for device in devices:
            try:
                # by machine: nodes of a cluster share the folder in which holds lie
                held.enter_context(hold(Path(f"GPU {device} of {socket.gethostname()}")))
            except HeldError:
                continue
            os.environ[VISIBLE] = device
            return
        if not told:
            print(f"folora: all GPUs are at work ({', '.join(devices)}): waiting for one", file=sys.stderr)
            told = True
        time.sleep(POLL)


def _devices() -> list[str]:
    """The indices of this machine's GPUs; asking does not start CUDA."""
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]
