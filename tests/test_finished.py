"""Recording of finished stages in batches, against what DVC records itself."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from ruamel.yaml import YAML

from folora.dag import record_stages, stale_stages
from folora.errors import FoLoRAError
from folora.finished import MARKS, Recording, mark_of

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ["first", "second@a", "second@b", "third"]


@pytest.fixture
def ran(graph: Path) -> object:
    """The lock that DVC wrote; what it recorded is forgotten, while the outputs stand."""
    lock = graph / "dvc.lock"
    content = YAML(typ="safe").load(lock)
    lock.unlink()
    return content


def test_a_batch_is_recorded_as_dvc_does_it(ran: object, graph: Path) -> None:
    record_stages(graph, NAMES[1:3])
    assert stale_stages(graph) == {"first", "third"}
    record_stages(graph, [NAMES[3], NAMES[0]])
    assert YAML(typ="safe").load(graph / "dvc.lock") == ran
    assert stale_stages(graph) == set()


@pytest.mark.parametrize(("name", "missing"), [("nobody", None), ("third", "third.txt"), ("second@a", "first.txt")])
def test_what_cannot_be_recorded_is_one_line(name: str, missing: str | None, ran: object, graph: Path) -> None:
    del ran
    if missing:
        (graph / missing).unlink()
    with pytest.raises(FoLoRAError, match=f"cannot record {name}: .*{missing or name}"):
        record_stages(graph, [name])
    assert not (graph / "dvc.lock").exists()


def test_marks_are_recorded_while_others_run_and_at_the_end(ran: object, graph: Path) -> None:
    recording = Recording(interval=0.01)
    recording.start()
    for name in NAMES:
        mark_of(name).touch()
    recording.finish()
    assert not list(MARKS.iterdir())
    assert YAML(typ="safe").load(graph / "dvc.lock") == ran


def test_marks_of_a_killed_workflow_are_forgotten(ran: object, graph: Path) -> None:
    del ran
    MARKS.mkdir(parents=True)
    mark_of("first").touch()
    recording = Recording()
    recording.start()
    recording.finish()
    assert stale_stages(graph) == set(NAMES)


def test_marks_that_could_not_be_recorded_stay(
    ran: object,
    graph: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    del ran
    recording = Recording()
    recording.start()
    mark_of("first").touch()
    (graph / "first.txt").unlink()
    asked = []
    run = subprocess.run

    def once(command: list[str], **options: bool) -> object:
        asked.append(command[-1])
        return run(command, capture_output=True, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", once)
    recording.finish()
    assert asked == ["first"]
    assert mark_of("first").exists()
