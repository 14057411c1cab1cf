"""What may go: results that params.yaml no longer names, logs, and what killed processes left half written."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from folora.commands import EVALUATIONS, RUNS
from folora.commands.locks import busy
from folora.errors import FoLoRAError
from folora.records import JOURNALS, journal_path
from folora.scratch import SCRATCH
from folora.selection import BASE
from folora.storage import MANIFEST_FILE, abandoned, identity_of, read_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from folora.params import Params

WRITTEN = (Path("artifacts"), Path("results"))  # where stages write
SNAKEMAKE = Path(".snakemake")
SNAKEMAKE_BOOKS = ("metadata", "incomplete", "log", "stale")  # made again; environments stay


@dataclass(frozen=True)
class Leftover:
    """A file or folder that may go, why, and its size in bytes."""

    path: Path
    reason: str
    size: int


def find_leftovers(params: Params) -> list[Leftover]:
    """What may go in the working folder, in the order of the paths."""
    found = dict([*_partial(), *_scratch(), *_unnamed(params), *_books(), *_journals(params)])
    outermost = [path for path in sorted(found) if not found.keys() & set(path.parents)]
    return [Leftover(path, found[path], _size(path)) for path in outermost]


def stages_that_read(leftovers: list[Leftover]) -> list[str]:
    """Evaluations that run again without these folders: they read the folder of all runs of their method."""
    return sorted({f"evaluate@{left.path.parent.name}" for left in leftovers if left.path.parent.parent == RUNS})


def remove(leftovers: list[Leftover]) -> None:
    """Delete them.

    Raises:
        FoLoRAError: a runner is at work here, or something cannot be deleted.
    """
    if busy():
        raise FoLoRAError("dvc or snakemake is at work in this folder: wait until it ends, or stop it")
    try:
        for left in leftovers:
            if left.path.is_dir():
                shutil.rmtree(left.path)
            else:
                left.path.unlink(missing_ok=True)
    except OSError as error:
        raise FoLoRAError(f"{left.path}: cannot be deleted ({error.strerror}): see who owns it") from error


def _unnamed(params: Params) -> Iterator[tuple[Path, str]]:
    for folder in _visible(RUNS):
        if folder.name not in params.methods:
            yield folder, "no method of params.yaml"
            continue
        named = params.runs_of(folder.name)
        yield from ((run, "no run of params.yaml") for run in _visible(folder) if run.name not in named)
    for folder in _visible(EVALUATIONS):
        if folder.name not in {BASE, *params.methods}:
            yield folder, "no method of params.yaml"


def _partial() -> Iterator[tuple[Path, str]]:
    for root in WRITTEN:
        for path in root.rglob(".*.partial"):
            if abandoned(path):
                yield path, "half written by a process that has ended"


def _scratch() -> Iterator[tuple[Path, str]]:
    yield from ((path, "unfinished: the same stage would go on from it") for path in SCRATCH.glob("*"))


def _books() -> Iterator[tuple[Path, str]]:
    yield from (
        (SNAKEMAKE / name, "Snakemake makes it again") for name in SNAKEMAKE_BOOKS if (SNAKEMAKE / name).exists()
    )
    if Path("logs").exists():
        yield Path("logs"), "logs of past runs"


def _journals(params: Params) -> Iterator[tuple[Path, str]]:
    manifests = [RUNS / run.method / name / MANIFEST_FILE for name, run in params.runs.items()]
    kept = {journal_path(identity_of(read_json(manifest))) for manifest in manifests if manifest.exists()}
    yield from ((path, "journal of a run that is gone") for path in JOURNALS.glob("*.jsonl") if path not in kept)


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if not path.name.startswith(".")]


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
