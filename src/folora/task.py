"""The task stage: rows of a data set as text, tokenised, with a mask of the tokens that are learned.

A row becomes segments of text, each learned or not: a prompt and a response, or the turns of a chat.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from folora.errors import FoLoRAError
from folora.hub import full_cache
from folora.storage import with_columns, write_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from folora.base import Base
    from folora.params import Task

FORMATS = (".jsonl", ".csv", ".parquet")
Segments = list[tuple[str, bool]]  # text, and whether it is learned
ASSISTANT = "assistant"
DEEPEST = 12  # tables and lists within a row; the time that datasets takes doubles with each
# what the libraries raise of a file that is damaged, beside their own errors
ROW_ERRORS = (OSError, ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError)
# what a template may raise beside jinja2's own errors, whatever it computes
TEMPLATE_ERRORS = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RuntimeError, MemoryError)


@dataclass
class TokenRow:
    """Token ids, BOS first, and which of them are learned."""

    ids: list[int]
    learned: list[bool]

    def __len__(self) -> int:
        return len(self.ids)


def prepare_task(settings: Task, base: Base, output: Path) -> None:
    """Tokenise the training rows of a task and write them as Parquet; print how many were dropped or cut.

    The columns are ``input_ids`` (list of int32, BOS first) and ``loss_mask`` (list of bool: true on what is learned).

    Raises:
        FoLoRAError: the data set is missing or empty, lacks a column, has a row that cannot be rendered or is too
            long, or ``max_length`` is more than the model's context.
    """
    import pyarrow as pa

    base.check_length(settings.max_length, "tasks.*.max_length")
    rows = read_rows(settings.dataset, "tasks.*.dataset")
    if settings.rows is not None:
        rows = rows.select(range(min(settings.rows, len(rows))))
    tokenizer = base.load_tokenizer()
    made = [
        tokenise(number, segments, settings, tokenizer)
        for number, segments in enumerate(
            tqdm(texts(rows, settings, tokenizer), "task", len(rows), unit="row", disable=None)
        )
    ]
    kept = [fit for one in made if (fit := fitted(one, settings)) is not None]
    dropped = len(made) - len(kept)
    cut = sum(len(one) > settings.max_length for one in made) - dropped
    if not kept:
        raise FoLoRAError(f"{settings.dataset}: no row fits max_length {settings.max_length}: raise it")
    sequences = packed(kept, settings.max_length) if settings.packing else kept
    print(f"{len(made):,} rows, {dropped:,} dropped, {cut:,} cut: {len(sequences):,} sequences")
    table = pa.table(
        {
            "input_ids": pa.array([one.ids for one in sequences], pa.list_(pa.int32())),
            "loss_mask": pa.array([one.learned for one in sequences], pa.list_(pa.bool_())),
        }
    )
    about = {"artefact": "task", **base.identity, "task": settings.model_dump()}
    write_table(output, table, about | {"rows": len(made), "dropped": dropped, "cut": cut})


def masked_rows(path: Path, table: pa.Table) -> list[tuple[list[int], list[bool]]]:
    """Token ids of every row of the stage's table, and which of them are learned; ``path`` names it in errors.

    Raises:
        FoLoRAError: a column is missing, of another type or of other lengths.
    """
    table = with_columns(path, table, {"input_ids": "[int32]", "loss_mask": "[bool]"})
    rows = list(zip(table["input_ids"].to_pylist(), table["loss_mask"].to_pylist(), strict=True))
    if any(len(ids) != len(mask) for ids, mask in rows):
        raise FoLoRAError(f"{path}: a row has other tokens than marks of what is learned: run the task stage again")
    return rows


def read_rows(dataset: str, key: str) -> Dataset:
    """The training rows of a local data set.

    Args:
        dataset: a JSONL, CSV or Parquet file, or a folder with a ``train`` file of such a format.
        key: what names it in params.yaml, for errors.

    Raises:
        FoLoRAError: nothing is there, there are no rows, or the disk of the library's cache is full.
    """
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowException

    path = Path(dataset)
    if path.is_dir():
        path = next((path / f"train{suffix}" for suffix in FORMATS if (path / f"train{suffix}").exists()), path)
    if path.suffix not in FORMATS or not path.is_file():
        raise FoLoRAError(
            f"{dataset}: no data set here: {key} is a .jsonl, .csv or .parquet file, or a folder with a "
            "train file of such a format"
        )
    if path.stat().st_size == 0:
        raise FoLoRAError(f"{path}: the data set is empty: at least one row is needed")
    try:
        rows = _load(path)
    except (DatasetGenerationError, ArrowException, csv.Error, *ROW_ERRORS) as error:
        if full := full_cache(error):
            raise FoLoRAError(full) from error
        reason = next(iter(str(error.__cause__ or error).strip().splitlines()), type(error).__name__)
        raise FoLoRAError(f"{path}: cannot be read as {path.suffix[1:]}: {reason}") from error
    if not len(rows):
        raise FoLoRAError(f"{path}: the data set is empty: at least one row is needed")
    return rows


def _load(path: Path) -> Dataset:
    """Read a file so that text stays text: the library's own readers make numbers of "007" and dates of dates."""
    from datasets import Dataset, load_dataset

    if path.suffix == ".parquet":
        return load_dataset("parquet", data_files=str(path), split="train")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file) if path.suffix == ".csv" else map(json.loads, filter(str.strip, file)))
    if not all(isinstance(row, dict) and None not in row for row in rows):
        raise ValueError("a line is no table of columns, or has more than the first line names")
    if max(map(_depth, rows), default=0) > DEEPEST:
        raise ValueError(f"a value is nested more than {DEEPEST} deep")
    return Dataset.from_list(rows)


def _depth(value: Any) -> int:
    """How deep a JSON value is nested: 0 of a number."""
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0


def render(rows: Dataset, templates: list[str], source: str) -> list[list[str]]:
    """The text of every template for every row; ``source`` names the data set in errors.

    Raises:
        FoLoRAError: a template is not valid, or a row lacks a value for it.
    """
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, finalize=_refuse_missing, keep_trailing_newline=True
    )
    number = 0
    try:
        compiled = [environment.from_string(template) for template in templates]
        rendered = []
        for number, row in enumerate(rows):  # noqa: B007 - the error names it
            rendered.append([template.render(row) for template in compiled])
    except (TemplateError, *TEMPLATE_ERRORS) as error:
        columns = ", ".join(rows.column_names)
        raise FoLoRAError(
            f"{source}, row {number}: {error}: mend the template in params.yaml; the columns are {columns}"
        ) from error
    return rendered


def _refuse_missing(value: Any) -> Any:
    if value is None:
        raise ValueError("a value is missing")
    return value


def texts(rows: Dataset, settings: Task, tokenizer: PreTrainedTokenizerBase) -> Iterator[Segments]:
    """The segments of every row.

    Raises:
        FoLoRAError: a row lacks a value, or the tokenizer has no chat template or refuses the chat.
    """
    if settings.messages is not None:
        if settings.messages not in rows.column_names:
            columns = ", ".join(rows.column_names)
            raise FoLoRAError(f"tasks.*.messages: {settings.messages!r} is no column of {settings.dataset}: {columns}")
        chats = rows[settings.messages]
        yield from (chat_segments(number, chat, tokenizer) for number, chat in enumerate(chats))
        return
    rendered = render(rows, [settings.prompt or "", settings.response or ""], settings.dataset)
    for number, (prompt, response) in enumerate(rendered):
        if not response:
            where = f"{settings.dataset}, row {number}"
            raise FoLoRAError(f"{where}: the response is empty: remove the row or change the template")
        if settings.chat:
            turns = [{"role": "user", "content": prompt}, {"role": ASSISTANT, "content": response}]
            yield chat_segments(number, turns, tokenizer)
        else:
            yield [(prompt, False), (response, True)]


def chat_segments(number: int, turns: Any, tokenizer: PreTrainedTokenizerBase) -> Segments:
    """A chat in the tokenizer's template; the assistant's turns are learned, what follows the last of them is left out.

    Raises:
        FoLoRAError: no template, not a chat, or a template that writes earlier turns anew when one is added.
    """
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise FoLoRAError("tasks.*: the tokenizer has no chat template: use prompt and response without chat")
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns
    ):
        raise FoLoRAError(f"{_row(number)}: not a list of messages, each with a role and a content: mend the row")
    segments: Segments = []
    written = ""
    try:
        for position, turn in enumerate(turns):
            if turn["role"] == ASSISTANT:
                before = str(
                    tokenizer.apply_chat_template(turns[:position], tokenize=False, add_generation_prompt=True)
                )
                after = str(tokenizer.apply_chat_template(turns[: position + 1], tokenize=False))
                if not (before.startswith(written) and after.startswith(before)):
                    raise FoLoRAError(
                        "tasks.*: the chat template changes earlier turns when one is added: use prompt and response"
                    )
                segments += [(before[len(written) :], False), (after[len(before) :], True)]
                written = after
    except (TemplateError, *TEMPLATE_ERRORS) as error:
        raise FoLoRAError(f"{_row(number)}: the chat template refuses it: {error}") from error
    if not segments:
        raise FoLoRAError(f"{_row(number)}: no message of role {ASSISTANT!r}, so nothing to learn: remove the row")
    return segments


def tokenise(number: int, segments: Segments, settings: Task, tokenizer: PreTrainedTokenizerBase) -> TokenRow:
    """Token ids of one row: BOS, its segments and, but after a chat, EOS.

    Raises:
        FoLoRAError: a character is unknown, or the row too long and to be refused.
    """
    chat = settings.chat or settings.messages is not None
    ids: list[int] = []
    learned: list[bool] = []
    for text, counts in segments:
        new = tokenizer(text, add_special_tokens=False)["input_ids"] if ids else encode(text, tokenizer)
        ids += new
        learned += [counts] * len(new)
    if not chat:
        ids, learned = [*ids, tokenizer.eos_token_id], [*learned, True]
    if settings.learn == "all":
        learned = [False, *[True] * (len(ids) - 1)]
    unknown = {tokenizer.unk_token_id} - {None, tokenizer.bos_token_id, tokenizer.eos_token_id}  # GPT-2's are one token
    if unknown.intersection(ids[1:]):
        text = "".join(text for text, _ in segments)
        raise FoLoRAError(f"{_row(number)}: {text!r} has a character the tokenizer does not know")
    if len(ids) > settings.max_length and settings.too_long == "refuse":
        raise FoLoRAError(
            f"{_row(number)}: prompt and response have {len(ids)} tokens, more than max_length {settings.max_length}: "
            "raise tasks.*.max_length, shorten the row, or say with tasks.*.too_long what becomes of it"
        )
    return TokenRow(ids, learned)


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text with BOS first, once: some tokenizers add none, others more, and chat templates write it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids if ids[:1] == [tokenizer.bos_token_id] else [tokenizer.bos_token_id, *ids]


def fitted(sequence: TokenRow, settings: Task) -> TokenRow | None:
    """A sequence of at most ``max_length`` tokens; None if it is dropped, or nothing of it is left to learn."""
    if len(sequence) <= settings.max_length:
        return sequence
    cut = TokenRow(sequence.ids[: settings.max_length], sequence.learned[: settings.max_length])
    return cut if settings.too_long == "truncate" and any(cut.learned) else None


def packed(sequences: list[TokenRow], length: int) -> list[TokenRow]:
    """Join neighbours as long as they fit into ``length`` tokens."""
    joined = [TokenRow([], [])]
    for one in sequences:
        if joined[-1].ids and len(joined[-1]) + len(one) > length:
            joined.append(TokenRow([], []))
        joined[-1].ids += one.ids
        joined[-1].learned += one.learned
    return joined


def _row(number: int) -> str:
    return f"row {number} of the task"
