"""Artefacts on disk: written whole or not at all, each with a manifest that says what it was made from.

A manifest is a flat JSON object. It lives in the metadata of a safetensors or Parquet file, or as ``manifest.json``
in a folder. Readers compare it with what they expect and name the field that differs. Its field ``made_with`` names the
libraries and threads: equal bytes are promised where these are equal. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import reprlib
import shutil
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from functools import cache
from glob import escape
from importlib.metadata import version
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from folora.errors import FoLoRAError, describe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pyarrow as pa
    from pydantic import BaseModel
    from torch import Tensor

Manifest = dict[str, Any]
Record = dict[str, Any]  # a row of a table
M = TypeVar("M", bound="BaseModel")

FORMAT = 1
MANIFEST_FILE = "manifest.json"
SNAKEMAKE_STAMP = ".snakemake_timestamp"  # a file that it puts into a folder it has made
MADE_WITH = "made_with"
LIBRARIES = ("torch", "transformers", "peft", "lm-eval", "numpy", "tokenizers")  # what artefacts are computed with
CONDITIONS: dict[str, Any] = {}  # the threads of this process, where its command fixed them, and its GPU
PARTIAL = re.compile(r"\..+\.(\d+)\.partial")  # half written, with the id of the process
# what the folder of a run holds, and that of an adapter as PEFT writes it
ADAPTER, CHECKPOINTS, HISTORY_FILE = "adapter", "checkpoints", "history.parquet"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
METRICS_FILE, ANSWERS_FILE, TOKENS_FILE = "metrics.parquet", "answers.parquet", "tokens.parquet"  # results
WORD = 8  # bytes of the number that a safetensors file begins with; the header after it fills such words
METADATA_KEY = "folora"  # one key only: safetensors writes several in an order that changes from run to run


@contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to; move it into place when the block ends well, else remove it.

    What killed processes have left half written of the same output is removed first.

    Raises:
        FoLoRAError: the disk is full, the folder cannot be written, or a file would take the place of a folder.
    """
    if path.name in ("", ".."):
        raise FoLoRAError(f"{path}: is a folder that is there for more: name one to make, or a file")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{escape(path.name)}.*.partial"):
            if left == partial or abandoned(left):  # in a container a process often has the id of the one before it
                _remove(left)
        yield partial
        if path.is_dir():
            if not partial.is_dir():
                raise FoLoRAError(f"{path}: is a folder: name a file")
            shutil.rmtree(path)
        partial.replace(path)
    except Exception as error:
        _remove(partial)
        if isinstance(error, FoLoRAError) or not _is_io_error(error):
            raise
        raise _unwritable(path, error) from error
    except BaseException:
        _remove(partial)
        raise


def lines_of(path: Path) -> list[str]:
    """Lines of a text file that is no artefact; none where it cannot be read, and whatever a power cut left in it."""
    with suppress(OSError):
        return path.read_text(errors="replace").splitlines()
    return []


def abandoned(path: Path) -> bool:
    """Whether a path is what a process that has ended left half written."""
    match = PARTIAL.fullmatch(path.name)
    return match is not None and not psutil.pid_exists(int(match[1]))


def check_writable(path: Path) -> None:
    """Make the folder of ``path`` and try to write in it, before long work starts.

    Raises:
        FoLoRAError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: Exception) -> FoLoRAError:
    return FoLoRAError(f"{path}: cannot be written ({error}): free space or make the folder writable")


def _is_io_error(error: Exception) -> bool:
    # safetensors reports a full disk as an exception of its own, which names the operating system's error
    return isinstance(error, OSError) or "os error" in str(error)


def _remove(path: Path) -> None:
    with suppress(OSError):  # where nothing could be written there is nothing to remove
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def made_with() -> Manifest:
    """Versions of libraries and the number of threads, as the manifest field that says what bytes depend on.

    The build of a version, as in 2.13.0+cpu, is left out: bytes differ only where something that was computed does.
    """
    return {MADE_WITH: {name: text.partition("+")[0] for name, text in versions().items()} | CONDITIONS}


@cache
def versions() -> dict[str, str]:
    """Installed versions of what artefacts are computed with."""
    return {name: version(name) for name in LIBRARIES}


def canonical_json(value: Any) -> str:
    """JSON with sorted keys: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode(errors="surrogatepass")).hexdigest()


def identity_of(manifest: Manifest) -> str:
    """Digest of a manifest but for what it was made with: made again under another version, it is the same thing."""
    return digest_of({field: value for field, value in manifest.items() if field != MADE_WITH})


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    Raises:
        FoLoRAError: there is no such file.
    """
    try:
        with require(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FoLoRAError(f"{path}: cannot be read ({error}): see that it is a file and yours to read") from error


def digest_of_folder(folder: Path, pattern: str = "*") -> str:
    """SHA-256 of the names and contents of a folder's files at any depth but Snakemake's, in hexadecimal."""
    files = sorted(path for path in folder.rglob(pattern) if path.is_file() and path.name != SNAKEMAKE_STAMP)
    return digest_of({path.relative_to(folder).as_posix(): digest_of_file(path) for path in files})


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON with sorted keys."""
    path.write_text(json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FoLoRAError: the file is missing or not JSON.
    """
    require(path)
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError, OSError) as error:  # of ValueError: a number with thousands of digits, too
        raise FoLoRAError(f"{path}: not valid JSON ({error}): delete it and run its stage again") from error


def require(path: Path) -> Path:
    """Return ``path`` if it exists.

    Raises:
        FoLoRAError: it does not.
    """
    if not path.exists():
        raise FoLoRAError(f"{path}: not found: run the stage that makes it (`dvc repro` runs all that is missing)")
    return path


def check_manifest(path: Path, manifest: Manifest, **expected: Any) -> None:
    """Compare fields of a manifest with what the reader expects.

    Raises:
        FoLoRAError: the artefact is of another kind, or a field differs.
    """
    check_fields(path, manifest, format=FORMAT, **expected)


def check_fields(path: Path, manifest: Manifest, **expected: Any) -> None:
    """Compare fields of a manifest, or of a part of one, with what the reader expects.

    Raises:
        FoLoRAError: a field differs.
    """
    if not isinstance(manifest, dict):
        raise FoLoRAError(f"{path}: its manifest is no table of fields: run the stage that makes it again")
    for field, value in expected.items():
        if manifest.get(field) != value:
            raise FoLoRAError(
                f"{path}: made with {field} {_short(manifest.get(field))}, but {_short(value)} is expected: "
                "run the stage that makes it again"
            )


def fields_of(path: Path, model: type[M], manifest: Manifest) -> M:
    """The fields of a manifest that a reader uses, of the types that it relies on.

    Raises:
        FoLoRAError: a field is missing or not of its type.
    """
    from pydantic import ValidationError

    try:
        return model.model_validate(manifest)
    except ValidationError as error:
        raise FoLoRAError(f"{path}: {describe(error)}: delete it and run its stage again") from error


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else reprlib.repr(value)  # which bounds depth, too
    return text if len(text) <= 60 else f"{text[:12]}…"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], manifest: Manifest) -> None:
    """Write tensors and their manifest to a safetensors file, whole or not at all.

    The bytes are those of ``safetensors.torch.save``, which wants all tensors in memory, contiguous and on the CPU.
    Here they are written one by one, so what a mapping such as ``TensorFiles`` reads when it is asked is not held.
    """
    import safetensors.torch
    import torch

    metadata = {METADATA_KEY: canonical_json({"format": FORMAT, **made_with(), **manifest})}
    # the library says how types are called, and in which order tensors lie
    empty = {name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()}
    header: dict[str, Any] = json.loads(safetensors.torch.save(empty, metadata)[WORD:])
    names = [name for name in header if name in empty]
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] |= {"shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % WORD)
    with publish(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(WORD, "little"))
        file.write(text)
        for name in names:
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_tensors(path: Path, **expected: Any) -> tuple[dict[str, Tensor], Manifest]:
    """Read a safetensors file, check its manifest and that every value is finite.

    Raises:
        FoLoRAError: missing, truncated, another artefact, or not finite.
    """
    with _opened(path) as file:
        manifest = tensor_manifest(file, path, **expected)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    for name, tensor in tensors.items():
        check_finite(path, name, tensor)
    return tensors, manifest


class TensorFiles(Mapping[str, "Tensor"]):
    """The tensors of safetensors files by name, each read from its file whenever it is asked for.

    Attributes:
        manifests: of the files.
    """

    def __init__(self, *paths: Path, **expected: Any) -> None:
        """Check the manifests of the files, which hold tensors of different names.

        Raises:
            FoLoRAError: a file is missing, truncated, or another artefact.
        """
        self.manifests: list[Manifest] = []
        self._places: dict[str, Path] = {}
        for path in paths:
            with _opened(path) as file:
                self.manifests.append(tensor_manifest(file, path, **expected))
                self._places |= dict.fromkeys(file.keys(), path)

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor, on the CPU; its memory is the file's until it is written to."""
        with _opened(self._places[name]) as file:  # opened each time, since an open file keeps all that was read of it
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        """Names of the tensors."""
        return iter(self._places)

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self._places)


def check_finite(path: Path, name: str, tensor: Tensor) -> None:
    """See that every value of a tensor that was read is finite.

    Raises:
        FoLoRAError: it is not.
    """
    import torch

    if not torch.isfinite(tensor).all():
        raise FoLoRAError(f"{path}: {name} holds NaN or infinite values: delete the file and run its stage again")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open safetensors file; that it is missing or damaged is one line."""
    from safetensors import SafetensorError, safe_open

    require(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise FoLoRAError(f"{path}: damaged or truncated ({error}): delete it and run its stage again") from error


def tensor_manifest(file: Any, path: Path, **expected: Any) -> Manifest:
    """The checked manifest of a safetensors file that ``safe_open`` has opened, of any framework.

    Raises:
        FoLoRAError: it has none, or is another artefact.
    """
    manifest = _manifest_from((file.metadata() or {}).get(METADATA_KEY), path)
    check_manifest(path, manifest, **expected)
    return manifest


def write_table(path: Path, table: pa.Table, manifest: Manifest) -> None:
    """Write a table and its manifest to a Parquet file, whole or not at all."""
    import pyarrow.parquet as pq

    metadata = {METADATA_KEY: canonical_json({"format": FORMAT, **made_with(), **manifest})}
    with publish(path) as partial:
        pq.write_table(table.replace_schema_metadata(metadata), partial, compression="zstd")


def read_table(path: Path, columns: Mapping[str, str] | None = None, **expected: Any) -> tuple[pa.Table, Manifest]:
    """Read a Parquet file and check its manifest.

    Args:
        path: the file.
        columns: of ``with_columns``.
        expected: manifest fields.

    Raises:
        FoLoRAError: missing, truncated or another artefact, or a column is missing or of another type.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    require(path)
    try:
        table = pq.read_table(path)
        table.validate(full=True)  # else text that is none is found only when it is used
    except (pa.ArrowException, OSError, ValueError) as error:  # of ValueError: a message about text that is none
        raise FoLoRAError(f"{path}: damaged or truncated ({error}): delete it and run its stage again") from error
    metadata = table.schema.metadata or {}
    manifest = _manifest_from(metadata.get(METADATA_KEY.encode()), path)
    check_manifest(path, manifest, **expected)
    return with_columns(path, table, columns or {}), manifest


def with_columns(path: Path, table: pa.Table, columns: Mapping[str, str]) -> pa.Table:
    """A table with the columns that its reader uses, none of their values missing, cast to types.

    Args:
        path: of the table.
        table: the table.
        columns: name to type, such as ``int32``, or ``[int32]`` for lists.

    Raises:
        FoLoRAError: a column or a value is missing, or of another type.
    """
    import pyarrow as pa

    for name, kind in columns.items():
        lists, element = kind.startswith("["), pa.type_for_alias(kind.strip("[]"))
        try:
            column = table[name].cast(pa.list_(element) if lists else element)
            if column.null_count or (lists and column.combine_chunks().flatten().null_count):
                raise ValueError(f"{name} lacks values")
            table = table.set_column(table.column_names.index(name), name, column)
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise FoLoRAError(f"{path}: has no column {name} of {kind}: delete it and run its stage again") from error
    return table


def _manifest_from(text: str | bytes | None, path: Path) -> Manifest:
    if text is None:
        raise FoLoRAError(f"{path}: carries no FoLoRA manifest: it was not made by this pipeline")
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise FoLoRAError(f"{path}: its manifest is damaged ({error}): delete it and run its stage again") from error
