"""The task stage: rows of a data set, rendered through templates and tokenised, with a mask of the response tokens."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from folora.errors import FoLoRAError
from folora.storage import write_table

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from folora.base import Base
    from folora.params import Task

FORMATS = (".jsonl", ".csv", ".parquet")


def prepare_task(settings: Task, base: Base, output: Path) -> None:
    """Tokenise the training rows of a task and write them as Parquet.

    The columns are ``input_ids`` (list of int32: BOS, prompt, response, EOS) and ``loss_mask`` (list of bool: true on
    response and EOS).

    Raises:
        FoLoRAError: the data set is missing or empty, lacks a column of a template, or a row is too long for
            ``max_length`` or that for the model's context.
    """
    import pyarrow as pa

    base.check_length(settings.max_length, "tasks.*.max_length")
    rows = read_rows(settings.dataset, "tasks.*.dataset")
    tokenised = tokenise(rows, settings, base.load_tokenizer())
    table = pa.table(
        {
            "input_ids": pa.array([ids for ids, _ in tokenised], pa.list_(pa.int32())),
            "loss_mask": pa.array([mask for _, mask in tokenised], pa.list_(pa.bool_())),
        }
    )
    write_table(output, table, {"artefact": "task", **base.identity, "task": settings.model_dump()})


def read_rows(dataset: str, key: str) -> Dataset:
    """The training rows of a local data set.

    Args:
        dataset: a JSONL, CSV or Parquet file, or a folder with a ``train`` file of such a format.
        key: what names it in params.yaml, for errors.

    Raises:
        FoLoRAError: nothing is there, or there are no rows.
    """
    from datasets.exceptions import DatasetGenerationError

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
    except (DatasetGenerationError, ValueError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
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
        rows = csv.DictReader(file) if path.suffix == ".csv" else (json.loads(line) for line in file if line.strip())
        return Dataset.from_list(list(rows))


def tokenise(rows: Dataset, settings: Task, tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[bool]]]:
    """Render and tokenise every row: token ids and loss mask, both of the row's length."""
    texts = render(rows, [settings.prompt, settings.response], settings.dataset)
    return [
        _tokenise_row(number, prompt, response, settings.max_length, tokenizer)
        for number, (prompt, response) in enumerate(texts)
    ]


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
    except (TemplateError, TypeError, ValueError) as error:
        columns = ", ".join(rows.column_names)
        raise FoLoRAError(
            f"{source}, row {number}: {error}: mend the template in params.yaml; the columns are {columns}"
        ) from error
    return rendered


def _refuse_missing(value: Any) -> Any:
    if value is None:
        raise ValueError("a value is missing")
    return value


def _tokenise_row(
    number: int, prompt: str, response: str, max_length: int, tokenizer: Any
) -> tuple[list[int], list[bool]]:
    if not response:
        raise FoLoRAError(f"row {number} of the task: the response is empty: remove the row or change the template")
    prompt_ids = tokenizer(prompt)["input_ids"]
    if prompt_ids[:1] != [tokenizer.bos_token_id]:  # some tokenizers add none; proxy text and evaluation start with it
        prompt_ids = [tokenizer.bos_token_id, *prompt_ids]
    response_ids = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in prompt_ids[1:] + response_ids[:-1]:
        raise FoLoRAError(
            f"row {number} of the task: {prompt + response!r} has a character the tokenizer does not know"
        )
    length = len(prompt_ids) + len(response_ids)
    if length > max_length:
        raise FoLoRAError(
            f"row {number} of the task: prompt and response have {length} tokens, more than max_length {max_length}: "
            "raise tasks.*.max_length or shorten the row"
        )
    return prompt_ids + response_ids, [False] * len(prompt_ids) + [True] * len(response_ids)
