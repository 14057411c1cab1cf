"""How the cost of the moments, the spectrum and the optimizer grows with tokens, width and layers: a table and a plot.

python benchmarks/growth.py --output results
"""

from __future__ import annotations

import argparse
import json
import math
from functools import partial, reduce
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import altair as alt
import torch
from bench import SIZES, alternate, machine
from spectrum import moments, whole
from threadpoolctl import threadpool_limits
from torch import nn

from folora.moments import Moments, collect
from folora.optimizer import GatedAdam

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RANK = 16


def series(size: str) -> Iterator[tuple[str, str, int, Callable[[], Any]]]:
    """What grows, with what, how much of it, and the work; on one thread, as the stages run."""
    torch.set_num_threads(1)
    threadpool_limits(1)
    small = size == "tiny"
    for tokens in (256, 512) if small else (512, 1024, 2048, 4096, 8192):
        yield "moments of one input of width 576", "tokens", tokens, partial(accumulate, 576, tokens, 1)
    for width in (64, 128) if small else (256, 512, 1024, 2048, 4096):
        yield "moments over 1,024 tokens", "width", width, partial(accumulate, width, 1024, 1)
    for layers in (1, 2) if small else (1, 2, 4, 8, 16):
        yield "moments of inputs of width 576, 1,024 tokens", "layers", layers, partial(accumulate, 576, 1024, layers)
    for shards in (1, 2) if small else (1, 2, 4, 8):
        yield "moments of one input of width 576, 8,192 tokens, and their sum", "shards", shards, partial(added, shards)
    for width in (64, 128) if small else (256, 512, 1024, 2048):
        yield "spectrum of one input", "width", width, partial(whole, [moments(width)])
    for width in (64, 128) if small else (256, 512, 1024, 2048, 4096):
        yield f"step of an A of rank {RANK}", "width", width, stepper(width).step


def accumulate(width: int, tokens: int, layers: int) -> Moments:
    """Moments of so many inputs over one batch."""
    linear = {str(number): nn.Linear(width, 1, bias=False) for number in range(layers)}
    x = torch.ones(1, tokens, width)
    with torch.no_grad(), collect(linear) as collector:
        collector.select(torch.ones(1, tokens, dtype=torch.bool))
        for layer in linear.values():
            layer(x)
    return collector.moments


def added(shards: int) -> Moments:
    """Moments of the same tokens in so many shards, one after another, and their sum."""
    return reduce(Moments.plus, (accumulate(576, 8192 // shards, 1) for _ in range(shards)))


def stepper(width: int) -> GatedAdam:
    """A gated optimizer of one A, with a gradient."""
    A = nn.Parameter(torch.zeros(RANK, width))
    A.grad = torch.ones_like(A)
    return GatedAdam([{"params": [A], "basis": torch.eye(width), "gate": torch.ones(width)}], lr=1e-3)


def main() -> None:
    """Measure, print, and write ``growth.json`` and ``growth.png``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="folder for the record and the plot")
    options = parser.parse_args()
    points = [
        {"what": what, "with": axis, "amount": amount, "seconds": median(alternate(options.repeats, work)[0])}
        for what, axis, amount, work in series(options.size)
    ]
    for row in table(points):
        print("| " + " | ".join(row) + " |")
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        record = {"benchmark": "growth", "size": options.size, "points": points, "machine": machine()}
        (options.output / "growth.json").write_text(json.dumps(record, indent=1) + "\n")
        plot(points).save(options.output / "growth.png", scale_factor=2)


def table(points: list[dict[str, Any]]) -> list[list[str]]:
    """One row a series: the seconds at both ends, and the exponent that joins them."""
    rows = [["what", "with", "from", "to", "exponent"]]
    for what in dict.fromkeys(point["what"] for point in points):
        first, *_, last = [point for point in points if point["what"] == what]
        exponent = math.log(last["seconds"] / first["seconds"]) / math.log(last["amount"] / first["amount"])
        ends = [f"{one['amount']:,}: {1e3 * one['seconds']:.3g} ms" for one in (first, last)]
        rows.append([what, first["with"], *ends, f"{exponent:.1f}"])
    return rows


def plot(points: list[dict[str, Any]]) -> alt.Chart:
    """Seconds against what grows, both logarithmic: a straight line is a power."""
    scale = alt.Scale(type="log")
    encoding = {
        "x": alt.X("amount:Q", scale=scale, title="tokens, width, layers or shards"),
        "y": alt.Y("seconds:Q", scale=scale),
        "color": alt.Color("what:N", title=None, legend=alt.Legend(labelLimit=400, orient="bottom", columns=2)),
    }
    return alt.Chart(alt.Data(values=points)).mark_line(point=True).encode(**encoding).properties(width=480, height=300)


if __name__ == "__main__":
    main()
