from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from folora.errors import FoLoRAError
from folora.storage import (
    CONDITIONS,
    LIBRARIES,
    MADE_WITH,
    TensorFiles,
    canonical_json,
    check_manifest,
    digest_of,
    digest_of_file,
    digest_of_folder,
    identity_of,
    made_with,
    publish,
    read_json,
    read_table,
    read_tensors,
    write_json,
    write_table,
    write_tensors,
)

if TYPE_CHECKING:
    from collections.abc import Callable

MANIFEST = {"artefact": "test", "model": "m", "nested": {"b": [1, 2], "a": None}, "text": "λ"}
TENSORS = {"b": torch.arange(6.0).reshape(2, 3).mT, "a": torch.zeros(2, dtype=torch.float64)}
TABLE = pa.table({"ids": pa.array([[1, 2], [3]], pa.list_(pa.int32()))})
BIG = {"x": torch.zeros(64 * 1024)}
BIG_TABLE = pa.table({"x": torch.randn(64 * 1024).numpy()})


def write_some_tensors(path: Path) -> None:
    write_tensors(path, TENSORS, MANIFEST)


def write_some_rows(path: Path) -> None:
    write_table(path, TABLE, MANIFEST)


both_kinds = pytest.mark.parametrize(
    ("write", "read"), [(write_some_tensors, read_tensors), (write_some_rows, read_table)], ids=["tensors", "table"]
)


@both_kinds
def test_what_is_written_is_read(write: Callable, read: Callable, tmp_path: Path) -> None:
    write(tmp_path / "new" / "file")
    content, manifest = read(tmp_path / "new" / "file", artefact="test", nested={"a": None, "b": [1, 2]})
    assert manifest == {"format": 1, **made_with(), **MANIFEST}
    if read is read_table:
        assert content.column("ids").to_pylist() == [[1, 2], [3]]
    else:
        assert content.keys() == TENSORS.keys()
        assert all(torch.equal(content[name], TENSORS[name]) for name in TENSORS)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


@both_kinds
def test_equal_content_gives_equal_bytes(write: Callable, read: Callable, tmp_path: Path) -> None:
    del read
    write(tmp_path / "one")
    write(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_tensors_are_written_as_the_library_writes_them(tmp_path: Path) -> None:
    """All sorts of types, shapes and names, in the order of the library."""
    tensors = {
        "transposed": torch.arange(6.0).reshape(2, 3).mT,
        "number": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        'λ/"quoted"\n': torch.arange(3, dtype=torch.bfloat16),
        "odd": torch.tensor([True, False, True]),
        **{f"{kind}".removeprefix("torch."): torch.ones(3, dtype=kind) for kind in (torch.int8, torch.int64)},
    }
    write_tensors(tmp_path / "file", tensors, MANIFEST)
    metadata = {"folora": canonical_json({"format": 1, **made_with(), **MANIFEST})}
    expected = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    assert (tmp_path / "file").read_bytes() == expected


def test_several_files_are_joined_one_tensor_at_a_time(tmp_path: Path) -> None:
    tensors = {f"{number}": torch.full((64, 64), float(number)) for number in range(6)}
    halves = [{name: tensors[name] for name in names} for names in ("135", "024")]
    for number, half in enumerate(halves):
        write_tensors(tmp_path / f"{number}", half, {"artefact": "half"})
    files = TensorFiles(tmp_path / "0", tmp_path / "1", artefact="half")
    assert files.keys() == tensors.keys()
    write_tensors(tmp_path / "joined", files, MANIFEST)
    write_tensors(tmp_path / "expected", tensors, MANIFEST)
    assert (tmp_path / "joined").read_bytes() == (tmp_path / "expected").read_bytes()
    (tmp_path / "1").write_bytes((tmp_path / "1").read_bytes()[:-9])
    with pytest.raises(FoLoRAError, match="1: damaged or truncated"):
        files["2"]
    with pytest.raises(FoLoRAError, match="1: damaged or truncated"):
        TensorFiles(tmp_path / "0", tmp_path / "1")
    with pytest.raises(FoLoRAError, match="0: made with artefact half, but whole is expected"):
        TensorFiles(tmp_path / "0", artefact="whole")


@both_kinds
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_truncated_file_is_named(write: Callable, read: Callable, kept: float, tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(FoLoRAError, match=r"file: damaged or truncated .* run its stage again"):
        read(path)


@both_kinds
def test_another_manifest_names_the_field(write: Callable, read: Callable, tmp_path: Path) -> None:
    write(tmp_path / "file")
    with pytest.raises(FoLoRAError, match="file: made with model m, but n is expected"):
        read(tmp_path / "file", model="n")
    with pytest.raises(FoLoRAError, match="made with tokenizer None, but t is expected"):
        read(tmp_path / "file", tokenizer="t")


@both_kinds
def test_missing_file_says_how_to_make_it(write: Callable, read: Callable, tmp_path: Path) -> None:
    del write
    with pytest.raises(FoLoRAError, match=r"file: not found: run the stage"):
        read(tmp_path / "file")


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "bare.safetensors")
    pq.write_table(TABLE, tmp_path / "bare.parquet")
    with pytest.raises(FoLoRAError, match="no FoLoRA manifest"):
        read_tensors(tmp_path / "bare.safetensors")
    with pytest.raises(FoLoRAError, match="no FoLoRA manifest"):
        read_table(tmp_path / "bare.parquet")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_named(value: float, tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", {"good": torch.ones(3), "bad": torch.tensor([1.0, value])}, MANIFEST)
    with pytest.raises(FoLoRAError, match="file: bad holds NaN or infinite"):
        read_tensors(tmp_path / "file")


@pytest.mark.parametrize("error", [FoLoRAError("mine"), ValueError("a bug"), KeyboardInterrupt()])
@pytest.mark.parametrize("folder", [True, False])
def test_failure_keeps_what_was_there(error: BaseException, folder: bool, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("before")

    def interrupted() -> None:
        with publish(target) as partial:
            if folder:
                partial.mkdir()
            (partial / "half" if folder else partial).write_text("half")
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_killed_process_left_is_removed(folder: bool, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead, own, alive, other = (
        tmp_path / f".{name}.{pid}.partial"
        for name, pid in (
            ("x.json", process.pid),
            ("x.json", os.getpid()),  # as a container gives it again
            ("x.json", os.getppid()),
            ("y.json", process.pid),
        )
    )
    for path in (dead, own, alive, other):
        if folder:
            path.mkdir()
        else:
            path.touch()
    with publish(tmp_path / "x.json") as partial:
        assert partial == own
        partial.touch(exist_ok=False)
    assert sorted(tmp_path.iterdir()) == sorted([alive, other, tmp_path / "x.json"])


def test_nothing_else_gives_way(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    with pytest.raises(FoLoRAError, match="kept: is a folder: name a file"), publish(tmp_path / "kept") as partial:
        partial.write_text("x")
    for name in (".", "..", tmp_path / ".."):
        with pytest.raises(FoLoRAError, match=r"\.: .*name one to make"), publish(Path(name)):
            raise AssertionError("the work has begun")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with publish(tmp_path / "target") as partial:
            partial.mkdir()
            (partial / name).touch()
            assert not (tmp_path / "target" / name).exists()
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["new"]


@pytest.mark.parametrize("write", [lambda p: write_tensors(p, BIG, {}), lambda p: write_table(p, BIG_TABLE, {})])
def test_full_disk_leaves_nothing(write: Callable, small_disk: Path) -> None:
    with pytest.raises(FoLoRAError, match=r"x: cannot be written .*No space left.*: free space"):
        write(small_disk / "x")
    assert not list(small_disk.iterdir())
    write_some_tensors(small_disk / "fits")
    with pytest.raises(FoLoRAError, match="fits: cannot be written"):
        write(small_disk / "fits")
    assert read_tensors(small_disk / "fits")[1]["model"] == "m"


@both_kinds
def test_read_only_folder_is_named(write: Callable, read: Callable, read_only_disk: Path) -> None:
    del read
    with pytest.raises(FoLoRAError, match=r"file: cannot be written .*Read-only.*: free space or make the folder wr"):
        write(read_only_disk / "new" / "file")


@both_kinds
def test_a_manifest_says_what_it_was_made_with(
    write: Callable, read: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONDITIONS, "threads", 3)
    write(tmp_path / "file")
    conditions = read(tmp_path / "file")[1][MADE_WITH]
    assert conditions.keys() == {*LIBRARIES, "threads"}
    assert conditions["threads"] == 3
    assert "+" not in conditions["torch"]  # a CPU and a CUDA build are one version
    assert torch.__version__.startswith(conditions["torch"])


def test_the_identity_is_not_what_it_was_made_with() -> None:
    assert identity_of(MANIFEST | made_with()) == digest_of(MANIFEST) != identity_of(MANIFEST | {"model": "n"})


def test_digest_follows_content_not_order(tmp_path: Path) -> None:
    assert canonical_json({"b": 1, "a": "λ"}) == '{"a":"λ","b":1}'
    assert digest_of({"b": 1, "a": 2}) == digest_of({"a": 2, "b": 1}) != digest_of({"a": 1, "b": 2})
    write_json(tmp_path / "x.json", {"b": 1, "a": "λ"})
    assert read_json(tmp_path / "x.json") == {"a": "λ", "b": 1}


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b"[" * 100_000, b"9" * 5_000])
def test_damaged_json_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(FoLoRAError, match=r"x\.json: not valid JSON"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("manifest", [[], None, "text", 3.5])
def test_a_manifest_that_is_no_table_is_named(manifest: object, tmp_path: Path) -> None:
    with pytest.raises(FoLoRAError, match="manifest is no table of fields: run the stage"):
        check_manifest(tmp_path, manifest, artefact="x")


def test_a_deep_value_is_shown_short(tmp_path: Path) -> None:
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(FoLoRAError, match=r"made with artefact .{1,40}, but x is expected"):
        check_manifest(tmp_path, {"format": 1, "artefact": deep}, artefact="x")


def test_what_is_no_file_has_no_digest(tmp_path: Path) -> None:
    with pytest.raises(FoLoRAError, match=r"cannot be read .*: see that it is a file"):
        digest_of_file(tmp_path)


def test_a_mistake_is_one_line_whatever_it_quotes() -> None:
    assert str(FoLoRAError("x: 'a\n b\u2028c'  is wrong")) == "x: 'a b c' is wrong"


@pytest.mark.parametrize(
    ("column", "kind"),
    [([[1], [2]], "[int32]"), ([[1], [2]], "[double]"), ([1, 2], "int64"), ([1, 2], "double"), (["a", "b"], "string")],
)
def test_columns_are_cast(column: list, kind: str, tmp_path: Path) -> None:
    write_table(tmp_path / "x", pa.table({"a": column, "b": [None, None]}), {})
    table, _ = read_table(tmp_path / "x", {"a": kind})
    assert table["a"].to_pylist() == column
    assert table.column_names == ["a", "b"]


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (["x"], "int64"),
        ([None], "int64"),
        ([[1, None]], "[int32]"),
        ([2**40], "int32"),
        ([1.5], "int64"),
        ([1], "[bool]"),
    ],
)
def test_a_column_of_another_type_is_named(column: list, kind: str, tmp_path: Path) -> None:
    write_table(tmp_path / "x", pa.table({"a": column}), {})
    with pytest.raises(FoLoRAError, match=rf"x: has no column a of {re.escape(kind)}: delete it"):
        read_table(tmp_path / "x", {"a": kind})
    with pytest.raises(FoLoRAError, match="x: has no column b of int64"):
        read_table(tmp_path / "x", {"b": "int64"})


def test_text_that_is_none_is_named(tmp_path: Path) -> None:
    text = pa.Array.from_buffers(pa.string(), 1, [*pa.array(["ab"]).buffers()[:2], pa.py_buffer(b"\xff\xfe")])
    write_table(tmp_path / "x", pa.table({"a": text}), {})
    with pytest.raises(FoLoRAError, match=r"x: damaged or truncated .*UTF"):
        read_table(tmp_path / "x")


def test_the_digest_of_a_folder_is_the_same_under_both_runners(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    before = digest_of_folder(tmp_path)
    (tmp_path / ".snakemake_timestamp").touch()
    assert digest_of_folder(tmp_path) == before
    (tmp_path / "b.txt").touch()
    assert digest_of_folder(tmp_path) != before
