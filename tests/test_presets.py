from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from conftest import ROOT
from typer.testing import CliRunner

from folora.cli import app
from folora.errors import FoLoRAError
from folora.params import load_params
from folora.presets import preset_of, presets, use_preset

if TYPE_CHECKING:
    from pathlib import Path

NAMES = sorted(path.stem for path in (ROOT / "workflow" / "presets").glob("*.yaml"))


@pytest.fixture
def clone(in_tmp: Path) -> Path:
    """params.yaml, committed, and the presets."""
    shutil.copytree(ROOT / "workflow" / "presets", in_tmp / "workflow" / "presets")
    shutil.copy(ROOT / "params.yaml", in_tmp)
    identity = ("-c", "user.name=x", "-c", "user.email=x@y")
    for command in (["init", "--quiet"], ["add", "."], [*identity, "commit", "--quiet", "-m", "start"]):
        subprocess.run(["git", *command], check=True)
    return in_tmp


def test_every_preset_is_recognised(clone: Path) -> None:
    assert list(presets()) == ["default", *NAMES]
    for name in NAMES:
        assert preset_of(load_params(clone / "workflow" / "presets" / f"{name}.yaml")) == name
    params = load_params(clone / "params.yaml")
    assert preset_of(params) == "default"
    train = params.train.model_copy(update={"steps": 7})
    assert preset_of(params.model_copy(update={"train": train})) == "custom"


def test_back_and_forth(clone: Path) -> None:
    path = clone / "params.yaml"
    committed = path.read_text()
    for name in (*NAMES, "default"):
        use_preset(name, path)
        assert path.read_text() == presets()[name]
    assert path.read_text() == committed


def test_own_values_are_not_overwritten(clone: Path) -> None:
    path = clone / "params.yaml"
    own = path.read_text().replace("steps: 300", "steps: 7")
    path.write_text(own)
    with pytest.raises(FoLoRAError, match=r"params\.yaml: has changes .*: commit them, keep them .* or undo them"):
        use_preset("tiny", path)
    assert path.read_text() == own
    shutil.copy(path, clone / "workflow" / "presets" / "mine.yaml")
    use_preset("tiny", path)
    use_preset("mine", path)
    assert path.read_text() == own


def test_without_git_there_is_no_default(in_tmp: Path) -> None:
    shutil.copytree(ROOT / "workflow" / "presets", in_tmp / "workflow" / "presets")
    use_preset("tiny", in_tmp / "params.yaml")
    with pytest.raises(FoLoRAError, match=rf"^'default' is not a preset; there are {', '.join(NAMES)}$"):
        use_preset("default", in_tmp / "params.yaml")


def test_the_command(clone: Path) -> None:
    done = CliRunner().invoke(app, ["use", "tiny"])
    assert (done.exit_code, done.stdout) == (0, "params.yaml is now tiny: dvc repro runs what it needs\n")
    assert preset_of(load_params(clone / "params.yaml")) == "tiny"
