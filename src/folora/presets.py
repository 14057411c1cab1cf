"""Parameter files that come with the project: the committed params.yaml and those of workflow/presets."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from folora.errors import FoLoRAError
from folora.git import git
from folora.params import parse_params
from folora.storage import publish

if TYPE_CHECKING:
    from folora.params import Params

FOLDER = Path("workflow/presets")
DEFAULT = "default"  # the params.yaml of the last commit
CUSTOM = "custom"


def presets() -> dict[str, str]:
    """Text of every preset by name, the default first; without git or a commit there is no default."""
    committed = git("show", "HEAD:./params.yaml")
    default = {DEFAULT: committed} if committed else {}
    return default | {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.yaml"))}


def preset_of(params: Params) -> str:
    """The preset with these values, or ``custom``."""
    for name, text in presets().items():
        with suppress(FoLoRAError):
            if parse_params(text, name) == params:
                return name
    return CUSTOM


def use_preset(name: str, path: Path) -> None:
    """Make a preset the parameter file at ``path``.

    Raises:
        FoLoRAError: there is no such preset, or the file holds values of the user's own that git does not have.
    """
    known = presets()
    if name not in known:
        raise FoLoRAError(f"{name!r} is not a preset; there are {', '.join(known)}")
    if path.exists() and path.read_text() not in known.values():
        raise FoLoRAError(
            f"{path}: has changes that are neither committed nor a preset: commit them, keep them "
            f"(cp {path} {FOLDER}/NAME.yaml) or undo them (git checkout {path})"
        )
    with publish(path) as partial:
        partial.write_text(known[name])
