"""The proxy and heldout stages: text that stands in for the pretraining data nobody has.

The text is sampled from the base model: each sequence starts from BOS and is drawn at the stated temperature from the
full distribution, at temperature 1 an unbiased sample. Rows of a corpus and random tokens can take its place, for
comparison. A sequence's random numbers come from (seed, shard, index) alone, so shards can be computed in any order
and in any batches. ``vllm_sampling`` draws such text with vLLM: the same distribution, other random numbers.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from folora.errors import FoLoRAError
from folora.params import CorpusSource, SampledSource
from folora.rows import HELDOUT, encode, read_rows, render
from folora.scratch import kept, scratch
from folora.storage import digest_of_folder, write_table

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from folora.base import Base
    from folora.params import Proxy

SHORTEST_LOOP = 16  # tokens
LENGTH = "proxy.max_length"


@dataclass
class Sample:
    """One sequence: token ids (BOS first), a log-probability per sampled token, and whether it ended by itself."""

    token_ids: list[int]
    logprobs: list[float]
    finished: bool


Draw = Callable[[list[int]], list[Sample]]  # a seed for each sequence to the sequences


def generate_proxy(settings: Proxy, source: str, shard: str, base: Base, output: Path) -> None:
    """Write one shard of a source as Parquet.

    Raises:
        FoLoRAError: the sequences are longer than the model's context, the corpus is not as declared, or vLLM is
            asked for and is not here or cannot run the model.
    """
    base.check_length(settings.max_length, LENGTH)
    chosen, steps = settings.sources[source], settings.max_length - 1
    manifest = {"proxy": settings.sampling(source), "shard": shard}
    read = None
    if isinstance(chosen, SampledSource) and chosen.backend == "vllm":
        from folora.vllm_sampling import made_with_vllm, vllm_draw

        draw = vllm_draw(base, chosen.temperature, steps)
        manifest |= made_with_vllm()
    elif isinstance(chosen, SampledSource):
        draw = _from_model(base, chosen.temperature, steps)
    elif isinstance(chosen, CorpusSource):
        draw = _from_corpus(base, chosen, Path(settings.corpora), steps)
        read = digest_of_folder(Path(settings.corpora))
    else:
        draw = _from_vocabulary(base, steps)
    _write(settings, shard, settings.sequences, base, draw, output, manifest, read)


def generate_heldout(settings: Proxy, base: Base, output: Path) -> None:
    """Write the held-out text that measures KL and perplexity: the base model's own, at temperature 1.

    Raises:
        FoLoRAError: the sequences are longer than the model's context.
    """
    base.check_length(settings.max_length, LENGTH)
    manifest = {"proxy": settings.heldout_sampling(), "shard": HELDOUT}
    draw = _from_model(base, 1.0, settings.max_length - 1)
    _write(settings, HELDOUT, settings.heldout_sequences, base, draw, output, manifest)


def _write(
    settings: Proxy,
    shard: str,
    count: int,
    base: Base,
    draw: Draw,
    output: Path,
    manifest: dict[str, Any],
    read: str | None = None,
) -> None:
    """Draw ``count`` sequences, batch by batch, and write them; ``read`` is the digest of what ``draw`` reads."""
    seeds = [sequence_seed(settings.seed, shard, index) for index in range(count)]
    about = {"artefact": "proxy", **base.identity, **manifest}
    samples: list[Sample] = []
    begun = time.monotonic()
    with scratch(**about, read=read) as unfinished, tqdm(total=count, desc="proxy", unit=" sequences") as bar:
        for start in range(0, count, settings.batch_size):
            batch = seeds[start : start + settings.batch_size]

            def drawn(batch: list[int] = batch) -> list[tuple[Any, ...]]:
                return [astuple(one) for one in draw(batch)]

            samples += [Sample(*one) for one in kept(unfinished / f"{start}.json", drawn)]
            tokens = sum(len(one.token_ids) for one in samples)
            bar.set_postfix_str(f"{tokens / max(time.monotonic() - begun, 1e-3):,.0f} tokens/s", refresh=False)
            bar.update(len(batch))
        counts = {"sequences": count, "loops": sum(loops(one.token_ids) for one in samples)}
        write_table(output, _table(samples, seeds, base.load_tokenizer()), about | counts)


def _table(samples: list[Sample], seeds: list[int], tokenizer: PreTrainedTokenizerBase) -> pa.Table:
    import pyarrow as pa

    return pa.table(
        {
            "index": pa.array(range(len(samples)), pa.int32()),
            "seed": pa.array(seeds, pa.uint64()),
            "token_ids": pa.array([one.token_ids for one in samples], pa.list_(pa.int32())),
            "text": [tokenizer.decode(one.token_ids, skip_special_tokens=True) for one in samples],
            "logprobs": pa.array([one.logprobs for one in samples], pa.list_(pa.float32())),
            "finish_reason": ["stop" if one.finished else "length" for one in samples],
        }
    )


def _from_model(base: Base, temperature: float, steps: int) -> Draw:
    model, tokenizer = base.load_for_inference(), base.load_tokenizer()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return lambda seeds: sample(model, uniform_numbers(seeds, steps), bos, eos, temperature)


def _from_corpus(base: Base, source: CorpusSource, corpora: Path, steps: int) -> Draw:
    """Rows drawn with replacement, each by the first of its sequence's numbers, and cut where they are too long."""
    tokenizer = base.load_tokenizer()
    dataset = str(corpora / source.dataset)
    rows = read_rows(dataset, "proxy.sources.*.dataset")
    texts = [text for (text,) in render(rows, [source.text], dataset)]

    def draw(seeds: list[int]) -> list[Sample]:
        rows = []
        for number in (uniform_numbers(seeds, steps)[:, 0] * len(texts)).long().tolist():
            ids = [*encode(texts[number], tokenizer), tokenizer.eos_token_id]
            rows.append(ids[: steps + 1])
        return [Sample(ids, [], finished=ids[-1] == tokenizer.eos_token_id) for ids in rows]

    return draw


def _from_vocabulary(base: Base, steps: int) -> Draw:
    tokenizer = base.load_tokenizer()
    words = torch.tensor(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
    bos = tokenizer.bos_token_id
    return lambda seeds: [
        Sample([bos, *ids], [], finished=False)
        for ids in words[(uniform_numbers(seeds, steps) * len(words)).long()].tolist()
    ]


def sequence_seed(seed: int, shard: str, index: int) -> int:
    """A 64-bit seed for one sequence; different for every (seed, shard, index)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{shard}/{index}".encode()).digest()[:8])


def loops(ids: list[int]) -> bool:
    """Whether a text ends by repeating itself: at least its last 16 tokens, and its last quarter.

    A model that is stuck in a loop says little of what it knows, and moments count every token of it.
    """
    tail = max(SHORTEST_LOOP, len(ids) // 4)
    return any(ids[-tail:] == ids[-tail - period : -period] for period in range(1, tail // 2 + 1))


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
