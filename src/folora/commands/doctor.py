"""Whether this machine and folder are fit to run the project, line by line, with what to do where they are not."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from folora.commands.locks import stale_locks
from folora.errors import FoLoRAError
from folora.git import git
from folora.params import load_params
from folora.presets import preset_of

OK, WARNING, PROBLEM = "ok", "warning", "problem"
LEAST_SPACE, ENOUGH_SPACE = 1.0, 5.0  # GB
NETWORK_FILE_SYSTEMS = {
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "afpfs", "9p", "ceph", "lustre", "gpfs", "beegfs", "glusterfs"),
    *("fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.glusterfs"),
}


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is (ok, warning or problem), what was seen and what to do."""

    what: str
    level: str
    seen: str
    advice: str = ""


def examine(params_file: Path) -> list[Finding]:
    """Look at everything; nothing is changed."""
    return [
        python(),
        *packages(),
        *commands(),
        repository(),
        parameters(params_file),
        *rows(params_file),
        threads(params_file),
        accelerator(),
        disk(shutil.disk_usage(Path.cwd()).free / 1e9),
        file_system(_type_of_file_system(Path.cwd())),
        *locks(),
        *generated_code(params_file),
        *vllm_backend(params_file),
    ]


def python() -> Finding:
    """The interpreter against the range of pyproject.toml."""
    version, wanted = platform.python_version(), metadata.metadata("folora")["Requires-Python"]
    if version in SpecifierSet(wanted):
        return Finding("python", OK, version)
    return Finding("python", PROBLEM, version, f"make an environment with Python {wanted}")


def packages() -> list[Finding]:
    """Installed versions against the ranges of pyproject.toml; one line if all are right."""
    requirements = [Requirement(text) for text in metadata.requires("folora") or []]
    needed = [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = []
    for requirement in needed:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = "not installed"
        if version == "not installed" or not requirement.specifier.contains(version, prereleases=True):
            advice = f"pip install '{requirement.name}{requirement.specifier}'"
            wrong.append(Finding(requirement.name, PROBLEM, version, advice))
    shown = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft", "dvc", "mlflow"))
    return wrong or [Finding("packages", OK, f"{len(needed)} within their ranges: {shown}")]


def commands() -> list[Finding]:
    """The programs that the runners start, and that ``folora`` is this environment's."""
    findings = []
    advice = {"git": "install git", "dvc": "enter the environment: . .venv/bin/activate"}
    for name in advice:
        path = shutil.which(name)
        findings.append(Finding(name, OK, path) if path else Finding(name, PROBLEM, "not found", advice[name]))
    own, found = Path(sys.prefix, "bin", "folora"), shutil.which("folora")
    if found is None or Path(found).resolve() != own.resolve():
        seen = f"the command is {found or 'not found'}, this is {own}"
        findings.append(Finding("folora", PROBLEM, seen, "enter the environment: . .venv/bin/activate"))
    return findings


def repository() -> Finding:
    """Whether git and DVC keep books here."""
    if not Path("dvc.yaml").exists():
        return Finding("folder", PROBLEM, "no dvc.yaml here", "go to the folder of the clone")
    if not Path(".dvc").is_dir():
        return Finding("folder", PROBLEM, "no DVC repository", "dvc init (in a copy without git: dvc init --no-scm)")
    if git("rev-parse", "HEAD") is None:
        return Finding("folder", WARNING, "no git commit, so runs name none", "git init && git add . && git commit")
    return Finding("folder", OK, "a git and DVC repository")


def parameters(path: Path) -> Finding:
    """Whether params.yaml is valid, and which preset it is."""
    try:
        params = load_params(path)
    except FoLoRAError as error:
        return Finding("parameters", PROBLEM, str(error), "mend the key that is named, or: folora use default")
    return Finding("parameters", OK, f"{path}: preset {preset_of(params)}, {len(params.runs)} runs")


def rows(path: Path) -> list[Finding]:
    """Whether the first rows of the tasks whose data are here are as the parameters say."""
    from folora.commands.first_rows import check_tasks

    try:
        params = load_params(path)
    except FoLoRAError:
        return []  # what is wrong with them stands in another line
    try:
        here = check_tasks(params)
    except FoLoRAError as error:
        return [Finding("rows", PROBLEM, str(error))]
    later = len(params.tasks) - len(here)
    seen = f"of {', '.join(here) or 'no task'}: as declared" + (f"; {later} come with a stage" if later else "")
    return [Finding("rows", OK, seen)]


def threads(path: Path) -> Finding:
    """Torch threads of the stages against the cores there are."""
    import torch

    cores = os.cpu_count() or 1
    seen = f"{cores} cores, torch would take {torch.get_num_threads()}"
    try:
        most = max(load_params(path).threads.model_dump().values())
    except FoLoRAError:
        return Finding("threads", OK, seen)
    if most > cores:
        return Finding("threads", WARNING, f"{seen}, a stage asks for {most}", f"set threads.* to {cores} or less")
    return Finding("threads", OK, f"{seen}, a stage asks for {most} at most")


def accelerator() -> Finding:
    """The GPU that training would use."""
    import torch

    if torch.cuda.is_available():
        return Finding("gpu", OK, torch.cuda.get_device_name())
    return Finding("gpu", OK, "none: everything runs on the CPU, which the presets are made for")


def disk(free: float) -> Finding:
    """Free space of this folder, in GB."""
    seen, advice = f"{free:.1f} GB free", "free space: folora clean, dvc gc --workspace"
    if free < LEAST_SPACE:
        return Finding("disk", PROBLEM, seen, advice)
    return Finding("disk", WARNING, seen, advice) if free < ENOUGH_SPACE else Finding("disk", OK, seen)


def file_system(kind: str) -> Finding:
    """Whether locks and SQLite can be relied on here."""
    if kind not in NETWORK_FILE_SYSTEMS:
        return Finding("file system", OK, kind)
    advice = "work on a local disk, or name an MLflow server: export MLFLOW_TRACKING_URI=http://HOST:PORT"
    return Finding("file system", WARNING, f"{kind}, over a network: locks and mlflow.db may break", advice)


def locks() -> list[Finding]:
    """What a killed runner left."""
    stale = stale_locks()
    found = [
        Finding("locks", WARNING, f"{path}: of a process that has ended", advice) for path, advice in stale.items()
    ]
    return found or [Finding("locks", OK, "none is stale")]


def generated_code(path: Path) -> list[Finding]:
    """Whether the sandbox can be made, where the parameters ask for it."""
    from folora.sandbox import check_sandbox, describe_sandbox

    try:
        wanted = load_params(path).evaluation.run_generated_code
    except FoLoRAError:
        wanted = False  # what is wrong with them stands in another line
    if not wanted:
        return []
    try:
        check_sandbox()
    except FoLoRAError as error:
        return [Finding("sandbox", PROBLEM, str(error), "or set it to false")]
    return [Finding("sandbox", OK, describe_sandbox()["sandbox"])]


def vllm_backend(path: Path) -> list[Finding]:
    """Whether vLLM is installed, where the parameters ask for it."""
    try:
        sources = load_params(path).proxy.sources.items()
    except FoLoRAError:
        sources = {}.items()  # what is wrong with them stands in another line
    asking = [name for name, source in sources if getattr(source, "backend", None) == "vllm"]
    if not asking:
        return []
    seen = f"asked for by proxy.sources.{asking[0]}.backend"
    if find_spec("vllm"):
        return [Finding("vllm", OK, seen)]
    return [Finding("vllm", WARNING, f"{seen}, not installed here", "run that stage where it is: docs/guide.md")]


def _type_of_file_system(folder: Path) -> str:
    """Type of the file system that holds a folder: that of the longest mount point above it."""
    above = {str(parent) for parent in (folder.resolve(), *folder.resolve().parents)}
    mounts = [mount for mount in psutil.disk_partitions(all=True) if mount.mountpoint in above]
    return max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else "unknown"
