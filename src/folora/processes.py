"""One training over several processes, as torchrun or accelerate start them.

Each process runs its rows of every batch and DDP averages the gradients, so all processes hold the same adapter. The
first one keeps the output, the history and the unfinished work; what is computed from the adapter and from texts
(gates, moments, pencils, the KL) every process computes alike. The frozen weights stand whole in every process, or
sharded by FSDP2: each process holds a part, and a block is whole while it computes.
"""

from __future__ import annotations

import atexit
import hashlib
import os
from typing import TYPE_CHECKING, TypeVar

from folora.errors import FoLoRAError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn
    from transformers import PreTrainedModel

T = TypeVar("T")
SHARDING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}  # as accelerate asks for it
SETTINGS = {  # of accelerate's, which the Trainer would follow without a word
    "ACCELERATE_MIXED_PRECISION": "foundation.loading.dtype says the precision",
    "ACCELERATE_DYNAMO_BACKEND": "a training is not compiled",
}


def count() -> int:
    """How many processes work on this training."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is; the first one is 0."""
    return int(os.environ.get("RANK", "0"))


def join(device: str) -> None:
    """Meet the other processes, each on a device of its own, and part from them where this one ends.

    Raises:
        FoLoRAError: accelerate was asked to shard the adapter, or to change what a training computes; or there are
            fewer devices than processes.
    """
    for variable, name in SHARDING.items():
        if os.environ.get(variable, "").lower() in ("true", "1"):
            reason = f"{name} shards the adapter too, which bases and gates need whole"
            raise FoLoRAError(f"{variable}: {reason}: launch without it, and shard the base with --shard-base")
    for variable, reason in SETTINGS.items():
        given = os.environ.get(variable, "no").lower()
        if given != "no":
            raise FoLoRAError(f"{variable}: {given}: {reason}: launch with 'no'")
    if count() > 1:
        import torch
        from accelerate import PartialState

        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if device == "cuda" and here > torch.cuda.device_count():
            raise FoLoRAError(f"{here} processes start here, GPUs: {torch.cuda.device_count()}: start one for each GPU")
        state = PartialState(cpu=device == "cpu")
        # a thread of the group's that outlives the interpreter ends a finished training with SIGABRT, now and then
        atexit.register(state.destroy_process_group)


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


def shard(model: PreTrainedModel, device: str) -> None:
    """Leave this process its part of the weights of every block, on its device, and freeze them.

    A block is whole from the beginning of its forward or backward pass to the end of it. Embeddings stay whole. What is
    added to the model afterwards, such as an adapter, is not sharded.

    Raises:
        FoLoRAError: the model does not name its blocks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    names = getattr(model, "_no_split_modules", None) or ()
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise FoLoRAError(f"--shard-base: a {type(model).__name__} does not say what its blocks are: leave it out")
    model.requires_grad_(requires_grad=False)
    mesh = init_device_mesh(device, (count(),))
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    embeddings = {parameter for end in ends if end is not None for parameter in end.parameters()}
    for module in (*blocks, model.base_model):  # the last has the first fetch the next block while one computes
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=embeddings)


def gathered(tensor: Tensor) -> Tensor:
    """A tensor with all its parts; of a sharded one every process has to ask."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def around_shards(model: nn.Module) -> nn.Module:
    """DDP around a model, for its parameters that are not sharded; the model itself where none is.

    DDP would send the shards of the first process to all, and accelerate refuses a model that has any on GPUs.
    """
    from torch.nn.parallel import DistributedDataParallel

    parameters = dict(model.named_parameters())
    shards = [name for name, parameter in parameters.items() if hasattr(parameter, "full_tensor")]
    if not shards:
        return model
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, shards)
    device = next(iter(parameters.values())).device
    return DistributedDataParallel(model, device_ids=None if device.type == "cpu" else [device])


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
