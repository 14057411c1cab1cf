"""``requirements.lock`` against the ranges of ``pyproject.toml``, and the image that is built from it."""

from __future__ import annotations

import re
import subprocess
import tomllib

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK = (ROOT / "requirements.lock").read_text()
PINS = [Requirement(line.rstrip(" \\")) for line in LOCK.splitlines() if re.match(r"\w", line)]
BUILD_OF_TORCH = re.compile(r"torch|triton|nvidia-.*|cuda-.*")


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(text) for one in lists for text in one if not text.startswith("folora")]


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_the_lock_has_one_version_in_range_of_everything_but_torch(python: str) -> None:
    pins = [pin for pin in PINS if pin.marker is None or pin.marker.evaluate({"python_full_version": f"{python}.0"})]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(versions) == len(pins)
    for requirement in requirements():
        if requirement.name != "torch":
            version = versions.get(canonicalize_name(requirement.name))
            assert version is not None, requirement
            assert requirement.specifier.contains(version, prereleases=True), requirement


def test_it_leaves_the_build_of_torch_to_the_machine() -> None:
    assert [pin.name for pin in PINS if BUILD_OF_TORCH.fullmatch(pin.name)] == []


def test_every_version_has_hashes_and_no_address() -> None:
    pinned = re.findall(r"^\w[^\n]*==[^\n]*\\\n(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+", LOCK, re.MULTILINE)
    assert len(pinned) == len(PINS)
    assert "://" not in LOCK


def test_the_image_installs_the_lock_and_files_that_are_here() -> None:
    text = (ROOT / "Containerfile").read_text().replace("\\\n", "")
    copied = [name for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for name in line.split()[:-1]]
    assert {"requirements.lock", "pyproject.toml", "src"} <= set(copied)
    assert [name for name in copied if not (ROOT / name).exists()] == []
    (installs,) = re.findall(r"^RUN (pip .*)$", text, re.MULTILINE)
    torch, locked, project, checked = re.split(r" +&& +", installs)
    assert locked == "pip install --no-cache-dir --no-deps --require-hashes --requirement requirements.lock"
    assert project == "pip install --no-cache-dir --no-deps ."
    assert checked == "pip check"
    (command,) = re.findall(r'"\$\((.*)\)"', torch)
    said = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert Requirement(said) == next(one for one in requirements() if one.name == "torch")
