"""What ``folora plan`` foresees of a folder's parameters against what its stages took there.

    cd FOLDER && python benchmarks/planned.py

Memory is the greatest of a stage's jobs, time all of them together. Evaluations are left out: items of their tasks
are no part of the plan. Its time follows from the speed of this machine now: run it where the stages ran.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from folora.commands.plan import make_plan
from folora.costs import LEDGER, Cost, read_costs
from folora.dag import resolve_stages
from folora.errors import FoLoRAError
from folora.params import load_params

if TYPE_CHECKING:
    from folora.commands.stage_plans import StagePlan


@dataclass(frozen=True)
class Ratio:
    """Planned over measured of one stage, and what was measured: bytes, bytes and seconds."""

    stage: str
    jobs: int
    memory: float
    disk: float
    time: float
    measured_memory: float
    measured_disk: float
    measured_time: float


def ratios(plans: list[StagePlan], costs: list[Cost]) -> list[Ratio]:
    """Compare the stages of which all jobs ran here and left their outputs."""
    found = []
    for plan in plans:
        ran = [cost for cost in costs if cost.stage == plan.stage and Path(cost.output).exists()]
        if plan.stage == "evaluate" or len(ran) != plan.jobs:
            continue
        memory, time = max(cost.peak for cost in ran), sum(cost.wall for cost in ran)
        disk = sum(_size(Path(cost.output)) for cost in ran)
        planned = (plan.memory / memory, plan.disk / disk, plan.seconds / time)
        found.append(Ratio(plan.stage, plan.jobs, *planned, memory, disk, time))
    return found


def table(found: list[Ratio]) -> list[str]:
    """Rows of Markdown."""
    head = ["| stage | jobs | memory | planned | disk | planned | time | planned |"]
    head.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    return head + [
        f"| {one.stage} | {one.jobs} | {one.measured_memory / 1e6:,.0f} MB | {one.memory:.2f} × "
        f"| {one.measured_disk / 1e6:,.2f} MB | {one.disk:.2f} × | {one.measured_time:,.0f} s | {one.time:.2f} × |"
        for one in found
    ]


def _size(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def main() -> None:
    """Print the ratios of the working folder, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    try:
        here = {output for stage in resolve_stages(Path()).values() for output in stage.outputs}
        plans = make_plan(load_params(Path("params.yaml"))).stages
    except FoLoRAError as error:
        sys.exit(f"planned: {error}")
    found = ratios(plans, [cost for cost in read_costs().values() if cost.output in here])
    if not found:
        sys.exit(f"planned: {LEDGER}: no stage has run here with all of its jobs: dvc repro")
    print(*table(found), sep="\n")
    if options.output:
        options.output.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
