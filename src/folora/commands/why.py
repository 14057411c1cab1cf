"""Why a stage will run again: what changed since its last run, and which stages above it are stale."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from folora.dag import Change, below, resolve_stages, stale_changes
from folora.errors import FoLoRAError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Reason:
    """The state of one stage.

    Attributes:
        stage: DVC's address.
        changes: what makes it stale by itself.
        above: stale stages that it depends on, directly or not, with what makes them so.
    """

    stage: str
    changes: list[Change]
    above: dict[str, list[Change]]

    def as_json(self) -> dict[str, Any]:
        """Plain values, for programs."""
        return {**asdict(self), "stale": bool(self.changes)}

    def lines(self) -> list[str]:
        """Sentences, for people."""
        if not self.changes and not self.above:
            return [f"{self.stage} is up to date"]
        lines = [f"{self.stage} is stale:", *map(_line, self.changes)] if self.changes else []
        for name, changes in self.above.items():
            lines += [f"{self.stage} runs again if {name}, which is stale, gives another result:"]
            lines += map(_line, changes)
        return lines


def explain(root: Path, name: str) -> list[Reason]:
    """Why the stage of this name, or each stage of this ``foreach``, will run again.

    Raises:
        FoLoRAError: there is no such stage.
    """
    stages = resolve_stages(root)
    chosen = [stage for stage in stages if stage == name or stage.startswith(f"{name}@")]
    if not chosen:
        groups = sorted({stage.partition("@")[0] for stage in stages})
        near = get_close_matches(name, [*stages, *groups], n=3) or groups
        raise FoLoRAError(f"{name!r} is not a stage; did you mean {', '.join(near)}? (`dvc stage list` shows all)")
    stale = stale_changes(root)
    reach = {other: below(stages, {other}) for other in stale if other in stages}
    return [
        Reason(
            stage,
            stale.get(stage, []),
            {other: stale[other] for other, reached in reach.items() if stage in reached and other != stage},
        )
        for stage in chosen
    ]


def _line(change: Change) -> str:
    if change.kind == "stage":
        return "  it has not run yet"
    if change.kind != "parameter":
        return f"  {change.kind} {change.name} {change.state}"
    values = {"new": f"{change.after!r}, new", "deleted": f"gone, was {change.before!r}"}
    return f"  parameter {change.name} {values.get(change.state, f'{change.after!r}, was {change.before!r}')}"
