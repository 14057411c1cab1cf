"""What a hub is asked for, which commits it gave, and its refusals in words that say what to do."""

from __future__ import annotations

import errno
import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from folora.errors import FoLoRAError
from folora.storage import lines_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


PINS = Path(".folora/pins.jsonl")  # no manifest: a runner deletes what a stage made before it runs the stage again
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # on the disk, in the quota, for a file of this size


def from_hub(key: str, source: str, revision: str | None, get: Callable[[], Any]) -> Any:
    """What ``get`` returns, its errors as one line.

    Args:
        key: what names the source in params.yaml.
        source: a hub id or a local folder.
        revision: branch, tag or commit.
        get: asks the hub.

    Raises:
        FoLoRAError: it refuses, cannot be reached, or has no such thing.
    """
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return get()
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, DatasetsError, OSError, ValueError) as error:
        raise FoLoRAError(f"{key}: {_why(error, source, revision)}") from error


def _why(error: Exception, source: str, revision: str | None) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if full := full_cache(error):
        return full
    causes = list(_causes(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return f"{source!r} is gated: accept its terms on the hub, then log in with `hf auth login`"
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return f"{source!r} has no revision {revision!r}: name a branch, tag or commit that exists"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return f"{source!r} is neither a folder here nor on the hub, or it is private and you are not logged in"
    if any(isinstance(cause, LocalEntryNotFoundError) for cause in causes):
        return f"{source!r} is neither a folder here nor in the cache, and the hub cannot be reached"
    reason = str(error)[:200]
    if Path(source).exists():
        return f"{source!r}: {reason}"
    return f"{source!r} is neither a folder here nor to be had from the hub: {reason}"


def full_cache(error: Exception) -> str | None:
    """Which cache has no room, and what to do, where that is what led to an error."""
    from datasets import config
    from datasets.exceptions import DatasetsError
    from huggingface_hub.constants import HF_HUB_CACHE

    of_datasets = ("HF_DATASETS_CACHE", config.HF_DATASETS_CACHE)
    name, folder = of_datasets if isinstance(error, DatasetsError) else ("HF_HUB_CACHE", HF_HUB_CACHE)
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in NO_SPACE:
            return f"{folder}: cannot be written ({cause}): free space or set {name}"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def commit_of(key: str, dataset: str, revision: str | None) -> str | None:
    """The commit that a revision of a data set stands for now; None of a local folder.

    Raises:
        FoLoRAError: the hub does not say.
    """
    if Path(dataset).exists():
        return None
    from huggingface_hub import HfApi

    return from_hub(key, dataset, revision, lambda: HfApi().dataset_info(dataset, revision=revision).sha)


def check_unmoved(model: str, revision: str | None, commit: str) -> None:
    """See that a revision of a model still is the commit that it was when it was pinned in this folder before.

    Raises:
        FoLoRAError: it is another one.
    """
    before = commit
    for line in lines_of(PINS):
        with suppress(ValueError, TypeError, KeyError):  # a line that a full disk cut off
            pin = json.loads(line)
            before = pin["commit"] if (pin["model"], pin["revision"]) == (model, revision) else before
    if before != commit:
        # no warning: with other weights every result is made again, and who changed dtype alone did not ask for that
        raise FoLoRAError(
            f"foundation.revision: {model}@{revision or 'main'} moved from {before} to {commit}: name the first to go "
            "on with the model that was pinned here, or the second to begin anew"
        )


def keep_pin(model: str, revision: str | None, commit: str) -> None:
    """Remember which commit a revision of a model was; best effort, a full disk fails no stage here."""
    with suppress(OSError):
        PINS.parent.mkdir(exist_ok=True)
        with PINS.open("a") as file:
            file.write(json.dumps({"model": model, "revision": revision, "commit": commit}) + "\n")
