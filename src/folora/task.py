"""The task stage: rows of a data set as text, tokenised, with a mask of the tokens that are learned.

A row becomes segments of text, each learned or not: a prompt and a response, or the turns of a chat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from folora.errors import FoLoRAError
from folora.rows import TEMPLATE_ERRORS, encode, read_rows, render
from folora.storage import write_table

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from folora.base import Base
    from folora.params import Task

Segments = list[tuple[str, bool]]  # text, and whether it is learned
ASSISTANT = "assistant"


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
