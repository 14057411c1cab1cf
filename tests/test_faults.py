"""Two stages broken at random moments; ``python tests/faults.py --count 100`` breaks more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from faults import break_stages

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.slow
def test_nothing_is_lost(tmp_path: Path) -> None:
    outcomes = break_stages(tmp_path, count=2, seed=0)
    assert [outcome for outcome in outcomes if outcome.problems] == []
    assert any(outcome.hit for outcome in outcomes)
