"""A matrix of many stages under Snakemake, stopped in the middle and gone on with: all done, what was recorded once.

    python tests/matrix.py --runs 988 --cores 8 --output matrix.json

Its stages are made up: a ``folora`` in the place of the real one makes the outputs and nothing else, so what takes time
is the graph, the scheduler and what is recorded with DVC. The exit code says whether a stage is left out, or done again
though it was recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from ruamel.yaml import YAML
from workspace import change, make_workspace

from folora.dag import resolve_stages

STAND_IN = """#!/bin/sh
# folora STAGE ... --output PATH: makes it, and says so
command="$*"
while [ $# -gt 0 ]; do
    case "$1" in
    --output | --world)
        case "$2" in
        *.*) mkdir -p "$(dirname "$2")" && echo made >"$2" ;;
        *) mkdir -p "$2" && echo made >"$2/made" ;;
        esac
        ;;
    esac
    shift
done
sleep "$PAUSE"
echo "$command" >>"$MADE"
"""


@dataclass
class Outcome:
    """What became of the stages.

    Attributes:
        stages: in the graph.
        planning: seconds of a dry run before all, which says that each of them will run.
        before: done when Snakemake ended that was told to stop.
        running: seconds until it was told.
        recording: seconds from then until it ended.
        again: seconds of the run that went on.
        left_out: stages without their outputs in the end.
        again_recorded: stages that were recorded when Snakemake ended, and done again all the same.
        nothing_to_do: seconds of a dry run after all, which finds nothing.
    """

    stages: int
    planning: float
    before: int
    running: float
    recording: float
    again: float
    left_out: int
    again_recorded: int
    nothing_to_do: float


def measure(folder: Path, runs: int, cores: int, stop_after: int, pause: float = 0) -> Outcome:
    """Run a matrix of so many runs, tell Snakemake to stop once so many stages are done, and run it to its end.

    Args:
        folder: to work in.
        runs: in the matrix.
        cores: for Snakemake.
        stop_after: so many stages.
        pause: seconds that each stage takes.
    """
    workspace = make_matrix(folder / "workspace", runs)
    made, place = folder / "made.txt", folder / "bin" / "folora"
    made.touch()
    place.parent.mkdir()
    place.write_text(STAND_IN)
    place.chmod(0o755)
    environment = os.environ | {"PATH": f"{place.parent}:{os.environ['PATH']}", "MADE": str(made), "PAUSE": str(pause)}
    command = ["snakemake", "--quiet", "--cores", str(cores)]
    dry_run = partial(_dry_run, workspace, environment, cores)
    stages = resolve_stages(workspace).values()
    planned = time.monotonic()
    assert re.search(rf"^total +{len(stages) + 1}$", dry_run(), re.MULTILINE)  # and the rule `all`
    begun = time.monotonic()
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which a shell's background processes ignore
    with subprocess.Popen(
        command, cwd=workspace, env=environment, stderr=subprocess.DEVNULL, preexec_fn=heard
    ) as runner:
        while runner.poll() is None and len(made.read_text().splitlines()) < stop_after:
            time.sleep(0.05)
        told = time.monotonic()
        runner.send_signal(signal.SIGINT)
    ended, before = time.monotonic(), len(made.read_text().splitlines())
    recorded = YAML(typ="safe").load(workspace / "dvc.lock")["stages"]
    subprocess.run(command, cwd=workspace, env=environment, check=True, stderr=subprocess.DEVNULL)
    done = time.monotonic()
    assert "Nothing to be done" in dry_run()
    looked = time.monotonic()
    times = Counter(made.read_text().splitlines())
    return Outcome(
        stages=len(stages),
        planning=begun - planned,
        before=before,
        running=told - begun,
        recording=ended - told,
        again=done - ended,
        left_out=sum(not all((workspace / path).exists() for path in stage.outputs) for stage in stages),
        again_recorded=sum(
            times[stage.command.removeprefix("folora ")] != 1 for stage in stages if stage.name in recorded
        ),
        nothing_to_do=looked - done,
    )


def _dry_run(workspace: Path, environment: dict[str, str], cores: int) -> str:
    """What Snakemake says it would do."""
    command = ["snakemake", "--dry-run", "--cores", str(cores)]
    done = subprocess.run(command, cwd=workspace, env=environment, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def make_matrix(folder: Path, runs: int) -> Path:
    """The workspace of the tiny preset with so many runs of one method."""
    workspace = make_workspace(folder)
    params = YAML(typ="safe").load(workspace / "params.yaml")
    name, run = next(iter(params["runs"].items()))
    method = run["method"]
    change(workspace, "methods", {method: params["methods"][method]})
    change(workspace, "runs", {f"{name}-{seed}": run | {"seed": seed} for seed in range(runs)})
    change(workspace, "report.reference", method)
    return workspace


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=988)
    parser.add_argument("--cores", type=int, default=8)
    parser.add_argument("--stop-after", type=int, default=500, help="stages that are done by then")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        outcome = measure(Path(temporary), options.runs, options.cores, options.stop_after)
    print(outcome)
    if options.output:
        options.output.write_text(json.dumps(asdict(outcome), indent=1) + "\n")
    sys.exit(bool(outcome.left_out or outcome.again_recorded))
