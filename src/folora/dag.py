"""The stage graph of ``dvc.yaml`` and what is stale in it, as plain values, for the Snakefile and ``folora why``.

This is the one file that uses DVC's undocumented index; ``pyproject.toml`` pins the version it was tried with.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from dvc.dependency import ParamsDependency
from dvc.dependency import param as dvc_params
from dvc.exceptions import DvcException
from dvc.repo import Repo, lock_repo
from ruamel.yaml import YAML

from folora.errors import FoLoRAError
from folora.params import flatten
from folora.spread import gpu_count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True)
class Change:
    """Something that makes a stage stale.

    Attributes:
        kind: ``dependency``, ``parameter``, ``output``, ``command``, or ``stage`` for one that has not run yet.
        name: path, dotted key of params.yaml, or the command.
        state: ``modified``, ``new`` or ``deleted``.
        before: of a parameter, the value at the last run; None for one that is new.
        after: of a parameter, the value in params.yaml; None for one that is gone.
    """

    kind: str
    name: str
    state: str
    before: Any = None
    after: Any = None


@dataclass(frozen=True)
class Stage:
    """A resolved DVC stage.

    Attributes:
        name: DVC's address, such as ``train@folora-1e-2-s0``.
        command: the shell command.
        inputs: outputs of other stages that it reads.
        sources: files that no stage makes (code, data).
        reads: the paths that ``dvc.yaml`` gives for both; a folder stands for all that lies in it.
        outputs: what it writes; a path without a suffix is a folder.
        threads: cores it occupies.
        mem_mb: memory it may need.
        runtime: minutes that a cluster should give it.
        gpus: GPUs that it runs on; none where the model is loaded on the CPU.
    """

    name: str
    command: str
    inputs: tuple[str, ...]
    sources: tuple[str, ...]
    reads: tuple[str, ...]
    outputs: tuple[str, ...]
    threads: int
    mem_mb: int
    runtime: int
    gpus: int

    @property
    def rule(self) -> str:
        """The stage's name as a Snakemake rule name, an identifier."""
        return "".join(character if character.isalnum() else "_" for character in self.name)


def is_folder(output: str) -> bool:
    """Whether an output is a folder: by the layout's convention, one whose name has no suffix."""
    return not PurePosixPath(output).suffix


def resolve_stages(root: Path) -> dict[str, Stage]:
    """All stages of ``dvc.yaml``, by name, with their ``foreach`` and parameters resolved.

    Raises:
        FoLoRAError: no DVC repository, or ``dvc.yaml`` does not resolve.
    """
    with _repository(root) as repo:
        try:
            stages = [stage for stage in repo.index.stages if stage.is_data_source is False and stage.cmd]
        except DvcException as error:
            raise FoLoRAError(f"{root / 'dvc.yaml'}: {error}") from error
        outputs = {stage.addressing: tuple(out.def_path for out in stage.outs) for stage in stages}
        overlapping = _overlaps([output for paths in outputs.values() for output in paths])
        device = _device(root / "params.yaml")
        gpus = {"spread": gpu_count(device), 1: min(1, gpu_count(device)), None: 0}
        resolved = {}
        for stage in stages:
            paths = [dep.def_path for dep in stage.deps if not isinstance(dep, ParamsDependency)]
            inputs = {path: overlapping(path) for path in paths}
            resolved[stage.addressing] = Stage(
                name=stage.addressing,
                command=stage.cmd,
                inputs=tuple(dict.fromkeys(output for found in inputs.values() for output in found)),
                sources=tuple(path for path, found in inputs.items() if not found),
                reads=tuple(paths),
                outputs=outputs[stage.addressing],
                threads=int(stage.meta["threads"]),
                mem_mb=int(stage.meta["mem_mb"]),
                runtime=int(stage.meta["runtime"]),
                gpus=gpus[stage.meta.get("gpus")],
            )
        return resolved


def output_patterns(root: Path) -> list[str]:
    """What ``dvc.yaml`` says that stages write, with * for each value of a parameter."""
    stages = YAML(typ="safe").load(root / "dvc.yaml")["stages"].values()
    outputs = [output for stage in stages for output in stage.get("do", stage)["outs"]]
    paths = [next(iter(output)) if isinstance(output, dict) else output for output in outputs]  # one with options
    return [re.sub(r"\$\{[^}]*\}", "*", path) for path in paths]


def stale_stages(root: Path) -> set[str]:
    """Names of the stages that ``dvc status`` reports: something they depend on, or an output, has changed.

    A stage below a stale one is not reported until that one has run.
    """
    return set(stale_changes(root))


def stale_changes(root: Path) -> dict[str, list[Change]]:
    """What has changed for each stage that ``stale_stages`` names."""
    with _repository(root) as repo:
        try:
            stages = {stage.addressing: stage for stage in repo.index.stages}
            return {name: _changes(stages[name], entries) for name, entries in repo.status().items()}
        except DvcException as error:
            raise FoLoRAError(f"{root}: dvc status failed: {error}") from error


def _changes(stage: Any, entries: list[Any]) -> list[Change]:
    """The entries of ``dvc status`` for one stage."""
    if not any(file.hash_info for file in (*stage.deps, *stage.outs)):
        return [Change("stage", stage.addressing, "new")]
    changes = [Change("command", stage.cmd, "modified") for entry in entries if isinstance(entry, str)]
    kinds = {"changed deps": "dependency", "changed outs": "output"}
    for key, found in ((key, found) for entry in entries if isinstance(entry, dict) for key, found in entry.items()):
        changes += [Change(kinds[key], path, state) for path, state in found.items() if isinstance(state, str)]
    for dep in stage.deps:
        if isinstance(dep, ParamsDependency) and dep.hash_info.value is not None:
            changes += _parameter_changes(dep.hash_info.value, dep.read_params())
    return changes


def _parameter_changes(recorded: dict[str, Any], current: dict[str, Any]) -> list[Change]:
    before, after = flatten(recorded), flatten(current)
    return [
        Change(
            "parameter",
            name,
            "new" if name not in before else "deleted" if name not in after else "modified",
            before.get(name),
            after.get(name),
        )
        for name in {**before, **after}
        if before.get(name) != after.get(name) or (name in before) != (name in after)
    ]


def output_hashes(root: Path) -> dict[str, dict[str, str | None]]:
    """Hash of every output as it lies here, by stage and path, as ``dvc.lock`` would have it; None if it is missing."""
    with _repository(root) as repo:
        return {
            stage.addressing: {out.def_path: out.get_hash().value if out.exists else None for out in stage.outs}
            for stage in repo.index.stages
        }


def record_stages(root: Path, names: list[str]) -> None:
    """Record stages that have just run, as ``dvc commit --force`` does for one, but reading and writing the lock once.

    Raises:
        FoLoRAError: an output or a dependency is missing, or there is no such stage.
    """
    with _repository(root, wait=True) as repo:
        try:
            with lock_repo(repo):
                stages = {stage.addressing: stage for stage in repo.index.stages}
                ran = [stages[name] for name in names]
                for stage in ran:
                    stage.save()
                    stage.commit(relink=False)
                ran[0].dvcfile.dump_stages(ran, update_pipeline=False)
        except (DvcException, KeyError) as error:
            raise FoLoRAError(f"{root}: cannot record {', '.join(names)}: {error}") from error


def below(stages: dict[str, Stage], names: set[str]) -> set[str]:
    """The named stages and every stage that reads what they make, directly or not."""
    found = set(names)
    while True:
        made = {output for name in found for output in stages[name].outputs}
        grown = found | {name for name, stage in stages.items() if made.intersection(stage.inputs)}
        if grown == found:
            return found
        found = grown


def _device(params: Path) -> str:
    """Where the parameters load the model; the offline foundation knows the CPU only."""
    return str(flatten(YAML(typ="safe").load(params)).get("foundation.loading.device", "cpu"))


def _overlaps(outputs: list[str]) -> Callable[[str], list[str]]:
    """Finds the outputs that a path is, lies inside, or holds; looked up, since a graph has thousands of such paths."""
    made: dict[PurePosixPath, str] = {}
    held: dict[PurePosixPath, list[str]] = {}
    for output in outputs:
        path = PurePosixPath(output)
        made[path] = output
        for folder in path.parents:
            held.setdefault(folder, []).append(output)

    def find(dependency: str) -> list[str]:
        path = PurePosixPath(dependency)
        return [made[place] for place in (path, *path.parents) if place in made] + held.get(path, [])

    return find


@contextmanager
def _params_read_once() -> Iterator[None]:
    """Have DVC parse a parameter file once in the block.

    It does so once for every stage, and walks all of the file for every key: the square of the number of stages.
    """
    original = dvc_params.read_param_file
    parsed: dict[str, Any] = {}

    def read(fs: Any, path: str, key_paths: list[str] | None = None, flatten: bool = False, **options: Any) -> Any:
        if not key_paths or not flatten:
            return original(fs, path, key_paths, flatten, **options)
        if path not in parsed:
            parsed[path] = original(fs, path, None, **options)
        try:
            return {key: deepcopy(reduce(getitem, key.split("."), parsed[path])) for key in key_paths}
        except (KeyError, TypeError):  # a key that is missing, or a pattern
            return original(fs, path, key_paths, flatten, **options)

    dvc_params.read_param_file = read
    try:
        yield
    finally:
        dvc_params.read_param_file = original


@contextmanager
def _repository(root: Path, *, wait: bool = False) -> Iterator[Repo]:
    """The repository; with ``wait`` another process may hold its lock for a while."""
    try:
        repo = Repo(str(root), _wait_for_lock=wait)
    except DvcException as error:
        reason = str(error)
        raise FoLoRAError(
            f"{root}: {reason} (in a copy without git: `git init`, or `dvc config core.no_scm true`)"
        ) from error
    with repo, _params_read_once():
        yield repo
