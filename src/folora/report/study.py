"""One adaptation with everything that is said about it: figures, pairs and tests, from the same objects throughout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from folora.comparison import compare
from folora.errors import FoLoRAError
from folora.paired import Pairing
from folora.report.drift import at_best_rows, drift_rows, kl_interval, task_rows

if TYPE_CHECKING:
    from folora.comparison import Checkpoint, Comparison
    from folora.paired import Pair
    from folora.params import Params
    from folora.report.inputs import Inputs
    from folora.storage import Record

SUBJECT_KIND = "folora"
FEW = 4


@dataclass(frozen=True)
class Study:
    """The results on one adaptation.

    Attributes:
        comparison: every method at its best rate, and matched with every other.
        subject: the method that the verdict is about.
        highlighted: the methods that figures bring out: the reference, the subject and, if few, others of its kind.
        base: metrics of the base model.
        records: metrics of every checkpoint.
        kept: names of the kept tasks.
        pairs: every method against the reference, and the subject against every method, item by item.
        kept_p: corrected p-value of every method and kept task against the base model.
        intervals: of the last checkpoint of every seed at a method's best rate: ends by figure (target, kept, kl).
        drift: a row a method and text, from ``drift_rows``.
        at_best: a row a method and task that is asked at the best rate only, from ``at_best_rows``.
        tasks: a row a task (the target and the kept ones) and method, from ``task_rows``.
        budgets: ``kl_budget`` of every method that has one.
    """

    comparison: Comparison
    subject: str
    highlighted: list[str]
    base: Record
    records: list[Record]
    kept: list[str]
    pairs: dict[tuple[str, str], Pair]
    kept_p: dict[tuple[str, str], float]
    intervals: dict[Checkpoint, dict[str, tuple[float, float]]]
    drift: list[Record]
    at_best: list[Record]
    tasks: list[Record]
    budgets: dict[str, float]

    @property
    def name(self) -> str:
        """The adaptation."""
        return self.comparison.adaptation

    @property
    def reference(self) -> str:
        """The method that the others are compared with."""
        return self.comparison.reference

    def record(self, checkpoint: Checkpoint) -> Record:
        """The metrics of a checkpoint."""
        return next(record for record in self.records if (record["run"], record["step"]) == checkpoint)


def make_studies(params: Params, inputs: Inputs) -> list[Study]:
    """Compare the methods on every adaptation of params.yaml.

    Raises:
        FoLoRAError: the reference has no run on an adaptation.
    """
    adaptations = dict.fromkeys(run.task for run in params.runs.values())
    return [_study(params, inputs, adaptation) for adaptation in adaptations]


def _study(params: Params, inputs: Inputs, adaptation: str) -> Study:
    reference, kept = params.report.reference, params.evaluation.kept
    base = inputs.bases[adaptation]
    records = [record for record in inputs.records if record["adaptation"] == adaptation]
    if not any(record["method"] == reference for record in records):
        raise FoLoRAError(f"report.reference: {reference} has no run on {adaptation}: add one")
    comparison = compare(adaptation, base, records, reference)
    tasks = {"target": [params.tasks[adaptation].target], "kept": kept}
    pairing = Pairing(comparison, base, records, inputs.answers[adaptation], tasks)
    subject = subject_of(params, comparison)
    against_reference = pairing.pairs((method, reference) for method in comparison.arms if method != reference)
    against_each = pairing.pairs((subject, method) for method in comparison.arms if method != subject)
    relatives = [method for method in comparison.arms if _kind(params, method) == _kind(params, subject)]
    brought_out = [reference, subject, *(relatives if len(relatives) <= FEW else [])]
    return Study(
        comparison=comparison,
        subject=subject,
        highlighted=list(dict.fromkeys(brought_out)),
        base=base,
        records=records,
        kept=kept,
        pairs=against_reference | against_each,
        kept_p=pairing.against_base(),
        intervals={
            checkpoint: {figure: pairing.interval(checkpoint, figure) for figure in tasks}
            | {"kl": kl_interval(inputs, method, checkpoint)}
            for method, arm in comparison.arms.items()
            for checkpoint in arm.finals.values()
        },
        drift=drift_rows(comparison, inputs),
        at_best=at_best_rows(comparison, inputs, params.evaluation.at_best),
        tasks=task_rows(comparison, inputs, list(dict.fromkeys([*tasks["target"], *kept])), subject),
        budgets={name: budget for name in comparison.arms if (budget := params.methods[name].kl_budget)},
    )


def subject_of(params: Params, comparison: Comparison) -> str:
    """The first method of kind folora; without one, the other method than the reference with the most hypervolume."""
    ours = [method for method in comparison.arms if _kind(params, method) == SUBJECT_KIND]
    others = [method for method in comparison.arms if method != comparison.reference]
    if ours or not others:
        return (ours or [comparison.reference])[0]
    return max(others, key=lambda method: comparison.arms[method].hypervolume)


def _kind(params: Params, method: str) -> str:
    return params.methods[method].kind_name()
