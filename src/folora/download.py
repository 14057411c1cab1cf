"""The download stage: a data set of a hub, at one commit, as a folder with a Parquet file that a task can name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folora.errors import FoLoRAError
from folora.hub import commit_of, from_hub
from folora.storage import FORMAT, MANIFEST_FILE, digest_of_file, publish, write_json

if TYPE_CHECKING:
    from pathlib import Path

    from folora.params import Download


def download(name: str, settings: Download, output: Path) -> str | None:
    """Write ``train.parquet`` and the manifest with its commit, which is returned; None of a local folder.

    Raises:
        FoLoRAError: the hub has no such data set, configuration, split or revision, or it cannot be reached.
    """
    from datasets import load_dataset

    key = f"downloads.{name}"
    commit = commit_of(key, settings.dataset, settings.revision)
    rows = from_hub(
        key,
        settings.dataset,
        settings.revision,
        lambda: load_dataset(
            settings.dataset, settings.config, split=settings.split, revision=commit or settings.revision
        ),
    )
    if not len(rows):
        raise FoLoRAError(f"{key}: split {settings.split!r} of {settings.dataset!r} has no rows: choose another")
    with publish(output) as folder:
        folder.mkdir()
        rows.to_parquet(folder / "train.parquet")
        manifest = {"format": FORMAT, "artefact": "download", "download": settings.model_dump(), "commit": commit}
        manifest |= {"rows": len(rows), "columns": rows.column_names}
        write_json(folder / MANIFEST_FILE, manifest | {"file": digest_of_file(folder / "train.parquet")})
    return commit
