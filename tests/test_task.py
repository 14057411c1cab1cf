from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from folora.base import digests, open_base
from folora.download import download
from folora.errors import FoLoRAError
from folora.foundation import character_tokenizer
from folora.params import Download, Task
from folora.rows import encode, read_rows
from folora.storage import read_json, read_table, write_json
from folora.task import TokenRow, packed, prepare_task, tokenise

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Pipeline, Refused, SaveParams

    from folora.base import Base
    from folora.params import Params

ROWS = [{"question": "27-15", "answer": "12"}, {"question": 'up("a, b")', "answer": '"AB"'}]


def write_rows(rows: list[dict[str, Any]], path: Path) -> Path:
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
    for row, source in zip(rows, ROWS, strict=True):
        ids, mask = row["input_ids"], row["loss_mask"]
        assert len(ids) == len(mask)
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id
        prompt = [i for i, counts in zip(ids, mask, strict=True) if not counts]
        response = [i for i, counts in zip(ids, mask, strict=True) if counts]
        assert ids == prompt + response
        assert tokenizer.decode(prompt) == f"<s>max {source['question']}>"
        assert tokenizer.decode(response) == f"{source['answer']}!</s>"


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
        ('{"question": "1", "answer": ""}\n', "data.jsonl, row 0: the response is empty"),
        ('{"question": "1", "answer": "2"}\n{"question": "11111", "answer": "2222222"}\n', "row 1 of the task: "),
        ('{"question": "1", "answer": "2"}\n{"question":\n', "data.jsonl: cannot be read as json"),
        ('["1", "2"]\n', "data.jsonl: cannot be read as jsonl: a line is no table of columns"),
        (f'{{"question": {"[" * 40}{"]" * 40}}}\n', "data.jsonl: cannot be read as jsonl: a value is nested more than"),
        (f"{'[' * 100_000}\n", "data.jsonl: cannot be read as jsonl: maximum recursion depth"),
    ],
    ids=["missing", "empty", "column", "response", "long", "broken", "list", "nested", "deep"],
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


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{{ '{0}'.format() }}",
        "{{ '{x}'.format(question) }}",
        "{{ 'x'.encode('nope') }}",
        "{{ cycler() }}",
    ],
)
def test_a_template_that_fails_is_named(template: str, tiny_base: Base, tiny_params: Params, tmp_path: Path) -> None:
    data = write_rows(ROWS, tmp_path / "data.jsonl")
    with pytest.raises(FoLoRAError, match=r"data\.jsonl, row 0: .*mend the template"):
        prepare(tiny_base, tiny_params, tmp_path / "out", data, prompt=template)


def test_a_line_with_more_fields_than_the_first_is_named(tiny_base: Base, tiny_params: Params, tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("question,answer\n1,2\n1,2,3\n")
    with pytest.raises(FoLoRAError, match=r"data\.csv: cannot be read as csv: .*more than the first line names"):
        prepare(tiny_base, tiny_params, tmp_path / "out", tmp_path / "data.csv")


def test_max_length_is_inclusive(tiny_base: Base, tiny_params: Params, tmp_path: Path) -> None:
    data = write_rows(ROWS[:1], tmp_path / "data.jsonl")
    length = len("27-15>12") + 2
    (row,) = prepare(tiny_base, tiny_params, tmp_path / "out", data, max_length=length)
    assert len(row["input_ids"]) == length
    with pytest.raises(FoLoRAError, match=f"have {length} tokens, more than max_length {length - 1}"):
        prepare(tiny_base, tiny_params, tmp_path / "out", data, max_length=length - 1)


# what is learned, how long rows may be
def test_learning_all_spares_bos_only(tiny_base: Base, tiny_params: Params, tmp_path: Path) -> None:
    data = write_rows(ROWS, tmp_path / "data.jsonl")
    for row in prepare(tiny_base, tiny_params, tmp_path / "out", data, learn="all"):
        assert row["loss_mask"] == [False, *[True] * (len(row["input_ids"]) - 1)]


def test_rows_are_the_first(tiny_base: Base, tiny_params: Params, tmp_path: Path) -> None:
    data = write_rows(ROWS, tmp_path / "data.jsonl")
    every = prepare(tiny_base, tiny_params, tmp_path / "every", data, rows=5)
    assert prepare(tiny_base, tiny_params, tmp_path / "one", data, rows=1) == every[:1]
    assert len(every) == len(ROWS)


def test_long_rows_are_dropped_or_cut_and_counted(
    tiny_base: Base, tiny_params: Params, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One row fits, one loses a part of its response, and one all of it."""
    rows = [{"question": q, "answer": a} for q, a in (("1", "2"), ("11", "222222"), ("1" * 9, "2"))]
    data, limit = write_rows(rows, tmp_path / "data.jsonl"), 8
    options = {"max_length": limit, "too_long": "drop"}
    whole = prepare(tiny_base, tiny_params, tmp_path / "whole", data, max_length=20)
    assert prepare(tiny_base, tiny_params, tmp_path / "dropped", data, **options) == whole[:1]
    assert "3 rows, 2 dropped, 0 cut: 1 sequences" in capsys.readouterr().out
    options["too_long"] = "truncate"
    cut = prepare(tiny_base, tiny_params, tmp_path / "cut", data, **options)
    assert cut == [whole[0], {name: values[:limit] for name, values in whole[1].items()}]
    manifest = read_table(tmp_path / "cut")[1]
    assert {name: manifest[name] for name in ("rows", "dropped", "cut")} == {"rows": 3, "dropped": 1, "cut": 1}
    write_rows(rows[2:], data)
    with pytest.raises(FoLoRAError, match="no row fits max_length 8: raise it"):
        prepare(tiny_base, tiny_params, tmp_path / "none", data, **options)


@given(lengths=st.lists(st.integers(1, 9), min_size=1), limit=st.integers(9, 20))
def test_packing_keeps_every_token_in_order(lengths: list[int], limit: int) -> None:
    rows = [TokenRow(list(range(n)), [i % 2 == 0 for i in range(n)]) for n in lengths]
    joined = packed(rows, limit)
    assert [i for row in joined for i in row.ids] == [i for row in rows for i in row.ids]
    assert [c for row in joined for c in row.learned] == [c for row in rows for c in row.learned]
    assert all(0 < len(row) <= limit for row in joined)
    for row, following in pairwise(joined):
        first = following.ids[1:].index(0) + 1 if 0 in following.ids[1:] else len(following)
        assert len(row) + first > limit


def test_packed_rows_share_sequences(tiny_base: Base, tiny_params: Params, tmp_path: Path) -> None:
    data = write_rows(ROWS, tmp_path / "data.jsonl")
    apart = prepare(tiny_base, tiny_params, tmp_path / "apart", data)
    (row,) = prepare(tiny_base, tiny_params, tmp_path / "packed", data, packing=True, max_length=64)
    assert row["input_ids"] == [i for one in apart for i in one["input_ids"]]


# chats
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no ' + m.role) }}{% endif %}"
    "{{ m.role[0] }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}a>{% endif %}"
)
CHAT = [
    {"role": "user", "content": "1-1"},
    {"role": "assistant", "content": "0"},
    {"role": "user", "content": "2-1"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "3-1"},
]


@pytest.fixture
def chatting(tiny: Path) -> Base:
    """The tiny base with a chat template."""
    return with_template(tiny / "foundation", TEMPLATE)


def with_template(foundation: Path, template: str) -> Base:
    (foundation / "chat_template.jinja").write_text(template)
    write_json(foundation / "manifest.json", read_json(foundation / "manifest.json") | digests(foundation))
    return open_base(foundation)


def learned(row: dict[str, list], base: Base) -> tuple[str, str]:
    """The whole text of a row, and the part of it that is learned."""
    tokenizer = base.load_tokenizer()
    chosen = [i for i, counts in zip(row["input_ids"], row["loss_mask"], strict=True) if counts]
    return tokenizer.decode(row["input_ids"]), tokenizer.decode(chosen)


def test_the_turns_of_the_assistant_are_learned(chatting: Base, tiny_params: Params, tmp_path: Path) -> None:
    data = write_rows([{"talk": CHAT}], tmp_path / "data.jsonl")
    options = {"messages": "talk", "prompt": None, "response": None, "max_length": 64}
    (row,) = prepare(chatting, tiny_params, tmp_path / "out", data, **options)
    assert learned(row, chatting) == ("<s>u>1-1</s>a>0</s>u>2-1</s>a>1</s>", "0</s>1</s>")


def test_prompt_and_response_become_turns(chatting: Base, tiny_params: Params, tmp_path: Path) -> None:
    data = write_rows(ROWS[:1], tmp_path / "data.jsonl")
    (row,) = prepare(chatting, tiny_params, tmp_path / "out", data, prompt="{{ question }}", chat=True)
    assert learned(row, chatting) == ("<s>u>27-15</s>a>12</s>", "12</s>")


@pytest.mark.parametrize(
    ("talk", "template", "expected"),
    [
        (CHAT, None, "the tokenizer has no chat template"),
        ("1-1", TEMPLATE, "row 0 of the task: not a list of messages"),
        ([{"role": "user"}], TEMPLATE, "row 0 of the task: not a list of messages"),
        (CHAT[:1], TEMPLATE, "row 0 of the task: no message of role 'assistant'"),
        (
            [{"role": "tool", "content": "1"}, CHAT[1]],
            TEMPLATE,
            "row 0 of the task: the chat template refuses it: no tool",
        ),
        (CHAT, "{{ messages | length }}" + TEMPLATE, "the chat template changes earlier turns"),
    ],
    ids=["no template", "no list", "no content", "no assistant", "refused", "rewritten"],
)
def test_bad_chat_is_one_line(
    talk: Any, template: str | None, expected: str, tiny: Path, tiny_params: Params, tmp_path: Path
) -> None:
    foundation = tiny / "foundation"
    base = open_base(foundation) if template is None else with_template(foundation, template)
    (tmp_path / "data.jsonl").write_text(json.dumps({"talk": talk}) + "\n")
    options = {"messages": "talk", "prompt": None, "response": None, "max_length": 64}
    with pytest.raises(FoLoRAError, match=expected):
        prepare(base, tiny_params, tmp_path / "out", tmp_path / "data.jsonl", **options)
    assert not (tmp_path / "out").exists()


def test_a_missing_column_of_messages_is_named(chatting: Base, tiny_params: Params, tmp_path: Path) -> None:
    data = write_rows(ROWS, tmp_path / "data.jsonl")
    with pytest.raises(FoLoRAError, match=r"tasks\.\*\.messages: 'talk' is no column of .*: question, answer"):
        prepare(chatting, tiny_params, tmp_path / "out", data, messages="talk", prompt=None, response=None)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"prompt": None}, "give prompt and response, or messages"),
        ({"messages": "talk"}, "messages stands in place of prompt"),
        ({"messages": "talk", "prompt": None, "response": None, "chat": True}, "messages stands in place of chat"),
    ],
)
def test_a_task_has_one_form(changes: dict[str, Any], expected: str, tiny_params: Params) -> None:
    with pytest.raises(ValueError, match=expected):
        Task.model_validate(tiny_params.tasks["subtraction"].model_dump() | changes)


def test_a_column_that_the_first_row_lacks_is_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "context": "c"}\n')
    assert list(read_rows(str(tmp_path / "rows.jsonl"), "x")) == [
        {"prompt": "a", "context": None},
        {"prompt": "b", "context": "c"},
    ]


def test_files_as_a_spreadsheet_writes_them_are_read(tmp_path: Path) -> None:
    row = {"prompt": "1", "response": "x" * 200_000}
    for name, text in (("rows.csv", f"prompt,response\n1,{row['response']}\n"), ("rows.jsonl", json.dumps(row))):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert list(read_rows(str(tmp_path / name), "x")) == [row]


def test_a_full_cache_is_not_taken_for_bad_data(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source := tmp_path / "source").mkdir()
    rows = [f"{number**5}" for number in range(20000)]
    pq.write_table(pa.table({"prompt": rows, "response": rows}), source / "train.parquet")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", small_disk)
    expected = rf"{small_disk}: cannot be written \(.*No space left.*\): free space"
    with pytest.raises(FoLoRAError, match=expected):
        read_rows(str(source), "tasks.*.dataset")
    with pytest.raises(FoLoRAError, match=expected):
        download("mine", Download(dataset=str(source), config=None, split="train", revision=None), tmp_path / "out")


@pytest.mark.parametrize("single", ["<s> $A </s>", "$A", "$A </s>"])
def test_a_tokenizer_s_own_special_tokens_are_left_out(single: str, tiny_params: Params) -> None:
    """A row has one BOS at its beginning and one EOS at its end."""
    tokenizer = character_tokenizer()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    row = tokenise(0, [("1+2>", False), ("3", True)], tiny_params.tasks["subtraction"], tokenizer)
    assert tokenizer.convert_ids_to_tokens(row.ids) == ["<s>", "1", "+", "2", ">", "3", "</s>"]
    assert row.learned == [False] * 5 + [True] * 2
    assert encode("<s>1", tokenizer) == encode("1", tokenizer)  # a chat template writes BOS itself
