"""Everything that is fetched from a hub, fetched now: afterwards no stage needs the network."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from folora.commands import FOUNDATION
from folora.errors import FoLoRAError
from folora.params import PretrainedFoundation

if TYPE_CHECKING:
    from folora.params import Params


def prefetch(params: Params) -> tuple[list[str], list[str]]:
    """Run the stages that fetch, and load the data of the evaluation tasks into the cache of the hub's library.

    The stages pin what they got: the model's commit and digests, the data sets' commits. Tasks are pinned by their own
    files, where those name a revision.

    Returns:
        Names of the stages, and of the tasks.

    Raises:
        FoLoRAError: a stage failed, or a task's data are not to be had.
    """
    stages = [f"download@{name}" for name in params.downloads]
    pretrained = isinstance(params.foundation, PretrainedFoundation)
    if pretrained:
        stages.insert(0, "foundation")
    if stages and subprocess.run(["dvc", "repro", *stages], check=False).returncode:
        raise FoLoRAError(f"dvc repro {' '.join(stages)}: failed; what it said stands above")
    return stages, _load_tasks(params) if pretrained else []  # the offline model's world has all of its tasks


def _load_tasks(params: Params) -> list[str]:
    from folora.base import open_base
    from folora.harness import Harness

    settings = params.evaluation
    harness = Harness(Path(settings.tasks), settings, open_base(FOUNDATION).load_tokenizer())
    names = params.evaluation_tasks()
    for name in names:
        harness.tasks(name)
    return names
