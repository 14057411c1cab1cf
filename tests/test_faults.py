"""A stage broken in every way; ``python tests/faults.py --count 100`` breaks more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from faults import FAULTS, break_stages

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.slow
def test_nothing_is_lost(by_dvc: Path, tmp_path: Path) -> None:
    outcomes = break_stages(tmp_path, count=len(FAULTS), seed=2, whole=by_dvc)
    assert [outcome for outcome in outcomes if outcome.problems] == []
    assert any(outcome.hit for outcome in outcomes)
