"""Two runs side by side: what they were made with and what came of it. ``comparison.py`` compares methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from folora.commands.results import final_record
from folora.params import flatten, run_params

if TYPE_CHECKING:
    from pathlib import Path

    from folora.params import Params

UNSET = "–"


@dataclass(frozen=True)
class Pair:
    """A first and a second run.

    Attributes:
        parameters: dotted key to both values, of those that differ; None where a method has no such option.
        figures: metric of the last checkpoint to both values.
    """

    first: str
    second: str
    parameters: dict[str, tuple[Any, Any]]
    figures: dict[str, tuple[float, float]]

    def rows(self) -> list[list[str]]:
        """Cells of a table: name, first, second, difference."""
        shown = [[name, _cell(a), _cell(b), ""] for name, (a, b) in self.parameters.items()]
        return shown + [[name, f"{a:.4g}", f"{b:.4g}", _difference(a, b)] for name, (a, b) in self.figures.items()]

    def as_json(self) -> dict[str, Any]:
        """Plain values, for programs; figures with their difference, second minus first."""
        figures = {name: (a, b, b - a) for name, (a, b) in self.figures.items()}
        return {"runs": (self.first, self.second), "parameters": self.parameters, "figures": figures}


def compare_runs(params: Params, first: str, second: str, runs: Path, evaluations: Path) -> Pair:
    """Compare two runs of params.yaml at their last checkpoints.

    Raises:
        FoLoRAError: a run is not in params.yaml, is not trained, or was not measured since.
    """
    results = [final_record(params, run, runs, evaluations) for run in (first, second)]
    values = [flatten(run_params(params, run)) for run in (first, second)]
    names = dict.fromkeys(name for each in values for name in each)
    parameters = {name: (values[0].get(name), values[1].get(name)) for name in names}
    kept = [f"kept/{name}" for name in params.evaluation.kept]
    figures = ["target", "validation", "kept", *kept, "kl", "perplexity"]
    return Pair(
        first,
        second,
        {name: pair for name, pair in parameters.items() if pair[0] != pair[1]},
        {name: (results[0][name], results[1][name]) for name in figures},
    )


def _difference(first: float, second: float) -> str:
    return "0" if first == second else f"{second - first:+.3g}"


def _cell(value: Any) -> str:
    return UNSET if value is None else str(value)
