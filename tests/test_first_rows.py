"""A task whose data are wrong is named before anything long begins, whatever stage or command comes first."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from workspace import change, make_workspace

from folora.commands import doctor
from folora.commands.doctor import OK, PROBLEM
from folora.commands.first_rows import FIRST, check_tasks
from folora.errors import FoLoRAError
from folora.foundation import LOADING
from folora.params import Params

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import Pipeline, Refused, SaveParams

    WithRows = Callable[..., dict[str, Any]]

WRONG = "data.jsonl, row 0: 'answer' is undefined: mend the template in params.yaml; the columns are question, reply"


@pytest.fixture
def with_rows(pipeline: Pipeline, tmp_path: Path) -> WithRows:
    """Parameters whose task has these rows, and other changes."""

    def values(rows: list[dict[str, Any]], /, **changes: Any) -> dict[str, Any]:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {"dataset": str(path), "prompt": "{{ question }}>", "response": "{{ answer }}"}
        own = pipeline.values()["tasks"]["subtraction"] | task | changes
        return pipeline.values() | {"tasks": {"subtraction": own}}

    return values


@pytest.fixture
def wrong(with_rows: WithRows) -> dict[str, Any]:
    return with_rows([{"question": "1", "reply": "2"}])


ROW = {"question": "1", "answer": "2"}
CHAT = {"prompt": None, "response": None, "messages": "chat"}


@pytest.mark.parametrize(
    ("rows", "changes", "expected"),
    [
        ([{"question": "1", "reply": "2"}], {}, WRONG),
        ([ROW, ROW | {"answer": ""}], {}, "row 1: the response is empty: remove the row or change the template"),
        ([ROW, ROW | {"answer": None}], {"chat": True}, "row 1: a value is missing: mend the template"),
        ([], {}, "the data set is empty: at least one row is needed"),
        (
            [ROW],
            {"dataset": "nowhere.jsonl"},
            "subtraction: nowhere.jsonl: no data set here: tasks.subtraction.dataset is",
        ),
        ([ROW], CHAT, "tasks.subtraction.messages: 'chat' is no column of "),
    ],
    ids=["column", "response", "value", "empty", "nowhere", "chat"],
)
def test_wrong_rows_are_named_without_a_tokenizer(
    rows: list[dict[str, Any]], changes: dict[str, Any], expected: str, with_rows: WithRows
) -> None:
    with pytest.raises(FoLoRAError) as error:
        check_tasks(Params.model_validate(with_rows(rows, **changes)))
    assert str(error.value).startswith("tasks.subtraction")
    assert expected in str(error.value)
    assert str(error.value).count("subtraction") == (2 if "dataset" in changes else 1)


@pytest.mark.parametrize(
    ("row", "changes", "expected"),
    [
        (ROW, {"chat": True}, "tasks.subtraction: the tokenizer has no chat template"),
        (ROW | {"answer": "2" * 40}, {}, "tasks.subtraction: row 0 of the task: prompt and response have 44 tokens"),
        (ROW | {"answer": "Ω"}, {}, "has a character the tokenizer does not know"),
    ],
)
def test_with_a_tokenizer_more_is_seen(
    row: dict[str, Any], changes: dict[str, Any], expected: str, with_rows: WithRows, pipeline: Pipeline
) -> None:
    params = Params.model_validate(with_rows([row], **changes))
    assert check_tasks(params) == ["subtraction"]
    with pytest.raises(FoLoRAError, match=expected):
        check_tasks(params, pipeline.base.load_tokenizer())


def test_rows_that_are_not_taken_or_far_down_are_left_to_the_stage(with_rows: WithRows) -> None:
    empty = ROW | {"answer": ""}
    assert check_tasks(Params.model_validate(with_rows([ROW, empty], rows=1))) == ["subtraction"]
    assert check_tasks(Params.model_validate(with_rows([*[ROW] * FIRST, empty]))) == ["subtraction"]


@pytest.mark.usefixtures("in_tmp")
def test_data_that_a_stage_makes_may_come_later(with_rows: WithRows) -> None:
    assert check_tasks(Params.model_validate(with_rows([], dataset="artifacts/downloads/mine"))) == []


@pytest.mark.parametrize("stage", ["foundation", "proxy", "heldout", "evaluate-base"])
def test_a_stage_that_comes_before_that_of_the_task_names_it(
    stage: str, wrong: dict[str, Any], pipeline: Pipeline, save_params: SaveParams, refused: Refused
) -> None:
    section = {"source": "pretrained", "model": str(pipeline.foundation), "revision": None}
    params = save_params(wrong | {"foundation": section | {"loading": LOADING.model_dump()}})
    options: dict[str, tuple[object, ...]] = {
        "foundation": ("--world", "world"),
        "proxy": ("sampled", 0, "--foundation", pipeline.foundation),
        "heldout": ("--foundation", pipeline.foundation),
        "evaluate-base": (
            *("--foundation", pipeline.foundation),
            *("--tasks", pipeline.world, "--heldout", pipeline.heldout),
        ),
    }
    line = refused(stage, *options[stage], "--threads", 1, "--params", params)
    assert line.startswith("tasks.subtraction: ")
    assert line.endswith(WRONG)


def test_the_plan_names_it(wrong: dict[str, Any], save_params: SaveParams) -> None:
    from folora.commands.cli import plan

    with pytest.raises(FoLoRAError, match=r"^tasks\.subtraction: .*'answer' is undefined"):
        plan(as_json=False, params_file=save_params(wrong))


def test_the_doctor_names_it(wrong: dict[str, Any], with_rows: WithRows, save_params: SaveParams) -> None:
    (finding,) = doctor.rows(save_params(wrong))
    assert finding.level == PROBLEM
    assert finding.seen.endswith(WRONG)
    values = with_rows([ROW])
    values["tasks"]["later"] = values["tasks"]["subtraction"] | {"dataset": "artifacts/downloads/later"}
    (finding,) = doctor.rows(save_params(values))
    assert (finding.level, finding.seen) == (OK, "of subtraction: as declared; 1 come with a stage")


@pytest.mark.slow
@pytest.mark.parametrize("runner", [["dvc", "repro"], ["snakemake", "--cores", "2"]], ids=lambda runner: runner[0])
def test_a_runner_ends_before_anything_is_made(runner: list[str], tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")
    change(workspace, "tasks.subtraction.dataset", "rows/train.jsonl")
    change(workspace, "tasks.subtraction.response", "{{ answer }}")
    done = subprocess.run(runner, cwd=workspace, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    logs = "".join(path.read_text() for path in workspace.glob("logs/*.log"))
    assert "folora: tasks.subtraction: rows/train.jsonl, row 0: 'answer' is undefined" in done.stderr + logs
    assert not (workspace / "artifacts" / "foundation").exists()
