"""Which modules of a model an adapter covers, and why not the others."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from folora.console import print_table

if TYPE_CHECKING:
    from collections.abc import Collection

    from transformers import PreTrainedModel

COVERAGE_FILE = "coverage.json"
HEAD = ["module", "count", "parameters", "adapted, or why not"]


@dataclass(frozen=True)
class Covered:
    """Modules of one name in all blocks.

    Attributes:
        module: the name, with * for the number of a block or an expert.
        count: how many modules have it.
        parameters: of all of them, those of their submodules left out.
        adapted: whether they are.
        why: not, or empty.
    """

    module: str
    count: int
    parameters: int
    adapted: bool
    why: str


def coverage(model: PreTrainedModel, layers: Collection[str]) -> list[Covered]:
    """All modules with parameters of their own, in the order of the model.

    Args:
        model: the base model.
        layers: names of the modules that are adapted.
    """
    chosen = set(layers)
    found: dict[tuple[str, bool, str], list[int]] = {}
    for name, module in model.named_modules():
        parameters = [parameter.numel() for parameter in module.parameters(recurse=False)]
        if parameters:
            why = "" if name in chosen else reason(model, module)
            pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
            found.setdefault((pattern, name in chosen, why), []).append(sum(parameters))
    return [Covered(pattern, len(sizes), sum(sizes), adapted, why) for (pattern, adapted, why), sizes in found.items()]


def reason(model: PreTrainedModel, module: nn.Module) -> str:
    """Why a module is not adapted."""
    if module is model.get_output_embeddings():
        return "the output embedding"
    if isinstance(module, nn.Embedding):
        return "an embedding"
    if isinstance(module, nn.Linear):
        return "not in adapter.target_modules"
    most = max(parameter.ndim for parameter in module.parameters(recurse=False))
    if most > 2:
        return "experts in one tensor, no linear layers"
    return "a matrix, but no linear layer" if most == 2 else "no matrix"


def print_coverage(covered: list[Covered]) -> None:
    """Print the table, and the share of the parameters that are adapted."""
    print_table(HEAD, [[one.module, f"{one.count:,}", f"{one.parameters:,}", one.why or "adapted"] for one in covered])
    adapted = sum(one.parameters for one in covered if one.adapted)
    print(f"{adapted / sum(one.parameters for one in covered):.1%} of the parameters lie in adapted modules")
