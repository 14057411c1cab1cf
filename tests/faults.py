"""Break stages at random moments, run the same command again, and compare every output with an undisturbed run's.

    python tests/faults.py --count 100 --seed 0

Each fault has a workspace of its own, a copy of a finished tiny run in which one stage is to do. Faults:

- ``kill``: SIGKILL to the runner and all below it;
- ``stage``: SIGKILL to the stage alone, as the kernel does when memory is out;
- ``term``: SIGTERM to all, SIGKILL ten seconds later, as a cluster does;
- ``cut``: ``kill``, and the file that was written last loses its second half, as in a power cut.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from ruamel.yaml import YAML
from workspace import make_workspace, run

RUNNERS = {"dvc": ["dvc", "repro"], "snakemake": ["snakemake", "--cores", "2", "--keep-going"]}
FAULTS = ("kill", "stage", "term", "cut")
OUTPUTS = ("artifacts", "results")
GRACE = 10.0  # seconds between SIGTERM and SIGKILL
ENVIRONMENT = os.environ | {"FOLORA_SAVE_SECONDS": "0"}  # save unfinished work at every opportunity


@dataclass
class Outcome:
    """What became of one fault."""

    fault: str
    runner: str
    stage: str
    after: float
    hit: bool
    problems: list[str]


def main() -> None:
    """Break as often as asked; the exit code says whether anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the outcomes as JSON lines")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = break_stages(Path(folder), options.count, options.seed, options.output)
    hits = sum(outcome.hit for outcome in outcomes)
    broken = [outcome for outcome in outcomes if outcome.problems]
    print(f"{len(outcomes)} faults, {hits} of them in a running stage; something was lost or wrong after {len(broken)}")
    sys.exit(bool(broken))


def break_stages(folder: Path, count: int, seed: int, output: Path | None = None) -> list[Outcome]:
    """Make a finished workspace, and break a copy of it so often."""
    whole = make_workspace(folder / "whole")
    run(whole, "dvc", "config", "cache.type", "copy")
    run(whole, "dvc", "repro")
    shutil.rmtree(whole / ".dvc" / "cache")  # else DVC would take the outputs from there
    expected = digests(whole)
    stages = YAML(typ="safe", pure=True).load(whole / "dvc.lock")["stages"]
    chance = random.Random(seed)
    outcomes = []
    seconds: dict[tuple[str, str], float] = {}
    for number in range(count):
        fault, runner = FAULTS[number % len(FAULTS)], chance.choice(list(RUNNERS))
        stage = chance.choice(list(stages))
        workspace = Path(shutil.copytree(whole, folder / str(number), symlinks=True))
        if (stage, runner) not in seconds:
            undo(workspace, stage)
            begun = time.monotonic()
            run_again(workspace, runner)
            seconds[stage, runner] = time.monotonic() - begun
        undo(workspace, stage)
        after = chance.uniform(0, seconds[stage, runner])
        hit = strike(workspace, RUNNERS[runner], fault, after)
        problems = run_again(workspace, runner)
        problems += differences(expected, digests(workspace)) + remains(workspace)
        outcomes.append(Outcome(fault, runner, stage, round(after, 2), hit, problems))
        print(json.dumps(asdict(outcomes[-1])), flush=True)
        if output:
            with output.open("a") as file:
                file.write(json.dumps(asdict(outcomes[-1])) + "\n")
        shutil.rmtree(workspace)
    return outcomes


def undo(workspace: Path, stage: str) -> None:
    """Make a stage one that has not run."""
    yaml = YAML()
    lock = yaml.load(workspace / "dvc.lock")
    for out in lock["stages"].pop(stage)["outs"]:
        path = workspace / out["path"]
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    yaml.dump(lock, workspace / "dvc.lock")
    shutil.rmtree(workspace / ".dvc" / "cache", ignore_errors=True)


def strike(workspace: Path, command: list[str], fault: str, after: float) -> bool:
    """Start a runner and break it after some seconds; returns whether a stage was running then."""
    begun = time.time()
    with subprocess.Popen(
        command, cwd=workspace, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as runner:
        with suppress(subprocess.TimeoutExpired):
            runner.wait(after)
        processes = []
        with suppress(psutil.NoSuchProcess):  # it has ended already
            processes = [psutil.Process(runner.pid), *psutil.Process(runner.pid).children(recursive=True)]
        stages = [process for process in processes if is_stage(process)]
        for process in stages if fault == "stage" else processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM if fault == "term" else signal.SIGKILL)
        if fault == "term":
            _, alive = psutil.wait_procs(processes, GRACE)
            for process in alive:
                process.kill()
        runner.wait()
    if fault == "cut":
        cut_last_file(workspace, begun)
    return bool(stages)


def is_stage(process: psutil.Process) -> bool:
    """Whether a process is a command of ours, not a runner or a shell."""
    with suppress(psutil.NoSuchProcess):
        return any(Path(word).name == "folora" for word in process.cmdline()[:2])
    return False


def cut_last_file(workspace: Path, begun: float) -> None:
    """Take the second half off the artefact or unfinished work that was written last."""
    roots = [workspace / name for name in (*OUTPUTS, ".folora/scratch")]
    files = [path for root in roots for path in root.rglob("*") if path.is_file() and path.stat().st_mtime >= begun]
    if files:
        last = max(files, key=lambda path: path.stat().st_mtime_ns)
        os.truncate(last, last.stat().st_size // 2)


def run_again(workspace: Path, runner: str) -> list[str]:
    """The same command once more; returns what it complains of."""
    result = subprocess.run(
        RUNNERS[runner], cwd=workspace, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    return [] if result.returncode == 0 else [f"exit code {result.returncode}: {result.stderr[-2000:]}"]


def digests(workspace: Path) -> dict[str, str]:
    """SHA-256 of every output, by path; without the marks that Snakemake leaves in folders."""
    found = (path for name in OUTPUTS for path in sorted((workspace / name).rglob("*")))
    files = (path for path in found if path.is_file() and path.name != ".snakemake_timestamp")
    return {str(path.relative_to(workspace)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Outputs that are missing, new or of other content."""
    return [
        f"differs: {name}" for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)
    ]


def remains(workspace: Path) -> list[str]:
    """Unfinished work that nothing will take up."""
    scratch = (workspace / ".folora" / "scratch").glob("*")
    return [f"left behind: {path.relative_to(workspace)}" for path in scratch]


if __name__ == "__main__":
    main()
