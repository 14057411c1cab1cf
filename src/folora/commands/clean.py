"""What may go: results that params.yaml no longer names, logs, and what killed processes left half written."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from folora.commands import RUNS
from folora.commands.locks import busy
from folora.dag import is_folder, output_patterns
from folora.errors import FoLoRAError
from folora.hold import at_work
from folora.records import JOURNALS, journal_path
from folora.scratch import SCRATCH
from folora.storage import MANIFEST_FILE, abandoned, identity_of, read_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from folora.dag import Stage
    from folora.params import Params

WRITTEN = (Path("artifacts"), Path("results"))  # where stages write
GITIGNORE = ".gitignore"  # DVC's, beside every output
SNAKEMAKE = Path(".snakemake")
SNAKEMAKE_BOOKS = ("metadata", "incomplete", "log", "stale")  # made again; environments stay


@dataclass(frozen=True)
class Leftover:
    """A file or folder that may go, why, and its size in bytes."""

    path: Path
    reason: str
    size: int


def find_leftovers(params: Params, stages: dict[str, Stage]) -> list[Leftover]:
    """What may go in the working folder, in the order of the paths; ``stages`` are all of its graph."""
    found = dict([*_partial(), *_scratch(), *_unnamed(stages), *_books(), *_journals(params)])
    outermost = [path for path in sorted(found) if not found.keys() & set(path.parents)]
    return [Leftover(path, found[path], _size(path)) for path in outermost]


def stages_that_read(leftovers: list[Leftover], stages: dict[str, Stage]) -> list[str]:
    """Stages that run again without these, since they read a folder that holds them; many of a kind by their number."""
    results = [left.path for left in leftovers if not left.path.name.startswith(".")]
    folders = {folder.as_posix() for path in results for folder in path.parents}
    kinds: dict[str, list[str]] = {}
    for name, stage in stages.items():
        if folders.intersection(stage.reads):
            kinds.setdefault(name.partition("@")[0], []).append(name)
    return [names[0] if len(names) == 1 else f"{len(names)} of {kind}" for kind, names in sorted(kinds.items())]


def remove(leftovers: list[Leftover]) -> None:
    """Delete them.

    Raises:
        FoLoRAError: a runner is at work here, or something cannot be deleted.
    """
    if busy():
        raise FoLoRAError("dvc or snakemake is at work in this folder: wait until it ends, or stop it")
    if holder := at_work():
        raise FoLoRAError(f"{holder} is at work in this folder: wait until it ends, or stop it")
    try:
        for left in leftovers:
            if left.path.is_dir():
                shutil.rmtree(left.path)
            else:
                left.path.unlink(missing_ok=True)
            _remove_empty(left.path.parent)
    except OSError as error:
        raise FoLoRAError(f"{left.path}: cannot be deleted ({error.strerror}): see who owns it") from error


def _unnamed(stages: dict[str, Stage]) -> Iterator[tuple[Path, str]]:
    """What looks like the output of a stage, by its place and its name, and is none of any, nor data that one reads."""
    named = {Path(output) for stage in stages.values() for output in stage.outputs}
    data = {Path(source) for stage in stages.values() for source in stage.sources}
    kept = {one for path in data for one in (path, *path.parents)}
    for pattern in output_patterns(Path()):
        for path in set(Path().glob(pattern)) - named - kept:
            hidden = any(part.startswith(".") for part in path.parts)
            if path.is_dir() == is_folder(pattern) and not hidden and data.isdisjoint(path.parents):
                yield path, "params.yaml no longer names it"


def _remove_empty(folder: Path) -> None:
    """Remove a folder, and those around it, if nothing is left in it."""
    while any(root in folder.parents for root in WRITTEN) and {path.name for path in folder.iterdir()} <= {GITIGNORE}:
        (folder / GITIGNORE).unlink(missing_ok=True)
        folder.rmdir()
        folder = folder.parent


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


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
