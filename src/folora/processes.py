"""One training over several processes, as torchrun or accelerate start them: data parallelism and nothing else.

Each process runs its rows of every batch and DDP averages the gradients, so all processes hold the same adapter. The
first one keeps the output, the history and the unfinished work; what is computed from the adapter and from texts
(gates, moments, pencils) every process computes alike.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, TypeVar

from folora.errors import FoLoRAError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

T = TypeVar("T")
SHARDING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}  # as accelerate asks for it


def count() -> int:
    """How many processes work on this training."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is; the first one is 0."""
    return int(os.environ.get("RANK", "0"))


def join(device: str) -> None:
    """Meet the other processes, each on a device of its own.

    Raises:
        FoLoRAError: accelerate was asked to shard the model.
    """
    for variable, name in SHARDING.items():
        if os.environ.get(variable, "").lower() in ("true", "1"):
            reason = "a basis rotates whole rows of A, of which each process would hold a part"
            raise FoLoRAError(f"{variable}: {name} shards the model, and {reason}: launch plain data parallelism")
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=device == "cpu")


def share_of(rows: int) -> int:
    """The rows of a batch that each process runs.

    Raises:
        FoLoRAError: they cannot be shared out evenly.
    """
    if rows % count():
        raise FoLoRAError(
            f"train.batch_size: {rows} rows a step, replayed ones among them, cannot be shared by {count()} processes: "
            "take a number that divides them"
        )
    return rows // count()


def means(*values: Tensor) -> tuple[Tensor, ...]:
    """Means of scalars over the processes; with one process the scalars themselves."""
    if count() == 1:
        return values
    import torch

    total = torch.stack(values).float()
    torch.distributed.all_reduce(total)
    return tuple(total / count())


def meet() -> None:
    """Wait until all processes are here."""
    if count() > 1:
        import torch

        torch.distributed.barrier()


def from_first(value: T) -> T:
    """The value that the first process has."""
    if count() == 1:
        return value
    import torch

    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def check_alike(parameters: Iterable[Tensor]) -> None:
    """See that all processes hold the same parameters, to the last bit.

    Raises:
        FoLoRAError: one holds others.
    """
    if count() == 1:
        return
    import torch

    digest = hashlib.sha256()
    for parameter in parameters:
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    if digest.digest() != from_first(digest.digest()):
        raise FoLoRAError(f"process {rank()} ended with another adapter than the first: use machines of one kind")
