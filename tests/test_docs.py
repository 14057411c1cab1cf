"""Every ``folora`` command that README and docs show is one that the command line takes."""

from __future__ import annotations

import re
import shlex

import pytest
import typer
from conftest import ROOT

from folora.cli import app

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
