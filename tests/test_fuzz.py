"""Some two thousand damaged files; ``python tests/fuzz.py --count 100000`` tries more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fuzz import fuzz_all

if TYPE_CHECKING:
    from pathlib import Path

    import pytest
    from conftest import Pipeline


def test_damaged_files_are_read_or_refused(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    outcomes = fuzz_all(pipeline, tmp_path, count=2_000, seed=0)
    assert {outcome.reader: outcome.problems for outcome in outcomes if outcome.problems} == {}
    assert all(outcome.refused for outcome in outcomes if outcome.reader != "state")
    assert sum(outcome.cases for outcome in outcomes) > 1_900
