"""The proxy and heldout stages: text that stands in for the pretraining data nobody has.

The text is sampled from the base model: each sequence starts from BOS and is drawn at the stated temperature from the
full distribution, at temperature 1 an unbiased sample. Rows of a corpus and random tokens can take its place, for
comparison. A sequence's random numbers come from (seed, shard, index) alone, so shards can be computed in any order
and in any batches. ``vllm_sampling`` draws such text with vLLM: the same distribution, other random numbers.
"""

from __future__ import annotations

import time
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from folora.params import CorpusSource, SampledSource
from folora.rows import HELDOUT, encode, read_rows, render
from folora.sampling import Sample, sample, sequence_seed, uniform_numbers
from folora.scratch import kept, scratch
from folora.storage import digest_of_folder, write_table

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

    from folora.base import Base
    from folora.params import Proxy
    from folora.sampling import Draw

SHORTEST_LOOP = 16  # tokens
LENGTH = "proxy.max_length"


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


def loops(ids: list[int]) -> bool:
    """Whether a text ends by repeating itself: at least its last 16 tokens, and its last quarter.

    A model that is stuck in a loop says little of what it knows, and moments count every token of it.
    """
    tail = max(SHORTEST_LOOP, len(ids) // 4)
    return any(ids[-tail:] == ids[-tail - period : -period] for period in range(1, tail // 2 + 1))
