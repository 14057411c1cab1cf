"""Break stages at random moments, run the same command again, and compare every output with an undisturbed run's.

    python tests/faults.py --count 100 --seed 0

Each fault has a workspace of its own, a copy of a finished tiny run in which one stage is to do. Faults:

- ``kill``: SIGKILL to the runner and all below it;
- ``stage``: SIGKILL to the stage alone, as the kernel does when memory is out;
- ``term``: SIGTERM to all, SIGKILL ten seconds later, as a cluster does;
- ``cut``: ``kill``, and the file that was written last loses its second half, as in a power cut;
- ``clock``: ``kill``, and all that was written lies a day in the future, as when the clock is set back;
- ``full``: the stage can write no file longer than a kilobyte: a limit that any user may set, in place of a full disk
  (which ``tests/test_cli.py`` has, where mounting is permitted);
- ``readonly``: nothing can be made beside the outputs or in the scratch folder; for root, whom permissions do not stop,
  they are made immutable, and where that is not possible ``full`` takes its place.

After the last two the stage must say in one line which path cannot be written.
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

from folora.costs import LEDGER, read_costs

RUNNERS = {"dvc": ["dvc", "repro"], "snakemake": ["snakemake", "--cores", "2", "--keep-going"]}
BREAKS, REFUSALS = ("kill", "stage", "term", "cut", "clock"), ("full", "readonly")
FAULTS = (*BREAKS, *REFUSALS)
OUTPUTS = ("artifacts", "results")
SCRATCH = ".folora/scratch"
GRACE = 10.0  # seconds between SIGTERM and SIGKILL
DAY = 86400.0
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


def break_stages(
    folder: Path, count: int, seed: int, output: Path | None = None, whole: Path | None = None
) -> list[Outcome]:
    """Make a finished workspace if there is none yet (``whole``), and break a copy of it so often."""
    if whole is None:
        whole = make_workspace(folder / "whole")
        run(whole, "dvc", "repro")
    expected = digests(whole)
    stages = YAML(typ="safe", pure=True).load(whole / "dvc.lock")["stages"]
    costs = read_costs(whole / LEDGER)
    chance = random.Random(seed)
    outcomes = []
    for number in range(count):
        fault, runner = FAULTS[number % len(FAULTS)], chance.choice(list(RUNNERS))
        if fault == "readonly" and not can_be_locked(folder / "probe"):
            fault = "full"
        stage = chance.choice(list(stages))
        outputs = [out["path"] for out in stages[stage]["outs"]]
        after = chance.uniform(0, next(costs[path].wall for path in outputs if path in costs))
        workspace = Path(shutil.copytree(whole, folder / str(number), symlinks=True))
        undo(workspace, stage)
        if fault in REFUSALS:
            problems = refuse(workspace, runner, fault, outputs)
            hit, after = not problems, 0.0
        else:
            hit, problems = strike(workspace, RUNNERS[runner], fault, after), []
        problems += run_again(workspace, runner)
        problems += differences(expected, digests(workspace)) + remains(workspace)
        outcomes.append(Outcome(fault, runner, stage, round(after, 2), hit, problems))
        print(json.dumps(asdict(outcomes[-1])), flush=True)
        if output:
            with output.open("a") as file:
                file.write(json.dumps(asdict(outcomes[-1])) + "\n")
        shutil.rmtree(workspace)
    return outcomes


def undo(workspace: Path, stage: str) -> None:
    """Make a stage one that has not run, and whose outputs DVC does not know."""
    yaml = YAML()
    lock = yaml.load(workspace / "dvc.lock")
    for out in lock["stages"].pop(stage)["outs"]:
        path = workspace / out["path"]
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    yaml.dump(lock, workspace / "dvc.lock")
    shutil.rmtree(workspace / ".dvc" / "cache" / "runs", ignore_errors=True)


def strike(workspace: Path, command: list[str], fault: str, after: float) -> bool:
    """Start a runner and break it some seconds after its first stage began; returns whether a stage ran then."""
    begun = time.time()
    with subprocess.Popen(
        command, cwd=workspace, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as runner:
        while runner.poll() is None and not any(map(is_stage, below(runner.pid))):
            time.sleep(0.05)
        with suppress(subprocess.TimeoutExpired):
            runner.wait(after)
        processes = below(runner.pid)
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
    if fault == "clock":
        set_clock_back(workspace)
    return bool(stages)


def below(pid: int) -> list[psutil.Process]:
    """A process and all that it started, as far as they have not ended."""
    with suppress(psutil.NoSuchProcess):
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return []


def is_stage(process: psutil.Process) -> bool:
    """Whether a process is a command of ours, not a runner or a shell."""
    with suppress(psutil.NoSuchProcess):
        return any(Path(word).name == "folora" for word in process.cmdline()[:2])
    return False


def cut_last_file(workspace: Path, begun: float) -> None:
    """Take the second half off the artefact or unfinished work that was written last."""
    files = [path for path in written(workspace) if path.is_file() and path.stat().st_mtime >= begun]
    if files:
        last = max(files, key=lambda path: path.stat().st_mtime_ns)
        os.truncate(last, last.stat().st_size // 2)


def set_clock_back(workspace: Path) -> None:
    """By a day, as far as what was written can tell."""
    for path in written(workspace):
        then = path.stat().st_mtime + DAY
        os.utime(path, (then, then))


def written(workspace: Path) -> list[Path]:
    """Artefacts and unfinished work, files and folders."""
    return [path for name in (*OUTPUTS, SCRATCH) for path in (workspace / name).rglob("*")]


def refuse(workspace: Path, runner: str, fault: str, outputs: list[str]) -> list[str]:
    """Run where a stage cannot write; returns what is wrong with how it fails."""
    (workspace / SCRATCH).mkdir(parents=True, exist_ok=True)
    folders = [*{(workspace / output).parent for output in outputs}, workspace / SCRATCH]
    path = f"{limited(workspace)}:{os.environ['PATH']}" if fault == "full" else os.environ["PATH"]
    try:
        if fault == "readonly":
            for folder in folders:
                set_writable(folder, writable=False)
        done = subprocess.run(
            RUNNERS[runner],
            cwd=workspace,
            env=ENVIRONMENT | {"PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        if fault == "readonly":
            for folder in folders:
                set_writable(folder, writable=True)
    # under Snakemake a stage speaks in its log; Snakemake's own traceback, where it cannot tidy up, is not ours
    said = [path.read_text() for path in (workspace / "logs").glob("*.log")] or [done.stdout, done.stderr]
    lines = [line for text in said for line in text.splitlines() if line.startswith("folora: ")]
    problems = [] if done.returncode else ["it did not fail"]
    if not any(": cannot be written (" in line for line in lines):
        problems.append(f"no place is named: {lines}")
    return problems + ["a traceback"] * any("Traceback" in text for text in said)


def limited(workspace: Path) -> Path:
    """A folder with a ``folora`` that can write no file longer than a kilobyte."""
    folder = workspace / ".folora" / "limited"
    folder.mkdir()
    script = folder / "folora"
    script.write_text(f'#!/bin/sh\nulimit -f 2\nexec {shutil.which("folora")} "$@"\n')
    script.chmod(0o755)
    return folder


def can_be_locked(probe: Path) -> bool:
    """Whether a new folder can be made one in which nothing can be made."""
    probe.mkdir(exist_ok=True)
    with suppress(OSError, subprocess.CalledProcessError):
        set_writable(probe, writable=False)
        set_writable(probe, writable=True)
        return True
    return False


def set_writable(folder: Path, *, writable: bool) -> None:
    """Let something be made in a folder, or not; permissions are nothing to root."""
    if os.geteuid() == 0:
        subprocess.run(["chattr", "-i" if writable else "+i", folder], check=True)
    else:
        folder.chmod(0o755 if writable else 0o555)


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
    scratch = (workspace / SCRATCH).glob("*")
    return [f"left behind: {path.relative_to(workspace)}" for path in scratch]


if __name__ == "__main__":
    main()
