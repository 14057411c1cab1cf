"""How long both runners take to see that nothing is to do, and how that grows with the number of stages.

The stages have run as far as DVC knows: their outputs are small files that it was told to take for results.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from contextlib import chdir
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from bench import Row, alternate, main
from ruamel.yaml import YAML

from folora.dag import is_folder, record_stages, resolve_stages

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
FILES = ("Snakefile", "dvc.yaml", "params.yaml", "profiles", "workflow", "src", ".dvcignore", ".gitignore")
RUNNERS = {"dvc repro": ["dvc", "repro"], "snakemake -n": ["snakemake", "-n", "--quiet"]}
MANY = 988  # runs: 1,000 stages
BOUNDS = {"dvc repro": 5.0, "snakemake -n": 8.0}  # seconds, on the default preset


def rows(size: str, repeats: int) -> Iterator[Row]:
    """Time a second run of workspaces with more and more runs."""
    seconds: dict[str, dict[int, list[float]]] = {name: {} for name in RUNNERS}
    for count in (None, 10, 100, MANY) if size == "full" else (None,):
        with tempfile.TemporaryDirectory() as folder:
            workspace = Path(folder) / "workspace"
            stages = make_workspace(workspace, count)
            for name, command in RUNNERS.items():
                if count == MANY and name == "dvc repro":
                    continue  # it walks all of params.yaml for each of its keys: docs/performance.md
                times = alternate(repeats, partial(run, workspace, *command))[0]
                seconds[name][stages] = times
    for name, of_stages in seconds.items():
        (default, times), *grown = of_stages.items()
        bound = [BOUNDS[name]]
        yield Row(
            f"{name}, nothing to do", "seconds that were set", f"default preset, {default} stages", "within 1",
            median(times) <= bound[0], median(times) / bound[0], times, bound,
            "; ".join(f"{stages:,} stages: {median(more):.1f} s" for stages, more in grown),
        )  # fmt: skip


def make_workspace(workspace: Path, runs: int | None) -> int:
    """A workspace with so many runs (None: those of the default preset), all of them done; returns its stages."""
    fresh_workspace(workspace)
    yaml = YAML()
    params: dict[str, Any] = yaml.load(workspace / "params.yaml")
    if runs is not None:
        first = dict(next(iter(params["runs"].values())))
        others = {name: params["methods"].pop(name) for name in list(params["methods"]) if name != first["method"]}
        assert others, "the default preset compares methods"
        params["runs"] = {f"r{number}": first | {"seed": number} for number in range(runs)}
        params["report"]["reference"] = first["method"]
        yaml.dump(params, workspace / "params.yaml")
    with chdir(workspace):
        stages = resolve_stages(Path())
        for stage in stages.values():
            for name in stage.outputs:
                write(Path(name) / "made" if is_folder(name) else Path(name))
        for task in params["tasks"].values():
            write(Path(task["dataset"]) / "made")
        record_stages(Path(), list(stages))  # `dvc commit` would write the whole lock file once for every stage
    return len(stages)


def fresh_workspace(workspace: Path) -> None:
    """What the runners need of a clone, in a repository of its own."""
    workspace.mkdir()
    for name in FILES:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, workspace / name)
    run(workspace, "git", "init", "--quiet")
    run(workspace, "dvc", "init", "--quiet")


def write(path: Path) -> None:
    """Write a small file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("made")


def run(workspace: Path, *command: str) -> None:
    """Run a command that must succeed."""
    result = subprocess.run(command, cwd=workspace, check=False, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}: {result.stdout}{result.stderr}"


if __name__ == "__main__":
    main(rows)
