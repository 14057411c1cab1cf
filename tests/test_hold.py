from __future__ import annotations

import getpass
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from folora.errors import FoLoRAError
from folora.hold import HOLDS, hold

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Refused, SaveParams

pytestmark = pytest.mark.usefixtures("in_tmp")

OUTPUT = Path("artifacts/heldout.parquet")
HOLDER = f"""
import time
from contextlib import suppress
from pathlib import Path
from folora.hold import hold
with hold(Path("{OUTPUT}")):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the output."""
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_who_comes_second_is_told(holder: subprocess.Popen[str], in_tmp: Path) -> None:
    told = rf"heldout\.parquet: process {holder.pid} of {getpass.getuser()} on .+ \(since .+\) is at work on it"
    for name in (OUTPUT, in_tmp / OUTPUT):
        with pytest.raises(FoLoRAError, match=told), hold(name):
            pass
    with hold(Path("artifacts/other.parquet")):
        pass


def test_a_kill_ends_a_hold(holder: subprocess.Popen[str]) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with hold(OUTPUT):
        pass


def test_a_hold_ends_with_its_block() -> None:
    for _ in range(2):
        with hold(OUTPUT):
            pass


def test_a_holder_that_has_not_said_who_it_is(holder: subprocess.Popen[str]) -> None:
    del holder
    for path in HOLDS.glob("*.json"):
        path.write_text("{")
    with pytest.raises(FoLoRAError, match="another process is at work on it"), hold(OUTPUT):
        pass


def test_a_stage_holds_its_output(
    holder: subprocess.Popen[str], refused: Refused, save_params: SaveParams, tiny_values: dict[str, Any]
) -> None:
    arguments = ("heldout", "--foundation", "f", "--threads", 1, "--params", save_params(tiny_values))
    assert f"process {holder.pid} of" in refused(*arguments, output=OUTPUT)
    assert not OUTPUT.exists()


def test_a_full_disk_fails_no_hold(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage itself says what cannot be written."""
    monkeypatch.chdir(small_disk)
    with suppress(OSError):
        Path("filled").write_bytes(bytes(2**17))
    with hold(OUTPUT):
        pass
