"""A hub on the loopback: models and data sets of a folder, each at one commit, in the words of huggingface_hub."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COMMIT = "c0ffee" * 6 + "c0ff"
KINDS = r"/api/(models|datasets)/([^/]+/[^/]+)"


class Hub(BaseHTTPRequestHandler):
    """Serves ``models/OWNER/NAME`` and ``datasets/OWNER/NAME`` below a folder."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments: Any, root: Path, commit: str) -> None:
        self._root, self._commit = root, commit
        super().__init__(*arguments)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if of_repository := re.fullmatch(rf"{KINDS}(?:/revision/[^/]+)?", path):
            self._repository(self._root / of_repository[1] / of_repository[2], of_repository[2])
        elif of_tree := re.fullmatch(rf"{KINDS}/tree/[^/]+(?:/(.*))?", path):
            self._tree(self._root / of_tree[1] / of_tree[2], of_tree[3] or "")
        elif of_file := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._file(self._root / ("datasets" if of_file[1] else "models") / of_file[2] / of_file[3])
        else:
            self._send(404, b"")

    do_HEAD = do_GET  # noqa: N815 - the name is the library's

    def _repository(self, folder: Path, name: str) -> None:
        if folder.is_dir():
            files = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
            self._send(200, json.dumps({"id": name, "sha": self._commit, "siblings": files}).encode())
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _tree(self, folder: Path, below: str) -> None:
        files = [] if below else sorted(folder.iterdir())
        entries = [{"type": "file", "path": file.name, "oid": "0" * 40, "size": file.stat().st_size} for file in files]
        self._send(200, json.dumps(entries).encode())

    def _file(self, path: Path) -> None:
        if path.is_file():
            content = path.read_bytes()
            self._send(
                200, content, {"X-Repo-Commit": self._commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            )
        else:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self._commit})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@contextmanager
def hub(root: Path, commit: str = COMMIT) -> Iterator[str]:
    """Serve a folder, which is at this commit; yields the address, which answers no longer after the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, root=root, commit=commit))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
