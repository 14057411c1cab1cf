"""The run to ship: the best at the task among those that kept enough of what the base model knew."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from folora.base import FoundationManifest
from folora.commands.results import base_record, final_record
from folora.errors import FoLoRAError
from folora.serving import Usage, usage_of
from folora.storage import ADAPTER, MANIFEST_FILE, fields_of, read_json

if TYPE_CHECKING:
    from folora.params import Params


@dataclass(frozen=True)
class Choice:
    """A run with its figures on the test split.

    Attributes:
        run: its name in params.yaml.
        task: what it was adapted to.
        validation: target accuracy on the validation split, which chose it.
        target: target accuracy.
        kept: kept accuracy.
        kept_share: of the base model's kept accuracy.
        kl: KL to the base model.
        adapter: folder.
    """

    run: str
    task: str
    validation: float
    target: float
    kept: float
    kept_share: float
    kl: float
    adapter: str

    def text(self) -> str:
        """For people."""
        kept = f"kept {self.kept:.3f} ({self.kept_share:.0%} of the base's)"
        return f"{self.task}: {self.run}, in {self.adapter}\n  target {self.target:.3f}, {kept}, KL {self.kl:.3f}"


def pick_run(params: Params, task: str, keep: float, runs: Path, evaluations: Path) -> Choice:
    """The run with the best validation accuracy whose kept accuracy is at least a share of the base model's.

    A tie goes to the run that kept more, then to the smaller KL.

    Args:
        params: names the runs.
        task: entry of tasks.
        keep: the share.
        runs: folder with METHOD/RUN.
        evaluations: folder with the results.

    Raises:
        FoLoRAError: no run on this task kept so much, or one is not trained, or was not measured since.
    """
    base = base_record(task, evaluations)["kept"]
    choices = []
    for name, run in params.runs.items():
        if run.task != task:
            continue
        found = final_record(params, name, runs, evaluations)
        figures = {key: found[key] for key in ("validation", "target", "kept", "kl")}
        share = found["kept"] / base if base else 1.0
        adapter = runs / run.method / name / ADAPTER
        choices.append(Choice(name, task, kept_share=share, adapter=str(adapter), **figures))
    if not choices:
        raise FoLoRAError(f"runs: none is on the task {task}; there are {', '.join(params.tasks)}")
    enough = [choice for choice in choices if choice.kept_share >= keep]
    if not enough:
        most = max(choices, key=lambda choice: choice.kept_share)
        raise FoLoRAError(
            f"no run on {task} kept {keep:g} of the base model's {base:.2f}; the most is {most.kept_share:.2f}, by "
            f"{most.run}: lower --keep, or try methods that keep more (`folora methods`)"
        )
    return max(enough, key=lambda choice: (choice.validation, choice.kept, -choice.kl))


def usage(choice: Choice, foundation: Path) -> Usage:
    """How to load and serve the run.

    Raises:
        FoLoRAError: the adapter or the base model is not there.
    """
    path = foundation / MANIFEST_FILE
    manifest = fields_of(path, FoundationManifest, read_json(path))
    code = manifest.loading.trust_remote_code
    return usage_of(choice.run, Path(choice.adapter), manifest.source or str(foundation), code=code)
