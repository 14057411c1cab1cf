"""How long a preset's graph would take on more and more workers, from what each of its stages cost where it ran.

    python benchmarks/simulate.py --preset baselines --costs .folora/costs.jsonl --workers 8 64 512 --overhead 7
    python benchmarks/simulate.py --preset llama-3-8b --planned FOLDER --workers 8 64 512

With ``--planned`` stages take what ``folora plan`` foresees of a model, whose ``config.json`` is in the folder; those
that it does not know take nothing, and evaluations what the texts do that drift is measured on.

A worker runs one stage at a time, and then takes the first one in the graph's order whose inputs are there: how long a
stage will take is known to nobody beforehand. The best order would take half as long at least (Graham 1969). A job
costs ``--overhead`` seconds beside its work. Files are there at once; nothing fails.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import shutil
import subprocess
import tempfile
from contextlib import chdir
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from folora.commands.shape import empty_model, shape_of
from folora.commands.stage_plans import plan_stages
from folora.costs import LEDGER, read_costs
from folora.dag import Stage, resolve_stages
from folora.errors import FoLoRAError
from folora.params import Params, load_params

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).parent.parent
DEFAULT = "default"
NEAR = 1.05  # times the critical path: more workers would gain nothing that matters


@dataclass(frozen=True)
class Job:
    """Something to run: how long it takes, and the jobs that come before it."""

    seconds: float
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outlook:
    """What a number of workers would make of a graph.

    Attributes:
        workers: how many.
        makespan: seconds from the first start to the last end.
        bound: seconds below which no order gets, of the critical path and of all work divided by the workers.
        efficiency: work without overhead, as a share of what the workers could have done in that time.
    """

    workers: int
    makespan: float
    bound: float
    efficiency: float


def schedule(jobs: dict[str, Job], workers: int) -> dict[str, float]:
    """When each job starts, in seconds, if a free worker takes the first job in order that may run.

    Args:
        jobs: by name, in the order in which they are taken.
        workers: at least one.
    """
    order = {name: place for place, name in enumerate(jobs)}
    missing = {name: len(set(job.after)) for name, job in jobs.items()}
    below: dict[str, list[str]] = {name: [] for name in jobs}
    for name, job in jobs.items():
        for before in set(job.after):
            below[before].append(name)
    ready = [order[name] for name in jobs if not missing[name]]
    heapq.heapify(ready)
    names, starts = list(jobs), {}
    running: list[tuple[float, int]] = []
    now = 0.0
    while ready or running:
        while ready and len(running) < workers:
            place = heapq.heappop(ready)
            starts[names[place]] = now
            heapq.heappush(running, (now + jobs[names[place]].seconds, place))
        now, place = heapq.heappop(running)
        for name in below[names[place]]:
            missing[name] -= 1
            if not missing[name]:
                heapq.heappush(ready, order[name])
    return starts


def makespan(jobs: dict[str, Job], workers: int) -> float:
    """Seconds until the last of the jobs ends."""
    return max(start + jobs[name].seconds for name, start in schedule(jobs, workers).items())


def critical_path(jobs: dict[str, Job]) -> list[str]:
    """The longest chain of jobs of which each waits for the one before: what no number of workers shortens."""
    starts = schedule(jobs, max(1, len(jobs)))  # with a worker each, a job starts when the last it waits for ends
    ends = {name: start + jobs[name].seconds for name, start in starts.items()}
    path = [max(ends, key=ends.__getitem__)]
    while before := jobs[path[0]].after:
        path.insert(0, max(before, key=ends.__getitem__))
    return path


def outlook(jobs: dict[str, Job], workers: int, overhead: float) -> Outlook:
    """What a number of workers would make of jobs whose seconds include so much overhead each."""
    taken = makespan(jobs, workers)
    total = sum(job.seconds for job in jobs.values())
    longest = sum(jobs[name].seconds for name in critical_path(jobs))
    work = total - overhead * len(jobs)
    return Outlook(workers, taken, max(longest, total / workers), work / (workers * taken))


def enough(jobs: dict[str, Job]) -> int:
    """The smallest number of workers that comes near the critical path."""
    longest = makespan(jobs, len(jobs))
    return next(workers for workers in range(1, len(jobs) + 1) if makespan(jobs, workers) <= NEAR * longest)


def jobs_of(stages: dict[str, Stage], costs: dict[str, float], overhead: float) -> dict[str, Job]:
    """The graph's stages as jobs.

    Args:
        stages: of the graph.
        costs: seconds by output; a stage that is not among them takes the median of its kind.
        overhead: seconds of a job beside its work.

    Raises:
        FoLoRAError: nothing of a kind was measured.
    """
    measured = {name: costs[out] for name, stage in stages.items() for out in stage.outputs if out in costs}
    kinds: dict[str, list[float]] = {}
    for name, seconds in measured.items():
        kinds.setdefault(_kind(name), []).append(seconds)
    unknown = sorted({_kind(name) for name in stages} - kinds.keys())
    if unknown:
        raise FoLoRAError(f"no cost of {', '.join(unknown)}: give a ledger of a run that has them with --costs")
    maker = {output: name for name, stage in stages.items() for output in stage.outputs}
    return {
        name: Job(
            overhead + measured.get(name, median(kinds[_kind(name)])),
            tuple(dict.fromkeys(maker[path] for path in stage.inputs)),
        )
        for name, stage in stages.items()
    }


def planned_costs(
    stages: dict[str, Stage], params: Params, folder: Path, single: float, double: float
) -> dict[str, float]:
    """Seconds by output as the plan has them, shared evenly by the jobs of a stage; 0 where it does not know.

    Args:
        stages: of the graph.
        params: of the graph.
        folder: of the model's configuration.
        single: operations a second of the device that the model runs on.
        double: float64 operations a second, for the spectrum.
    """
    shape, _ = shape_of(empty_model(params, folder), params)
    seconds = {plan.stage: plan.seconds / plan.jobs for plan in plan_stages(params, shape, single, double)}
    return {
        output: seconds.get(_kind(name).partition("-")[0], 0.0)
        for name, stage in stages.items()
        for output in stage.outputs
    }


def params_of(preset: str) -> Path:
    """The parameter file of a preset of this repository.

    Raises:
        FoLoRAError: there is no such preset.
    """
    params = ROOT / "params.yaml" if preset == DEFAULT else ROOT / "workflow" / "presets" / f"{preset}.yaml"
    if not params.exists():
        raise FoLoRAError(f"{params}: there is no such preset")
    return params


def graph_of(preset: str) -> dict[str, Stage]:
    """The stages of a preset of this repository.

    Raises:
        FoLoRAError: there is no such preset.
    """
    params = params_of(preset)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(ROOT / "dvc.yaml", folder / "dvc.yaml")
        shutil.copy(params, folder / "params.yaml")
        subprocess.run(["dvc", "init", "--no-scm", "--quiet"], cwd=folder, check=True)
        with chdir(folder):  # DVC names stages as seen from here
            return resolve_stages(folder)


def table(found: Iterable[Outlook]) -> list[str]:
    """Rows of Markdown."""
    head = ["| workers | takes | at best | efficiency |", "| ---: | ---: | ---: | ---: |"]
    return head + [
        f"| {one.workers} | {one.makespan / 60:.1f} min | {one.bound / 60:.1f} min | {one.efficiency:.0%} |"
        for one in found
    ]


def _kind(name: str) -> str:
    return name.partition("@")[0]


def main() -> None:
    """Print the outlook of a preset, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default=DEFAULT)
    parser.add_argument("--costs", type=Path, default=LEDGER, help="a ledger that `folora cost` shows")
    parser.add_argument("--planned", type=Path, metavar="FOLDER", help="with a model's configuration; no ledger")
    parser.add_argument("--single", type=float, default=989e12, help="planned: operations a second of the device")
    parser.add_argument("--double", type=float, default=88e9, help="planned: the same in float64, for the spectrum")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--overhead", type=float, default=7.0, help="seconds of a job beside its work")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    try:
        stages = graph_of(options.preset)
        if options.planned:
            params = load_params(params_of(options.preset))
            costs = planned_costs(stages, params, options.planned, options.single, options.double)
        else:
            costs = {output: cost.wall for output, cost in read_costs(options.costs).items()}
        jobs = jobs_of(stages, costs, options.overhead)
    except FoLoRAError as error:
        parser.exit(1, f"simulate: {error}\n")
    found = [outlook(jobs, workers, options.overhead) for workers in options.workers]
    path, saturated = critical_path(jobs), enough(jobs)
    longest = math.fsum(jobs[name].seconds for name in path)
    print(f"{options.preset}: {len(jobs)} jobs, with {options.overhead:g} s each beside their work", "", sep="\n")
    print(*table(found), "", f"critical path, {longest / 60:.1f} min:", sep="\n")
    print(*(f"  {name} {jobs[name].seconds:.0f} s" for name in path), sep="\n")
    print(f"{saturated} workers come within {NEAR - 1:.0%} of it")
    if options.output:
        about = {"preset": options.preset, "jobs": len(jobs), "overhead": options.overhead, "saturated": saturated}
        steps = [{"stage": name, "seconds": jobs[name].seconds} for name in path]
        content = about | {"critical_path": steps, "outlooks": [asdict(one) for one in found]}
        options.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
