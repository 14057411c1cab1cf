from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch

from folora import devices
from folora.devices import VISIBLE, main_memory, take_devices
from folora.errors import FoLoRAError
from folora.hold import hold
from folora.loading import Loading
from folora.spread import MAX_MEMORY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Refused, SaveParams

pytestmark = pytest.mark.usefixtures("in_tmp")


@pytest.mark.parametrize(("controller", "file"), [("", "memory.max"), ("memory", "memory.limit_in_bytes")])
def test_memory_is_what_a_container_gives(
    controller: str, file: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the groups around a process the one with the least counts; in a container they are not at the paths told."""
    monkeypatch.setattr(devices, "OWN_GROUPS", in_tmp / "cgroup")
    monkeypatch.setattr(devices, "LIMITS", {controller: (in_tmp, file)})
    whole = psutil.virtual_memory().total
    assert main_memory() == whole
    (in_tmp / "cgroup").write_text(f"5:cpu:/x\n0:{controller}:/pod/job\n")
    (in_tmp / "pod" / "job").mkdir(parents=True)
    (in_tmp / "pod" / "job" / file).write_text("max\n")
    assert main_memory() == whole
    (in_tmp / "pod" / file).write_text("4000\n")
    assert main_memory() == 4000
    (in_tmp / file).write_text("3000\n")
    assert main_memory() == 3000


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A machine with so many GPUs."""
    monkeypatch.setenv(VISIBLE, "")  # so that it is put back
    monkeypatch.delenv(VISIBLE)

    def make(count: int) -> None:
        monkeypatch.setattr(devices, "_devices", lambda: [str(index) for index in range(count)])

    return make


@pytest.fixture
def held() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def taken(held: ExitStack, count: int = 1) -> str | None:
    """The devices that another stage gets, its environment being that of its runner."""
    take_devices(held, count)
    return os.environ.pop(VISIBLE, None)


def test_each_stage_has_a_device_of_its_own(machine: Callable[[int], None], held: ExitStack) -> None:
    machine(3)
    assert [taken(held) for _ in range(3)] == ["0", "1", "2"]


def test_who_comes_when_all_are_taken_waits_for_one(
    machine: Callable[[int], None],
    held: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine(2)
    other = ExitStack()
    assert [taken(held), taken(other)] == ["0", "1"]
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 2:
            other.close()

    monkeypatch.setattr(devices.time, "sleep", nap)
    assert taken(held) == "1"
    assert naps == [devices.POLL] * 2
    assert capsys.readouterr().err == "folora: GPUs are at work (0, 1): waiting for 1\n"


def test_those_that_somebody_chose_are_the_ones_there_are(
    machine: Callable[[int], None], held: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(8)
    for expected in ("GPU-5c1", "GPU-77f"):
        monkeypatch.setenv(VISIBLE, "GPU-5c1,GPU-77f")
        assert taken(held) == expected


@pytest.mark.parametrize("chosen", ["3", ""])
def test_one_that_somebody_chose_may_be_shared(
    chosen: str, machine: Callable[[int], None], held: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(8)
    with hold(Path(f"GPU 3 of {gethostname()}")):
        for _ in range(2):
            monkeypatch.setenv(VISIBLE, chosen)
            assert taken(held) == chosen


def test_a_spread_model_takes_all_of_its_devices_or_waits_without_any(
    machine: Callable[[int], None], held: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(3)
    other = ExitStack()
    assert [taken(held), taken(other)] == ["0", "1"]
    third: list[str | None] = []

    def nap(_seconds: float) -> None:
        with ExitStack() as passing:
            third.append(taken(passing))
        other.close()

    monkeypatch.setattr(devices.time, "sleep", nap)
    assert taken(held, 2) == "1,2"
    assert third == ["2"]


@pytest.mark.parametrize(("stage", "seen"), [("heldout", "0,1"), ("foundation", "0")])
def test_only_stages_that_spread_the_model_take_its_devices(
    stage: str,
    seen: str,
    machine: Callable[[int], None],
    refused: Refused,
    save_params: SaveParams,
    tiny_values: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(3)
    monkeypatch.setenv(MAX_MEMORY, "0=1GB,1=1GB")
    loading = Loading(device="cuda", dtype="float32", attention="eager", bos_token=None, trust_remote_code=False)
    foundation = {"source": "pretrained", "model": "none", "revision": None, "loading": loading.model_dump()}
    params = save_params(tiny_values | {"foundation": foundation})
    reads = {"heldout": "--foundation", "foundation": "--world"}[stage]
    assert refused(stage, reads, "none", "--threads", 1, "--params", params)
    assert os.environ.get(VISIBLE) == seen


def test_more_gpus_than_there_are_are_not_waited_for(machine: Callable[[int], None], held: ExitStack) -> None:
    machine(3)
    with pytest.raises(FoLoRAError, match="FOLORA_MAX_MEMORY: names 4 GPUs, there are 3: name those"):
        taken(held, 4)


def test_without_gpus_nothing_is_taken(machine: Callable[[int], None], held: ExitStack) -> None:
    machine(0)
    assert taken(held) is None


@pytest.mark.parametrize(("device", "seen"), [("cuda", "0"), ("cpu", None)])
def test_a_stage_takes_one_where_its_model_is_loaded_on_one(
    device: str,
    seen: str | None,
    machine: Callable[[int], None],
    refused: Refused,
    save_params: SaveParams,
    tiny_values: dict[str, Any],
) -> None:
    machine(2)
    loading = {
        "device": device,
        "dtype": "float32",
        "attention": "eager",
        "bos_token": None,
        "trust_remote_code": False,
    }
    foundation = {"source": "pretrained", "model": "none", "revision": None, "loading": loading}
    params = save_params(tiny_values | {"foundation": foundation})
    assert "manifest" in refused("heldout", "--foundation", "none", "--threads", 1, "--params", params)
    assert os.environ.get(VISIBLE) == seen
    assert torch.get_deterministic_debug_mode() == {"cpu": 2, "cuda": 1}[device]  # 1 warns, 2 raises
