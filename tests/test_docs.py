"""Commands and parameters that README and docs show are taken as they stand."""

from __future__ import annotations

import re
import shlex

import pytest
import typer
from conftest import ROOT
from ruamel.yaml import YAML

from folora.cli import app
from folora.params import Params

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = re.compile(r"`(folora [a-z][^`\n]*)`|^(?:\$ )?(folora [a-z][^#&|\n]*)", re.MULTILINE)


def commands() -> list[str]:
    """The commands of all pages, without what follows a comment or joins another."""
    found = (one or other for page in PAGES for one, other in SHOWN.findall(page.read_text()))
    return sorted({re.split(r"&&|[|>]", command)[0].strip() for command in found})


def test_there_are_commands() -> None:
    assert len(commands()) > 15


@pytest.mark.parametrize("shown", commands())
def test_a_shown_command_is_taken(shown: str) -> None:
    _, name, *arguments = shlex.split(shown)
    group = typer.main.get_command(app)
    command = group.get_command(typer.Context(group), name)  # type: ignore[attr-defined]
    assert command is not None, f"{name} is no command"
    if arguments:  # a name alone only mentions it
        command.make_context(name, list(arguments), resilient_parsing=False)


def test_the_parameters_of_the_readme_fit_the_preset_that_it_names() -> None:
    section = (ROOT / "README.md").read_text().partition("## Bring your own model and data")[2]
    (preset,) = re.findall(r"^`folora use ([a-z0-9-]+)` makes", section, re.MULTILINE)
    yaml = YAML(typ="safe", pure=True)
    shown = yaml.load(re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)[0])
    params = Params.model_validate(yaml.load(ROOT / "workflow" / "presets" / f"{preset}.yaml") | shown)
    assert set(shown) == {"foundation", "tasks", "runs", "evaluation"}
    assert {run.method for run in params.runs.values()} <= set(params.methods)
    assert params.foundation.source == "pretrained"
