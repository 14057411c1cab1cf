"""What every benchmark shares: paired timing, peak memory in a process of its own, and the record that it writes.

    python benchmarks/moments.py --size full --repeats 5 --output results

Ours and the peer do the same work in alternation, so what else the machine does weighs on both alike.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Work = Callable[[], Any]

SIZES = ("tiny", "full")  # tiny: sees that it works, in seconds
MEASURED = "measured"  # in place of a bound


@dataclass
class Row:
    """One line of the table.

    Attributes:
        what: is compared.
        peer: with what.
        work: how much of it.
        required: the bound on the ratio that was set, in words.
        holds: whether the ratio keeps it.
        ratio: of the two medians, as ``required`` reads it.
        ours: seconds, or bytes, of each repeat.
        theirs: likewise of the peer.
        note: what a reader should know.
    """

    what: str
    peer: str
    work: str
    required: str
    holds: bool
    ratio: float
    ours: list[float]
    theirs: list[float]
    note: str = ""
    unit: str = "s"


@dataclass
class Record:
    """What a benchmark writes: its rows, and the machine."""

    benchmark: str
    size: str
    rows: list[Row]
    machine: dict[str, Any] = field(default_factory=lambda: machine())


def faster(
    what: str, peer: str, work: str, ours: list[float], theirs: list[float], times: float, note: str = ""
) -> Row:
    """A row that asks to be so many times faster, or smaller, than the peer."""
    ratio = statistics.median(theirs) / statistics.median(ours)
    return Row(what, peer, work, f"{times:g} times less or better", ratio >= times, ratio, ours, theirs, note)


def within(
    what: str, peer: str, work: str, ours: list[float], theirs: list[float], bound: float, note: str = ""
) -> Row:
    """A row that asks to take no more than so many times what the limit takes."""
    ratio = statistics.median(ours) / statistics.median(theirs)
    return Row(what, peer, work, f"within {bound:g}", ratio <= bound, ratio, ours, theirs, note)


def measured(what: str, peer: str, work: str, ours: list[float], theirs: list[float], note: str = "") -> Row:
    """A row without a bound: how many times what the peer takes."""
    ratio = statistics.median(ours) / statistics.median(theirs)
    return Row(what, peer, work, MEASURED, holds=True, ratio=ratio, ours=ours, theirs=theirs, note=note)


def alternate(repeats: int, *works: Work) -> list[list[float]]:
    """Seconds of each piece of work in each repeat, taken in turns after one turn that does not count."""
    times: list[list[float]] = [[] for _ in works]
    for repeat in range(repeats + 1):
        for seconds, work in zip(times, works, strict=True):
            begun = time.perf_counter()
            work()
            if repeat:
                seconds.append(time.perf_counter() - begun)
    return times


def peak_memory(prepare: Callable[[], Work]) -> float:
    """Bytes by which a piece of work raises the peak of a fresh process above what it holds once prepared (Linux)."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (prepare,))


def _peak(prepare: Callable[[], Work]) -> float:
    work = prepare()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the preparation
    before = _kilobytes("VmRSS")
    work()
    return 1024.0 * (_kilobytes("VmHWM") - before)


def _kilobytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def machine() -> dict[str, Any]:
    """What the figures are of."""
    import psutil
    import torch

    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main(rows: Callable[[str, int], Iterable[Row]]) -> None:
    """The command line of a benchmark; ``rows`` takes the size and the number of repeats."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="folder for the record, as JSON")
    options = parser.parse_args()
    name = Path(sys.argv[0]).stem
    record = Record(name, options.size, list(_shown(rows(options.size, options.repeats))))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"{name}.json").write_text(json.dumps(asdict(record), indent=1) + "\n")


def _shown(rows: Iterable[Row]) -> Iterator[Row]:
    for row in rows:
        print(f"{row.what} | {row.peer} | {row.work}")
        print(f"  ours {spread(row.ours, row.unit)}; peer {spread(row.theirs, row.unit)}")
        print(
            "; ".join(filter(None, [f"  ratio {row.ratio:.2f} ({row.required})", verdict(row, "FALLS SHORT")])),
            flush=True,
        )
        yield row


def verdict(row: Row, short: str) -> str:
    """Whether the bound is kept, where there is one, and the note."""
    kept = "" if row.required == MEASURED else "holds" if row.holds else short
    return "; ".join(filter(None, [kept, row.note]))


def spread(values: list[float], unit: str) -> str:
    """Median and range."""
    scale, name = (1e6, "MB") if unit == "bytes" else (1.0, "s") if statistics.median(values) >= 1 else (1e-3, "ms")
    low, middle, high = (value / scale for value in (min(values), statistics.median(values), max(values)))
    return f"{middle:.3g} {name} [{low:.3g}, {high:.3g}]"
