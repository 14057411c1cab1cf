"""What a stage cost: wall and processor time, the greatest memory of its process, and energy, kept beside the results.

Costs differ from one run to the next, so they stay out of the artefacts, whose bytes do not. Each finished stage adds
one line of JSON to ``.folora/costs.jsonl`` of the working folder; of several lines for one output the last holds.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from folora.storage import lines_of

LEDGER = Path(".folora/costs.jsonl")


@dataclass(frozen=True)
class Cost:
    """What making one output cost.

    Attributes:
        stage: the command that made it.
        output: its path.
        wall: seconds since the process began, imports included.
        cpu: processor seconds, over all threads.
        peak: greatest resident memory in bytes.
        step: median seconds of an optimizer step; None where none is taken.
        energy: joules that the machine took meanwhile; None where it does not count them.
    """

    stage: str
    output: str
    wall: float
    cpu: float
    peak: int
    step: float | None = None
    energy: float | None = None


def keep_cost(stage: str, output: Path, step: float | None = None, energy: float | None = None) -> None:
    """Add what this process has cost so far to the ledger; best effort, a full disk fails no stage here."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    wall = time.time() - psutil.Process().create_time()
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # Linux counts in KiB
    cost = Cost(stage, output.as_posix(), wall, usage.ru_utime + usage.ru_stime, peak, step, energy)
    with suppress(OSError):
        LEDGER.parent.mkdir(exist_ok=True)
        with LEDGER.open("a") as file:
            file.write(json.dumps(asdict(cost)) + "\n")


def read_costs(ledger: Path = LEDGER) -> dict[str, Cost]:
    """The last cost of every output, by its path; empty where nothing ran."""
    costs = {}
    for line in lines_of(ledger):
        with suppress(ValueError, TypeError):  # a line that a full disk cut off
            cost = Cost(**json.loads(line))
            costs[cost.output] = cost
    return costs
