"""What the base model, the reference and the subject answered, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folora.paired import BASE_CHECKPOINT
from folora.report.inputs import read_answers
from folora.selection import BASE

if TYPE_CHECKING:
    from pathlib import Path

    from folora.report.study import Study
    from folora.storage import Record


def side_by_side(study: Study, evaluations: Path, target: str) -> list[Record]:
    """Of each task the first item that not all answer alike, right or wrong; the first seed's last checkpoints.

    Returns:
        ``task``, ``prompt``, ``expected``, and ``answers`` of the base, the reference and the subject, each with
        ``answer`` and ``right``, whether its score is above a half.
    """
    arms = [study.comparison.arms[name] for name in dict.fromkeys([study.reference, study.subject])]
    checkpoints = {BASE: BASE_CHECKPOINT} | {arm.method: next(iter(arm.finals.values())) for arm in arms}
    answers = {
        model: {(row["task"], row["item"]): row for row in read_answers(evaluations / model, study.name, checkpoint)}
        for model, checkpoint in checkpoints.items()
    }
    rows = []
    for task in (target, *study.kept):
        for key in sorted(key for key in answers[BASE] if key[0] == task):
            given = [by_item[key] | {"right": by_item[key]["score"] > 0.5} for by_item in answers.values()]
            if len({row["right"] for row in given}) > 1:
                rows.append({name: given[0][name] for name in ("task", "prompt", "expected")} | {"answers": given})
                break
    return rows
