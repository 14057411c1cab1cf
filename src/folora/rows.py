"""Rows of text: of users' data sets, rendered by templates, and of the tables of the proxy and the task stage."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from folora.errors import FoLoRAError
from folora.hub import full_cache
from folora.storage import with_columns

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

MaskedRow = tuple[list[int], list[bool]]  # token ids, BOS first, and which of them are learned
HELDOUT = "heldout"  # the base model's own text that drift is measured on; stands for its shard in manifest and seeds
PROXY_COLUMNS = {"token_ids": "[int32]"}  # that readers of proxy text use
FORMATS = (".jsonl", ".csv", ".parquet")
LONGEST = 2**31 - 1  # characters of a field of CSV
DEEPEST = 12  # tables and lists within a row; the time that datasets takes doubles with each
# what the libraries raise of a file that is damaged, beside their own errors
ROW_ERRORS = (OSError, ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError)
# what a template may raise beside jinja2's own errors, whatever it computes
TEMPLATE_ERRORS = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RuntimeError, MemoryError)


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
    csv.field_size_limit(LONGEST)
    with path.open(newline="", encoding="utf-8-sig") as file:  # as spreadsheets write it
        rows = list(csv.DictReader(file) if path.suffix == ".csv" else map(json.loads, filter(str.strip, file)))
    if not all(isinstance(row, dict) and None not in row for row in rows):
        raise ValueError("a line is no table of columns, or has more than the first line names")
    if max(map(_depth, rows), default=0) > DEEPEST:
        raise ValueError(f"a value is nested more than {DEEPEST} deep")
    columns = dict.fromkeys(column for row in rows for column in row)  # the first row may lack some
    return Dataset.from_dict({column: [row.get(column) for row in rows] for column in columns})


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


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text with BOS first, once: some tokenizers add none, others more, and chat templates write it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids if ids[:1] == [tokenizer.bos_token_id] else [tokenizer.bos_token_id, *ids]


def masked_rows(path: Path, table: pa.Table) -> list[MaskedRow]:
    """Token ids of every row of the task stage's table, and which of them are learned; ``path`` names it in errors.

    Raises:
        FoLoRAError: a column is missing, of another type or of other lengths.
    """
    table = with_columns(path, table, {"input_ids": "[int32]", "loss_mask": "[bool]"})
    rows = list(zip(table["input_ids"].to_pylist(), table["loss_mask"].to_pylist(), strict=True))
    if any(len(ids) != len(mask) for ids, mask in rows):
        raise FoLoRAError(f"{path}: a row has other tokens than marks of what is learned: run the task stage again")
    return rows
