"""A base model that one device cannot hold: its weights over several GPUs, main memory and the disk, by accelerate.

For stages that only run the model. What each device may hold stands in the environment, not in params.yaml: it changes
no result, and it is a property of the machine.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ByteSize, TypeAdapter, ValidationError

from folora.errors import FoLoRAError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from folora.loading import Loading

MAX_MEMORY = "FOLORA_MAX_MEMORY"

Limits = dict[int | Literal["cpu"], ByteSize]


def memory_limits(device: str) -> Limits | None:
    """Bytes of weights that each GPU (by number) and the main memory (``cpu``) may hold; None: all lie on one device.

    Args:
        device: of the parameters, cpu or cuda.

    Raises:
        FoLoRAError: the variable cannot be read, or does not fit the device.
    """
    said = os.environ.get(MAX_MEMORY)
    if not said:
        return None
    example = "0=70GB,1=70GB,cpu=200GB" if device == "cuda" else "cpu=20GB"
    try:
        pairs = dict(one.strip().split("=") for one in said.split(","))
        limits = TypeAdapter(Limits).validate_python(pairs)
    except (ValueError, ValidationError) as error:
        raise FoLoRAError(f"{MAX_MEMORY}: {said!r} cannot be read: write it as {example}") from error
    gpus = [key for key in limits if key != "cpu"]
    if gpus != list(range(len(gpus))) or bool(gpus) != (device == "cuda"):
        raise FoLoRAError(f"{MAX_MEMORY}: {said!r} does not fit foundation.loading.device {device}: such as {example}")
    return limits


def gpu_count(device: str) -> int:
    """How many GPUs a stage needs that runs the model on ``device``."""
    if device != "cuda":
        return 0
    limits = memory_limits(device)
    return 1 if limits is None else sum(key != "cpu" for key in limits)


def load_spread(folder: Path, loading: Loading, limits: Limits) -> PreTrainedModel:
    """Load a model whose weights lie where there is room: on the GPUs first, on the disk last.

    Those in main memory beside a GPU, or on disk, are brought to the first device whenever they are needed.

    Raises:
        FoLoRAError: the first device cannot hold the embedding, or layers keep W transposed.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    offloaded = Path(tempfile.mkdtemp(prefix="folora-"))  # of weights in another dtype than their file has
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, loading.dtype),
        attn_implementation=loading.attention,
        trust_remote_code=loading.trust_remote_code,
        device_map="auto",
        max_memory=dict(limits),
        offload_folder=offloaded,
    )
    weakref.finalize(model, shutil.rmtree, offloaded, ignore_errors=True)
    if any(isinstance(module, Conv1D) for module in model.modules()):
        raise FoLoRAError(f"{MAX_MEMORY}: {type(model).__name__} keeps its weights transposed: unset it")
    if model.device.type == "meta":
        raise FoLoRAError(f"{MAX_MEMORY}: too little for the embedding on the first device: give it more")
    # PEFT would dispatch the model again once it has an adapter, and writes the adapter into the files of weights that
    # lie on disk: those of the base model
    del model.hf_device_map
    return model.eval()


def materialise_adapter(model: PeftModel) -> bool:
    """Give the factors of layers whose weights lie elsewhere memory of their own, on the first device.

    Returns:
        Whether there were any; they then have no values yet.

    Raises:
        FoLoRAError: the adapter computes with such weights.
    """
    empty = [
        module
        for name, module in model.named_modules()
        if "lora_" in name and any(one.is_meta for one in module.parameters(recurse=False))
    ]
    if empty and any(getattr(config, "use_dora", False) for config in model.peft_config.values()):
        raise FoLoRAError(f"{MAX_MEMORY}: DoRA computes with the weights themselves: unset it, or give more memory")
    for module in empty:
        module.to_empty(device=model.device, recurse=False)
    return bool(empty)
