"""What git says of the working folder."""

from __future__ import annotations

import subprocess


def git(*arguments: str) -> str | None:
    """Output of a git command in the working folder; None without git, a repository or what was asked for."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout
