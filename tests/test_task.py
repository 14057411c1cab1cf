from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from folora.errors import FoLoRAError
from folora.storage import read_table
from folora.task import prepare_task

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Pipeline, Refused, SaveParams

    from folora.base import Base
    from folora.params import Params

ROWS = [{"question": "27-15", "answer": "12"}, {"question": 'up("a, b")', "answer": '"AB"'}]


def write_rows(rows: list[dict[str, str]], path: Path) -> Path:
    import json

    table = pa.Table.from_pylist(rows)
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepare(base: Base, params: Params, output: Path, dataset: Path, **changes: Any) -> list[dict[str, list]]:
    templates = {"prompt": "{{ question }}>", "response": "{{ answer }}", "dataset": str(dataset)}
    settings = params.tasks["subtraction"].model_copy(update=templates | changes)
    prepare_task(settings, base, output)
    return read_table(output, artefact="task", **base.identity, task=settings.model_dump())[0].to_pylist()


def test_templates_and_mask(tiny_base: Base, tiny_params: Params, tmp_path: Path) -> None:
    data = write_rows(ROWS, tmp_path / "data.jsonl")
    templates = {"prompt": "max {{ question.upper().lower() }}>", "response": "{{ answer }}!"}
    rows = prepare(tiny_base, tiny_params, tmp_path / "out", data, **templates)
    tokenizer = tiny_base.load_tokenizer()
    for row, given in zip(rows, ROWS, strict=True):
        ids, mask = row["input_ids"], row["loss_mask"]
        assert len(ids) == len(mask)
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id
        prompt = [i for i, counts in zip(ids, mask, strict=True) if not counts]
        response = [i for i, counts in zip(ids, mask, strict=True) if counts]
        assert ids == prompt + response
        assert tokenizer.decode(prompt) == f"<s>max {given['question']}>"
        assert tokenizer.decode(response) == f"{given['answer']}!</s>"


@pytest.mark.parametrize("name", ["data.csv", "data.parquet", "folder/train.jsonl", "folder/train.csv"])
def test_every_format_gives_the_same_rows(name: str, tiny_base: Base, tiny_params: Params, tmp_path: Path) -> None:
    expected = prepare(tiny_base, tiny_params, tmp_path / "one", write_rows(ROWS, tmp_path / "data.jsonl"))
    path = write_rows(ROWS, tmp_path / name)
    found = prepare(tiny_base, tiny_params, tmp_path / "two", path.parent if path.parent.name == "folder" else path)
    assert found == expected
    assert len(expected) == len(ROWS)


def test_the_world_is_tokenised_in_order(pipeline: Pipeline) -> None:
    rows = read_table(pipeline.task)[0].to_pylist()
    tokenizer = pipeline.base.load_tokenizer()
    lines = (pipeline.world / "subtraction" / "train.jsonl").read_text().splitlines()
    assert len(rows) == len(lines)
    for row, line in zip(rows, lines, strict=True):
        text = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
        prompt, response = text.split(">")
        assert line == f'{{"prompt": "{prompt}>", "response": "{response}"}}'


def test_folder_without_data_is_named(tiny_base: Base, tiny_params: Params, tmp_path: Path) -> None:
    for dataset in (tmp_path, tmp_path / "no.jsonl", tmp_path / "no.txt"):
        with pytest.raises(FoLoRAError, match=f"{dataset}: no data set"):
            prepare(tiny_base, tiny_params, tmp_path / "out", dataset)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "data.jsonl: no data set"),
        ("", "data.jsonl: the data set is empty: at least one row"),
        (
            '{"question": "1", "reply": "2"}\n',
            "row 0: 'answer' is undefined: mend the template in params.yaml; the columns are question",
        ),
        ('{"question": "1", "answer": ""}\n', "row 0 of the task: the response is empty"),
        ('{"question": "1", "answer": "2"}\n{"question": "11111", "answer": "2222222"}\n', "row 1 of the task: "),
        ('{"question": "1", "answer": "2"}\n{"question":\n', "data.jsonl: cannot be read as json"),
    ],
    ids=["missing", "empty", "column", "response", "long", "broken"],
)
def test_bad_data_is_one_line(
    content: str | None, expected: str, pipeline: Pipeline, save_params: SaveParams, tmp_path: Path, refused: Refused
) -> None:
    if content is not None:
        (tmp_path / "data.jsonl").write_text(content)
    values = pipeline.values()
    values["tasks"]["subtraction"] |= {"dataset": str(tmp_path / "data.jsonl"), "max_length": 12}
    values["tasks"]["subtraction"] |= {"prompt": "{{ question }}>", "response": "{{ answer }}"}
    line = refused("task", "subtraction", "--foundation", pipeline.foundation, "--params", save_params(values))
    assert expected in line
    if expected.startswith("row 1"):
        assert "have 15 tokens, more than max_length 12: raise tasks.*.max_length" in line


def test_bad_template_is_named(tiny_base: Base, tiny_params: Params, tmp_path: Path) -> None:
    data = write_rows(ROWS, tmp_path / "data.jsonl")
    with pytest.raises(FoLoRAError, match=r"unexpected end of template.*mend the template"):
        prepare(tiny_base, tiny_params, tmp_path / "out", data, prompt="{{ question")
    assert not (tmp_path / "out").exists()


def test_max_length_is_inclusive(tiny_base: Base, tiny_params: Params, tmp_path: Path) -> None:
    data = write_rows(ROWS[:1], tmp_path / "data.jsonl")
    length = len("27-15>12") + 2
    (row,) = prepare(tiny_base, tiny_params, tmp_path / "out", data, max_length=length)
    assert len(row["input_ids"]) == length
    with pytest.raises(FoLoRAError, match=f"have {length} tokens, more than max_length {length - 1}"):
        prepare(tiny_base, tiny_params, tmp_path / "out", data, max_length=length - 1)
