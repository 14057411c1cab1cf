"""A matrix that is stopped goes on where it was; ``python tests/matrix.py`` is one of 1,000 stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from matrix import measure

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.slow
def test_no_stage_is_left_out_or_done_again(tmp_path: Path) -> None:
    outcome = measure(tmp_path, runs=30, cores=2, stop_after=12, pause=0.5)
    assert 12 <= outcome.before < outcome.stages
    assert (outcome.left_out, outcome.again_recorded) == (0, 0)
