"""Models of the sizes that the benchmarks work on, with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from torch import Tensor

SMOLLM2: dict[str, Any] = {  # SmolLM2-135M's shape
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
OFFLINE: dict[str, Any] = {  # the default preset's
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 59,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def model_of(shape: dict[str, Any]) -> LlamaForCausalLM:
    """A Llama of this shape, the same every time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def sized(size: str) -> LlamaForCausalLM:
    """SmolLM2-135M's shape, or for a trial the offline model's."""
    return model_of(SMOLLM2 if size == "full" else OFFLINE)


def tokens(model: LlamaForCausalLM, rows: int, length: int) -> Tensor:
    """Token ids, (rows, length)."""
    return torch.randint(3, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))
