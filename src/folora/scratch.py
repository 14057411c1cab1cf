"""Scratch: what a stage has done so far, kept until its output is whole, so that a killed stage goes on from there.

Nothing is taken up that was made under other conditions: the folder is named by a digest of what tells all that
the output depends on apart, the code and the libraries among it. What a kill or a power cut left damaged is passed
over.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from folora import processes
from folora.errors import FoLoRAError
from folora.storage import CONDITIONS, check_writable, digest_of, digest_of_folder, publish, versions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SCRATCH = Path(".folora/scratch")
INTERVAL = "FOLORA_SAVE_SECONDS"  # no parameter: it changes no result


@contextmanager
def scratch(**conditions: Any) -> Iterator[Path]:
    """The scratch folder of an output that depends on these JSON values; removed when the block ends well.

    Raises:
        FoLoRAError: it cannot be written.
    """
    import torch

    computing = {"code": _code(), "threads": torch.get_num_threads(), "processes": processes.count()}
    folder = SCRATCH / digest_of(conditions | CONDITIONS | computing)
    check_writable(folder / "any")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def save_seconds() -> float:
    """How long unfinished work may go unsaved where saving takes time.

    Raises:
        FoLoRAError: the environment says something else than a number.
    """
    given = os.environ.get(INTERVAL, "300")
    try:
        return float(given)
    except ValueError as error:
        raise FoLoRAError(f"{INTERVAL}: {given!r} is no number of seconds: set one, or unset it") from error


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """The JSON value that an earlier process left in a scratch file, or what ``make`` returns, left there."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        content = json.loads(path.read_text())
        if content["digest"] == digest_of(content["value"]):
            return content["value"]
    value = make()
    with publish(path) as partial:
        partial.write_text(json.dumps({"digest": digest_of(value), "value": value}))
    return value


@cache
def _code() -> dict[str, str]:
    """Digest of this package and versions of what it computes with."""
    return {"folora": digest_of_folder(Path(__file__).parent, "*.py"), **versions()}
