"""Sequences drawn from a causal language model, each from numbers of its own, in any order and in any batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from folora.errors import FoLoRAError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Sample:
    """One sequence: token ids (BOS first), a log-probability per sampled token, and whether it ended by itself."""

    token_ids: list[int]
    logprobs: list[float]
    finished: bool


Draw = Callable[[list[int]], list[Sample]]  # a seed for each sequence to the sequences


def sequence_seed(seed: int, shard: str, index: int) -> int:
    """A 64-bit seed for one sequence; different for every (seed, shard, index)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{shard}/{index}".encode()).digest()[:8])


def uniform_numbers(seeds: list[int], length: int) -> Tensor:
    """Uniform numbers in [0, 1), (sequences, length), float64, one generator a sequence."""
    return torch.from_numpy(np.stack([np.random.Generator(np.random.Philox(seed)).random(length) for seed in seeds]))


@torch.inference_mode()
def sample(model: PreTrainedModel, uniforms: Tensor, bos: int, eos: int, temperature: float) -> list[Sample]:
    """Sample a batch of sequences by inverting the distribution function at given uniform numbers.

    Args:
        model: a causal language model.
        uniforms: (batch, steps), one number a token; ``steps`` bounds the sampled tokens.
        bos: the first token of every sequence.
        eos: the token that ends one.
        temperature: divides the logits.

    All sequences start together, so no padding is ever needed; finished ones leave the batch and its cache.

    Raises:
        FoLoRAError: the model did not take the cache.
    """
    from transformers import DynamicCache

    samples = [Sample([bos], [], finished=False) for _ in uniforms]
    uniforms = uniforms.to(model.device)
    active = torch.arange(len(samples), device=model.device)
    tokens = torch.full((len(samples), 1), bos, device=model.device)
    cache = DynamicCache()
    for step in range(uniforms.shape[1]):
        logits = model(input_ids=tokens, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        if not cache.get_seq_length():  # versions that call it otherwise draw each token without those before it
            raise FoLoRAError(
                "this version of transformers leaves the cache empty: `folora doctor` says which to install"
            )
        logprobs = torch.log_softmax(logits.double() / temperature, dim=-1)
        chosen = invert(logprobs.exp(), uniforms[active, step])
        chosen_logprobs = logprobs.gather(1, chosen[:, None])[:, 0]
        for row, token, logprob in zip(active.tolist(), chosen.tolist(), chosen_logprobs.tolist(), strict=True):
            samples[row].token_ids.append(token)
            samples[row].logprobs.append(logprob)
            samples[row].finished = token == eos
        running = (chosen != eos).nonzero()[:, 0]
        if not len(running):
            break
        if len(running) < len(active):
            cache.batch_select_indices(running.cpu())  # its layers may lie on several devices
        active, tokens = active[running], chosen[running, None]
    return samples


def invert(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the distribution function of each row passes its uniform number.

    Args:
        probabilities: (batch, vocabulary), rows sum to one.
        uniforms: (batch,).

    Returns:
        (batch,) token ids.
    """
    cumulative = probabilities.cumsum(dim=-1)
    # scaling by the last entry takes out the rounding of the sum; a token of probability zero is never chosen
    threshold = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_max(probabilities.shape[1] - 1)
