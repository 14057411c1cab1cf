"""Every benchmark works, and finds what its peer finds; no time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path

FOLDER = ROOT / "benchmarks"
NAMES = sorted(
    path.stem for path in FOLDER.glob("*.py") if path.stem not in ("bench", "models", "planned", "simulate", "table")
)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_benchmark_works_and_writes_its_record(name: str, tmp_path: Path) -> None:
    options = ["--size", "tiny", "--repeats", "1", "--output", str(tmp_path)]
    subprocess.run([sys.executable, str(FOLDER / f"{name}.py"), *options], cwd=ROOT, check=True)
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["machine"]["cores"] >= 1
    for row in record.get("rows", []):
        assert row["ours"]
