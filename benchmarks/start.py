"""How long a stage takes to begin: its imports, against those of the libraries that it needs."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING

from bench import Row, alternate, main, within

if TYPE_CHECKING:
    from collections.abc import Iterator

PARAMS = "from pathlib import Path; from folora.params import load_params; load_params(Path('params.yaml'))"
COMMON = "import folora.cli, folora.devices, folora.spread, folora.storage"  # what every stage imports first
STAGES = {  # what cli.py imports then, before the stage begins
    "spectrum": ("import torch", 2.5, "import folora.base, folora.spectrum"),
    "report": ("import torch", 2.5, "import folora.report, folora.report.page"),
    "covariance": ("import torch, transformers, peft", 1.2, "import folora.base, folora.covariance, transformers"),
    "train": ("import torch, transformers, peft", 1.2, "import folora.base, folora.train"),
}


def rows(size: str, repeats: int) -> Iterator[Row]:
    """Start Python with what a stage imports, and with the libraries alone; in the folder of a workspace."""
    stages = STAGES if size == "full" else {"spectrum": STAGES["spectrum"]}
    for stage, (libraries, bound, modules) in stages.items():
        ours, theirs = alternate(repeats, partial(python, f"{COMMON}; {PARAMS}; {modules}"), partial(python, libraries))
        yield within(f"start of {stage}", libraries, "imports and params.yaml", ours, theirs, bound)


def python(code: str) -> None:
    """Run code in a fresh interpreter."""
    subprocess.run([sys.executable, "-c", code], check=True)


if __name__ == "__main__":
    main(rows)
