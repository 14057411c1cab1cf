"""The covariance stage: second moments of the layer inputs over one Parquet file of proxy or task tokens."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from folora.counted_text import SUMS, Sums, proxy_text, task_text
from folora.errors import FoLoRAError
from folora.health import PRODUCT_TOLERANCE, TokenCount
from folora.layers import Groups, adapted_layers, input_groups
from folora.moments import FOURTH, Moments, split_passes
from folora.rows import PROXY_COLUMNS, masked_rows
from folora.scratch import scratch
from folora.storage import (
    TensorFiles,
    check_finite,
    digest_of_file,
    fields_of,
    read_table,
    with_columns,
    write_tensors,
)
from folora.triangle import blocks_of, half_size

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from folora.base import Base
    from folora.counted_text import CountedText
    from folora.params import Params


def compute_covariance(params: Params, base: Base, rows: Path, output: Path) -> None:
    """Sum x xᵀ of every distinct layer input over the rows of a file; write the sums and the token count.

    Args:
        params: ``covariance`` says which positions of a row count, ``adapter.target_modules`` which layers.
        base: the model the rows are run through.
        rows: Parquet of the proxy or the task stage.
        output: the safetensors file to write.

    Raises:
        FoLoRAError: the rows come from another model or tokenizer, no token counts, or the memory budget is less than
            one layer input takes.
    """
    table, manifest = read_table(rows, **base.identity)
    settings, padding = params.covariance, base.load_tokenizer().pad_token_id
    if manifest.get("artefact") == "proxy":
        text = proxy_text(with_columns(rows, table, PROXY_COLUMNS)["token_ids"].to_pylist(), settings, padding)
    else:
        text = task_text(masked_rows(rows, table.slice(0, settings.task_rows)), settings, padding)
    if not text.token_ids:
        raise FoLoRAError(f"{rows}: holds no rows: run the stage that makes it again")
    tokens = text.tokens
    if not tokens:
        raise FoLoRAError(f"{rows}: no token counts under covariance positions {text.positions!r}: choose others")
    model = base.load_for_inference()
    layers = adapted_layers(model, params.adapter.target_modules)
    groups = input_groups(model, layers, torch.tensor([text.token_ids[0]], device=model.device))
    widths = {leader: layers[leader].in_features for leader in groups}
    passes = split_passes(widths, settings.memory_budget)
    about: dict[str, Any] = {
        "artefact": "covariance",
        **base.identity,
        "rows": digest_of_file(rows),
        **{field: manifest[field] for field in ("proxy", "shard", "sequences", "loops", "task") if field in manifest},
        **({"task_rows": settings.task_rows} if "task" in manifest else {}),
        "positions": text.positions,
        "groups": groups,
        "widths": widths,
        "tokens": tokens,
    }
    with scratch(**about, batch_size=settings.batch_size, passes=passes) as unfinished:
        chosen = [{name: layers[name] for name in names} for names in passes]
        write_tensors(output, _collected(text, model, chosen, unfinished), about)


def _collected(
    text: CountedText, model: Any, passes: list[dict[str, nn.Linear]], unfinished: Path
) -> Mapping[str, Tensor]:
    """The tensors of the artefact: in memory after one pass over the text, of several each in a file."""
    sums = [Sums(unfinished / f"{number}.safetensors") for number in range(len(passes))]
    if len(passes) == 1:
        return text.moments(model, passes[0], sums[0]).tensors
    for one, layers in zip(sums, passes, strict=True):
        one.save(text.moments(model, layers, one), text.batch_count)  # and no name that would hold them any longer
    return TensorFiles(*(one.path for one in sums), artefact=SUMS)


class CovarianceManifest(BaseModel):
    """The fields of the manifest that ``StoredMoments`` uses."""

    model_config = ConfigDict(strict=True, frozen=True)

    groups: Annotated[dict[str, list[str]], Field(min_length=1)]
    widths: dict[str, Annotated[int, Field(ge=1)]]
    tokens: TokenCount
    positions: str

    @model_validator(mode="after")
    def _every_input_has_a_width(self) -> CovarianceManifest:
        if self.groups.keys() != self.widths.keys():
            raise ValueError("widths and groups name other layer inputs")
        return self


class StoredMoments:
    """Moments in files, one for each shard of a text, of which one layer input at a time is in memory.

    Attributes:
        groups: name of a layer input to the layers that read it.
        tokens: how many were summed.
        manifests: of the shards.
    """

    def __init__(self, shards: list[tuple[Path, dict[str, Any]]], **expected: Any) -> None:
        """Look at what the files say of themselves.

        Args:
            shards: each file, with the manifest fields that only it must have.
            expected: manifest fields that all must have.

        Raises:
            FoLoRAError: a shard is cut off, of another model or parameter set, or has other layers than the first.
        """
        self._shards: list[tuple[Path, TensorFiles, int]] = []
        for path, own in shards:
            files = TensorFiles(path, artefact="covariance", **expected, **own)
            about = fields_of(path, CovarianceManifest, files.manifests[0])
            absent = [key for name in about.groups for key in (name, f"{FOURTH}{name}") if key not in files]
            if absent:
                raise FoLoRAError(f"{path}: lacks {absent[0]}: delete it and run its stage again")
            expected |= {"positions": about.positions, "groups": about.groups, "widths": about.widths}
            self._shards.append((path, files, about.tokens))
        assert self._shards, "params.py asks for at least one shard"
        self.groups: Groups = expected["groups"]
        self._widths: dict[str, int] = expected["widths"]
        self.tokens = sum(tokens for *_, tokens in self._shards)
        self.manifests = [files.manifests[0] for _, files, _ in self._shards]

    def read(self, name: str, shards: int | None = None) -> Moments:
        """Moments of one layer input, added up over the shards in their order, or over the first so many of them.

        Raises:
            FoLoRAError: a shard is damaged, or holds what cannot be a sum of x xᵀ.
        """
        return reduce(Moments.plus, (self._of_shard(name, *shard) for shard in self._shards[:shards]))

    def _of_shard(self, name: str, path: Path, files: TensorFiles, tokens: int) -> Moments:
        width, total, fourth = self._widths[name], files[name], files[f"{FOURTH}{name}"]
        check_finite(path, name, total)
        check_finite(path, f"{FOURTH}{name}", fourth)
        if found := defect(total, width, fourth, tokens):
            raise FoLoRAError(f"{path}: {name}: {found}: delete it and run its stage again")
        return Moments({name: width}, {name: total}, {name: fourth}, tokens)


def defect(half: Tensor, width: int, fourth: Tensor, tokens: int) -> str | None:
    """Why a half cannot be that of Σ x xᵀ over so many tokens with this Σ ‖x‖⁴, as far as a look at its entries shows.

    A smaller eigenvalue than zero that its entries hide is found by the pencil.
    """
    if half.shape != (half_size(width),) or fourth.ndim:
        return f"its sum is not the half of a matrix of width {width}, or that of ‖x‖⁴ no number"
    if {half.dtype, fourth.dtype} != {torch.float64}:
        return "its sums are not float64"
    energies = torch.cat([block.diagonal(rows.start) for rows, block in blocks_of(half, width)])
    if energies.min() < 0 or fourth < 0:
        return "a sum of squares is negative"
    scale = energies.sqrt()
    for rows, block in blocks_of(half, width):
        # what underflows in a square may still be seen in a product with a greater number
        bound = scale[rows, None] * scale[: rows.stop] + PRODUCT_TOLERANCE**3 * energies.max()
        diagonal = block[:, rows.start :]
        if ((diagonal - diagonal.mT).abs() > PRODUCT_TOLERANCE * bound[:, rows.start :]).any():
            return "its sum is not symmetric"
        if (block.abs() > (1 + PRODUCT_TOLERANCE) * bound).any():
            return "its sum is not positive semi-definite"
    square = energies.sum().square()  # (Σ ‖x‖²)², between Σ ‖x‖⁴ and as many times that as there are tokens
    if fourth > (1 + PRODUCT_TOLERANCE) * square or square > (1 + PRODUCT_TOLERANCE) * tokens * fourth:
        return f"its sums are not those of {tokens} tokens"
    return None
