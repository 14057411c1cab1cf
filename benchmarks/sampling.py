"""Sampling of proxy text, against transformers' generate, each at its best batch size."""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from bench import Row, alternate, faster, main
from models import sized

from folora.sampling import sample, uniform_numbers

if TYPE_CHECKING:
    from collections.abc import Iterator


SMALL, MOST = 64, 3  # a larger batch takes minutes, and is repeated so often at most


def rows(size: str, repeats: int) -> Iterator[Row]:
    """Tokens a second at every batch size, and the best of both."""
    model = sized(size)
    steps, sizes = (64, (16, 32, 64, 128, 256)) if size == "full" else (8, (4, 8))
    seconds = {
        batch: alternate(
            min(repeats, MOST) if batch > SMALL else repeats,
            partial(ours, model, batch, steps),
            partial(theirs, model, batch, steps),
        )
        for batch in sizes
    }
    best = [min(sizes, key=lambda batch: median(seconds[batch][one]) / batch) for one in (0, 1)]
    found, peer = ([time / batch for time in seconds[batch][one]] for one, batch in enumerate(best))
    speeds = [batch * steps / median(seconds[batch][one]) for one, batch in enumerate(best)]
    note = f"{speeds[0]:,.0f} tokens/s at batch {best[0]} against {speeds[1]:,.0f} at batch {best[1]}"
    work = f"{steps} tokens a sequence, {model.num_parameters() / 1e6:.0f} M parameters; seconds a sequence"
    yield faster("proxy sampling", "model.generate", work, found, peer, 1, note)


def ours(model: Any, batch: int, steps: int) -> None:
    """What the proxy stage does; no sequence ends early, as there is no EOS."""
    found = sample(model, uniform_numbers(list(range(batch)), steps), bos=1, eos=-1, temperature=1.0)
    assert all(len(one.token_ids) == steps + 1 for one in found)


@torch.inference_mode()
def theirs(model: Any, batch: int, steps: int) -> None:
    """Plain sampling from the full distribution."""
    start = torch.ones(batch, 1, dtype=torch.long)
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(start, attention_mask=start, min_new_tokens=steps, max_new_tokens=steps, **options)
    assert found.shape == (batch, steps + 1)


if __name__ == "__main__":
    main(rows)
