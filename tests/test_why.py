"""``folora why`` in a DVC repository of three stages: first → second → third."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from conftest import GRAPH, GRAPH_PARAMS
from typer.testing import CliRunner

from folora.cli import app
from folora.commands.why import explain
from folora.dag import Change, stale_changes
from folora.errors import FoLoRAError

if TYPE_CHECKING:
    from pathlib import Path


def test_nothing_changed(graph: Path) -> None:
    assert stale_changes(graph) == {}
    (reason,) = explain(graph, "third")
    assert reason.lines() == ["third is up to date"]


def test_a_parameter_is_named_with_both_values(graph: Path) -> None:
    (graph / "params.yaml").write_text("scale: 1\ntable: {depth: {left: 5, middle: 6}}\n")
    expected = [
        Change("parameter", "table.depth.left", "modified", 2, 5),
        Change("parameter", "table.depth.right", "deleted", 3, None),
        Change("parameter", "table.depth.middle", "new", None, 6),
    ]
    assert sorted(stale_changes(graph)["first"], key=lambda change: change.name) == sorted(
        expected, key=lambda change: change.name
    )
    (reason,) = explain(graph, "first")
    assert set(reason.lines()) == {
        "first is stale:",
        "  parameter table.depth.left 5, was 2",
        "  parameter table.depth.right gone, was 3",
        "  parameter table.depth.middle 6, new",
    }


def test_files_and_commands_are_named(graph: Path) -> None:
    (graph / "source").write_text("other\n")
    (graph / "third.txt").unlink()
    (graph / "dvc.yaml").write_text(GRAPH.replace("cat first.txt first.txt", "cat first.txt"))
    changes = stale_changes(graph)
    assert changes["first"] == [Change("dependency", "source", "modified")]
    assert changes["second@a"] == [Change("command", "cat first.txt > a.txt", "modified")]
    assert changes["third"] == [Change("output", "third.txt", "deleted")]


def test_what_lies_above_is_named(graph: Path) -> None:
    (graph / "source").write_text("other\n")
    (reason,) = explain(graph, "third")
    assert reason.changes == []
    assert reason.lines() == [
        "third runs again if first, which is stale, gives another result:",
        "  dependency source modified",
    ]
    assert [reason.stage for reason in explain(graph, "second")] == ["second@a", "second@b"]


def test_a_stage_that_never_ran(graph: Path) -> None:
    (graph / "dvc.lock").unlink()
    assert stale_changes(graph)["second@b"] == [Change("stage", "second@b", "new")]
    assert explain(graph, "first")[0].lines() == ["first is stale:", "  it has not run yet"]


def test_unknown_stage_suggests(graph: Path) -> None:
    with pytest.raises(FoLoRAError, match="'secnd' is not a stage; did you mean second"):
        explain(graph, "secnd")


def test_json_and_text(graph: Path) -> None:
    (graph / "params.yaml").write_text(GRAPH_PARAMS.replace("scale: 1", "scale: 2"))
    said = json.loads(CliRunner().invoke(app, ["why", "first", "--json"]).stdout)
    change = {"kind": "parameter", "name": "scale", "state": "modified", "before": 1, "after": 2}
    assert said == [{"stage": "first", "changes": [change], "above": {}, "stale": True}]
    assert CliRunner().invoke(app, ["why", "first"]).stdout == "first is stale:\n  parameter scale 2, was 1\n"
