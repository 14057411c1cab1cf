"""Clients side by side on one server lose nothing; ``python tests/load.py`` is 64 of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from load import DATABASES, measure
from services import missing_postgres

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_tmp")]


@pytest.mark.parametrize("database", DATABASES)
def test_nothing_is_lost(database: str, tmp_path: Path) -> None:
    if database == "postgresql" and (reason := missing_postgres()):
        pytest.skip(reason)
    load = measure(tmp_path, database, clients=8, processes=2, runs=2)
    assert load.errors == []
    assert (load.runs, load.written, load.refused, load.lost) == (16, 16, 0, 0)
    assert 0 < load.p50 <= load.p95 <= load.seconds
