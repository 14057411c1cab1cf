"""What the stages and the methods cost, from the ledger of this folder."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, ClassVar

from folora.costs import LEDGER, Cost, read_costs
from folora.errors import FoLoRAError
from folora.storage import publish

if TYPE_CHECKING:
    from pathlib import Path

    from folora.params import Params

MEBIBYTE = 2**20


@dataclass(frozen=True)
class StageCost:
    """All outputs of one stage together: wall and processor seconds, the greatest memory in bytes, joules if known."""

    HEAD: ClassVar = ["stage", "outputs", "wall", "processor", "memory", "energy"]

    stage: str
    outputs: int
    wall: float
    cpu: float
    peak: int
    energy: float | None

    def cells(self) -> list[str]:
        """Cells of a table."""
        return [
            self.stage,
            str(self.outputs),
            f"{self.wall:.0f} s",
            f"{self.cpu:.0f} s",
            f"{self.peak / MEBIBYTE:.0f} MiB",
            "–" if self.energy is None else f"{self.energy / 3600:.2g} Wh",
        ]


@dataclass(frozen=True)
class MethodCost:
    """A method's training: seconds of a step and bytes of memory, means over its runs, and against the reference.

    A run that was resumed with no step left to train has no time of a step, and is left out of that mean.
    """

    HEAD: ClassVar = ["method", "runs", "step", "against", "memory", "against"]

    method: str
    runs: int
    step: float | None
    relative_step: float | None
    peak: float
    relative_peak: float | None

    def cells(self) -> list[str]:
        """Cells of a table."""
        relative = ["–" if one is None else f"{one:.2f} ×" for one in (self.relative_step, self.relative_peak)]
        memory = f"{self.peak / MEBIBYTE:.0f} MiB"
        step = "–" if self.step is None else f"{1000 * self.step:.1f} ms"
        return [self.method, str(self.runs), step, relative[0], memory, relative[1]]


def costs_here(params: Params, runs: Path) -> tuple[list[StageCost], list[MethodCost]]:
    """What ran in this folder; methods without a run that was trained here are left out.

    Raises:
        FoLoRAError: nothing ran here.
    """
    costs = read_costs()
    if not costs:
        raise FoLoRAError(f"{LEDGER}: no stage has run in this folder: dvc repro, or look where it ran")
    return _of_stages(costs), _of_methods(params, costs, runs)


def write_page(stages: list[StageCost], methods: list[MethodCost], report: Path, output: Path) -> None:
    """Write a copy of the report's page with these costs in it.

    Raises:
        FoLoRAError: there is no page, or ``output`` cannot be written.
    """
    from folora.report.page import with_costs

    tables = [
        ("Every stage on this machine, all of its outputs together.", StageCost.HEAD, [one.cells() for one in stages]),
        ("Training of each method: a median step, and memory.", MethodCost.HEAD, [one.cells() for one in methods]),
    ]
    page = with_costs(report / "index.html", tables)
    with publish(output) as partial:
        partial.write_text(page)


def _of_stages(costs: dict[str, Cost]) -> list[StageCost]:
    stages: dict[str, list[Cost]] = {}
    for cost in costs.values():
        stages.setdefault(cost.stage, []).append(cost)
    found = []
    for name, each in stages.items():
        counted = [c.energy for c in each if c.energy is not None]
        energy = sum(counted) if len(counted) == len(each) else None
        wall, cpu = sum(c.wall for c in each), sum(c.cpu for c in each)
        found.append(StageCost(name, len(each), wall, cpu, max(c.peak for c in each), energy))
    return found


def _of_methods(params: Params, costs: dict[str, Cost], runs: Path) -> list[MethodCost]:
    means = {}
    for method in params.methods:
        places = [(runs / method / name).as_posix() for name in params.runs_of(method)]
        each = [costs[place] for place in places if place in costs]
        if each:
            steps = [c.step for c in each if c.step is not None]
            means[method] = len(each), fmean(steps) if steps else None, fmean(c.peak for c in each)
    reference = means.get(params.report.reference)
    return [
        MethodCost(
            method,
            count,
            step,
            step / reference[1] if step is not None and reference and reference[1] else None,
            peak,
            peak / reference[2] if reference else None,
        )
        for method, (count, step, peak) in means.items()
    ]
