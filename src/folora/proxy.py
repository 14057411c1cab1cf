"""The proxy stage: text sampled from the base model, the stand-in for the pretraining data nobody has.

Each sequence starts from BOS and is sampled at the stated temperature from the full distribution: an unbiased
sample. A sequence's random numbers come from (seed, shard, index) alone, so shards can be computed in any order and
in any batches.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from folora.storage import write_table

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from folora.base import Base
    from folora.params import Proxy

HELDOUT = "heldout"


@dataclass
class Sample:
    """One sampled sequence: token ids (BOS first), a log-probability per sampled token, and why it ended."""

    token_ids: list[int]
    logprobs: list[float]
    finished: bool


def generate_proxy(settings: Proxy, shard: str, base: Base, output: Path) -> None:
    """Sample one shard and write it as Parquet; the shard ``heldout`` measures KL and perplexity.

    Raises:
        FoLoRAError: the sequences are longer than the model's context.
    """
    import pyarrow as pa

    base.check_length(settings.max_length, "proxy.max_length")
    model, tokenizer = base.load_model(), base.load_tokenizer()
    count = settings.heldout_sequences if shard == HELDOUT else settings.sequences
    seeds = [sequence_seed(settings.seed, shard, index) for index in range(count)]
    samples: list[Sample] = []
    for start in tqdm(range(0, count, settings.batch_size), desc="proxy", unit="batch"):
        uniforms = uniform_numbers(seeds[start : start + settings.batch_size], settings.max_length - 1)
        samples += sample(model, uniforms, tokenizer.bos_token_id, tokenizer.eos_token_id, settings.temperature)
    table = pa.table(
        {
            "index": pa.array(range(count), pa.int32()),
            "seed": pa.array(seeds, pa.uint64()),
            "token_ids": pa.array([one.token_ids for one in samples], pa.list_(pa.int32())),
            "text": [tokenizer.decode(one.token_ids, skip_special_tokens=True) for one in samples],
            "logprobs": pa.array([one.logprobs for one in samples], pa.list_(pa.float32())),
            "finish_reason": ["stop" if one.finished else "length" for one in samples],
        }
    )
    manifest = {"artefact": "proxy", **base.identity, "proxy": settings.model_dump(exclude={"shards"}), "shard": shard}
    write_table(output, table, manifest)


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
    """
    from transformers import DynamicCache

    samples = [Sample([bos], [], finished=False) for _ in uniforms]
    active = torch.arange(len(samples))
    tokens = torch.full((len(samples), 1), bos)
    cache = DynamicCache()
    for step in range(uniforms.shape[1]):
        logits = model(input_ids=tokens, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
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
            cache.batch_select_indices(running)
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
