"""The linear layers that are adapted, and which of them read the same input.

q, k and v of one attention block share their input, so do gate and up: one moment and one basis serve them all.
Shared inputs are found by tensor identity in one traced forward pass, never by module names.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from folora.errors import FoLoRAError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

Groups = dict[str, list[str]]
Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]


def adapted_layers(model: PreTrainedModel, target_modules: Literal["all-linear"] | list[str]) -> dict[str, nn.Linear]:
    """The linear layers to adapt, by module name, in the order of the model.

    Args:
        model: a causal language model.
        target_modules: ``all-linear`` (all but the output embedding) or names, each of which must match the end of
            a module name, as PEFT matches them.

    Raises:
        FoLoRAError: an entry matches no linear layer, or only some blocks have one.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if target_modules == "all-linear":
        head = model.get_output_embeddings()
        chosen = {name: module for name, module in linear.items() if module is not head}
        if not chosen:
            raise FoLoRAError(f"adapter.target_modules: {type(model).__name__} has no torch.nn.Linear layer to adapt")
        return chosen
    matching = {target: [name for name in linear if _matches(name, target)] for target in target_modules}
    for target, names in matching.items():
        if not names:
            kinds = sorted({name.rpartition(".")[2] for name in linear})
            raise FoLoRAError(
                f"adapter.target_modules: {target!r} matches no linear layer; there are {', '.join(kinds)}"
            )
        _check_every_block(model, target, names)
    named = {name for names in matching.values() for name in names}
    return {name: module for name, module in linear.items() if name in named}


def _check_every_block(model: PreTrainedModel, target: str, names: list[str]) -> None:
    """See that a name without a block's number matches in all blocks, or all experts, or in none.

    Raises:
        FoLoRAError: it matches in some.
    """
    if any(part.isdigit() for part in target.split(".")):
        return
    for parent, blocks in model.named_modules():
        if isinstance(blocks, nn.ModuleList):
            within = [name for name in names if name.startswith(f"{parent}.")]
            numbers = {name.removeprefix(f"{parent}.").partition(".")[0] for name in within}
            if within and len(numbers) < len(blocks):
                some = f"{target!r} is in {len(numbers)} of the {len(blocks)} {parent} only"
                raise FoLoRAError(
                    f"adapter.target_modules: {some}: name each that is meant, as in {within[0].partition('.')[2]!r}"
                )


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


@torch.no_grad()
def input_groups(model: PreTrainedModel, layers: dict[str, nn.Linear], input_ids: Tensor) -> Groups:
    """Group layers by the tensor they read.

    Args:
        model: the model that holds the layers.
        layers: from ``adapted_layers``.
        input_ids: (batch, length), any tokens.

    Returns:
        The first layer of each group to all of its layers, in the order of the forward pass.

    Raises:
        FoLoRAError: a layer is not reached by the forward pass.
    """
    seen: dict[str, Tensor] = {}  # holding the tensors keeps their identities apart

    def remember(name: str) -> Hook:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.setdefault(name, inputs[0])

        return hook

    with hooked(layers, remember):
        model(input_ids=input_ids)
    missing = [name for name in layers if name not in seen]
    if missing:
        raise FoLoRAError(f"adapter.target_modules: the forward pass never reaches {missing[0]}: leave it out")
    groups: Groups = {}
    leaders: dict[int, str] = {}
    for name, tensor in seen.items():
        groups.setdefault(leaders.setdefault(id(tensor), name), []).append(name)
    return groups


@contextmanager
def hooked(layers: dict[str, nn.Linear], make: Callable[[str], Hook]) -> Iterator[None]:
    """Register ``make(name)`` as forward pre-hook of each layer for the length of a ``with`` block."""
    handles = [layer.register_forward_pre_hook(make(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def batches(
    rows: list[list[int]], size: int, padding: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor, range]]:
    """Right-padded batches of token rows.

    Yields:
        ``input_ids`` (batch, length), ``mask`` (batch, length) of bool, and the row numbers.
    """
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        length = max(map(len, chunk))
        input_ids = torch.tensor([row + [padding] * (length - len(row)) for row in chunk], device=device)
        mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in chunk], device=device)
        yield input_ids, mask, range(start, start + len(chunk))
