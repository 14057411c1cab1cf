"""What users see of a mistake: a single line that says what is wrong, where, and what to do."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


PASSWORD = re.compile(r"(\w://[^\s/:@]*):[^\s/@]+@")  # of an address, as in https://user:password@host
SECRET_NAMES = ("TOKEN", "PASSWORD", "SECRET", "KEY")  # what names of environment variables with secrets end in
SHORTEST_SECRET = 8  # characters; what is shorter is more likely a word


class FoLoRAError(Exception):
    """A mistake in parameters, data or artefacts that the user can mend, in one line whatever it quotes."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def diverged(where: str) -> FoLoRAError:
    """The error of a training whose figures are no longer finite."""
    return FoLoRAError(f"the training diverged, {where}: lower the run's learning_rate, or take it out of runs")


def redacted(text: str) -> str:
    """The text without passwords in addresses and without values of environment variables that hold secrets."""
    for name, value in os.environ.items():
        if name.upper().endswith(SECRET_NAMES) and len(value) >= SHORTEST_SECRET:
            text = text.replace(value, "***")
    return PASSWORD.sub(r"\1:***@", text)


def describe(error: ValidationError) -> str:
    """One problem of a validation error in one line: key, what is allowed, what was given.

    Of a union every member complains: the one that the value was meant for reads deepest into it and knows its keys.
    """
    problems = error.errors(include_url=False)
    first = min(problems, key=lambda one: (-len(one["loc"]), one["type"] in ("missing", "extra_forbidden")))
    key = _key(first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    given = first["input"]
    shown = f" (got {given!r:.200})" if isinstance(given, (str, int, float, bool, type(None))) else ""
    more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
    return f"{key}: {message}{shown}{more}" if key else f"{message}{more}"


def _key(location: tuple[int | str, ...]) -> str:
    """The dotted key of a location, without what pydantic adds for the members of a union."""
    # the section or key with a union, and where its member's name stands
    members = {("foundation", 1), ("proxy", 3), ("adapter", 2), ("spectrum", 2), ("tau", 1), ("shrinkage", 1)}
    parts = [part for position, part in enumerate(location) if (location[0], position) not in members]
    return ".".join(map(str, parts))
