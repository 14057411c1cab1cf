"""What goes with every kind of method, read off the reference of ``params.yaml``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from folora.commands.params import METHODS, reference
from folora.methods import Method

PAPER = re.compile(r",? ?arXiv (\d{4}\.\d{5})")


@dataclass(frozen=True)
class SharedOption:
    """An option that any kind takes: what it does, and the arXiv id of its paper, if it has one."""

    HEAD: ClassVar = ["option", "meaning", "paper"]

    option: str
    meaning: str
    paper: str | None

    def cells(self) -> list[str]:
        """Cells of a table."""
        return [self.option, self.meaning, self.paper or "–"]


def shared_options() -> list[SharedOption]:
    """Every option of ``Method`` itself, in its order."""
    found = []
    for entry in reference(METHODS):
        option = entry.key.removeprefix(f"{METHODS}.")
        if option in Method.model_fields:
            paper = PAPER.search(entry.meaning)
            found.append(SharedOption(option, PAPER.sub("", entry.meaning), paper[1] if paper else None))
    return found
