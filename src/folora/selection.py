"""Which checkpoints of a method count: the last ones, at the learning rate that is best on the validation split.

Averaged over seeds; a tie goes to the smaller rate.
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from folora.storage import Record

BASE = "base"  # the base model, where methods are named


def best_finals(records: list[Record]) -> dict[int, Record]:
    """The last checkpoints of a method at its best learning rate, by seed."""
    rate = best_rate(records)
    return {record["seed"]: record for record in last_checkpoints(records) if record["learning_rate"] == rate}


def last_checkpoints(records: list[Record]) -> list[Record]:
    """The last checkpoint of every run."""
    last: dict[str, Record] = {}
    for record in records:
        if record["run"] not in last or record["step"] > last[record["run"]]["step"]:
            last[record["run"]] = record
    return list(last.values())


def best_rate(records: list[Record]) -> float:
    """The learning rate with the best mean validation accuracy at the last checkpoint; a tie goes to the smaller."""
    by_rate: dict[float, list[float]] = {}
    for record in last_checkpoints(records):
        by_rate.setdefault(record["learning_rate"], []).append(record["validation"])
    return min(by_rate, key=lambda rate: (-fmean(by_rate[rate]), rate))
