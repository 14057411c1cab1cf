"""Data sets and models of a hub: from local folders of the same form, and from a hub that refuses."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from test_task import ROWS, write_rows

from folora.download import download
from folora.errors import FoLoRAError
from folora.foundation import LOADING
from folora.params import Download
from folora.rows import read_rows
from folora.storage import read_json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import Pipeline, SaveParams


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own for what the library builds."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def settings(folder: Path, **changes: Any) -> Download:
    given = {"dataset": str(folder), "config": None, "split": "train", "revision": None}
    return Download.model_validate(given | changes)


def test_a_download_is_a_data_set_that_a_task_can_name(tmp_path: Path) -> None:
    write_rows(ROWS, tmp_path / "source" / "train.jsonl")
    assert download("mine", settings(tmp_path / "source"), tmp_path / "out") is None
    assert list(read_rows(str(tmp_path / "out"), "key")) == ROWS
    manifest = read_json(tmp_path / "out" / "manifest.json")
    assert (manifest["rows"], manifest["columns"]) == (2, ["question", "answer"])
    first = (tmp_path / "out" / "train.parquet").read_bytes()
    download("mine", settings(tmp_path / "source"), tmp_path / "out")
    assert (tmp_path / "out" / "train.parquet").read_bytes() == first


def test_a_split_may_be_a_part(tmp_path: Path) -> None:
    write_rows(ROWS, tmp_path / "source" / "train.jsonl")
    download("mine", settings(tmp_path / "source", split="train[1:]"), tmp_path / "out")
    assert list(read_rows(str(tmp_path / "out"), "key")) == ROWS[1:]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"split": "test"}, r"downloads\.mine: .*test"),
        ({"config": "main"}, r"downloads\.mine: .*main"),
        ({"split": "train[5:]"}, r"downloads\.mine: .*corresponds to no data"),
    ],
)
def test_what_is_not_there_is_one_line(changes: dict[str, str], expected: str, tmp_path: Path) -> None:
    write_rows(ROWS, tmp_path / "source" / "train.jsonl")
    with pytest.raises(FoLoRAError, match=expected) as refusal:
        download("mine", settings(tmp_path / "source", **changes), tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


class RefusingHub(BaseHTTPRequestHandler):
    """Answers as a hub does that does not give what is asked for."""

    def do_GET(self) -> None:
        status, code = next(answer for name, answer in REFUSALS.items() if name in self.path)
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "refused")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815 - the name is the library's

    def log_message(self, *_: Any) -> None:
        """Quiet."""


REFUSALS = {
    "gated": (403, "GatedRepo"),
    "revised": (404, "RevisionNotFound"),
    "nobody": (401, "RepoNotFound"),
}
WORDS = {
    "gated": "'me/gated' is gated: accept its terms on the hub, then log in with `hf auth login`",
    "revised": "'me/revised' has no revision 'gone': name a branch, tag or commit that exists",
    "nobody": "'me/nobody' is neither a folder here nor on the hub, or it is private and you are not logged in",
}


@pytest.fixture
def hub() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), RefusingHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def refusal(values: dict[str, Any], save_params: SaveParams, home: Path, endpoint: str, *stage: str) -> str:
    """What a stage says on standard error, in a process that takes ``endpoint`` for the hub."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [
        sys.executable,
        "-c",
        "from folora.cli import main; main()",
        *stage,
        "--params",
        str(save_params(values)),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    return done.stderr.strip()


@pytest.mark.parametrize("what", REFUSALS)
def test_a_hub_that_refuses_is_understood(
    what: str, hub: str, pipeline: Pipeline, save_params: SaveParams, tmp_path: Path
) -> None:
    foundation = {"source": "pretrained", "model": f"me/{what}", "revision": "gone", "loading": LOADING.model_dump()}
    rows = {"dataset": f"me/{what}", "config": None, "split": "train", "revision": "gone"}
    values = pipeline.values() | {"foundation": foundation, "downloads": {"mine": rows}}
    out = ("--output", str(tmp_path / "out"))
    model = refusal(values, save_params, tmp_path, hub, "foundation", "--world", "w", "--threads", "1", *out)
    assert model == f"folora: foundation.model: {WORDS[what]}"
    data = refusal(values, save_params, tmp_path, hub, "download", "mine", *out)
    assert data == f"folora: downloads.mine: {WORDS[what]}"


def test_a_hub_that_cannot_be_reached_is_understood(
    pipeline: Pipeline, save_params: SaveParams, tmp_path: Path
) -> None:
    foundation = {"source": "pretrained", "model": "me/mine", "revision": None, "loading": LOADING.model_dump()}
    values = pipeline.values() | {"foundation": foundation}
    out = ("--world", "w", "--threads", "1", "--output", str(tmp_path / "out"))
    line = refusal(values, save_params, tmp_path, "http://127.0.0.1:9", "foundation", *out)
    assert line == (
        "folora: foundation.model: 'me/mine' is neither a folder here nor in the cache, and the hub cannot be reached"
    )
