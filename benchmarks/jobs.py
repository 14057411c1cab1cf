"""Two jobs of one thread against one job of two threads: how to use two cores for trainings and moments."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from bench import Row, alternate, main, within

if TYPE_CHECKING:
    from collections.abc import Iterator

STEP = """
import torch
torch.set_num_threads({threads})
import sys; sys.path.insert(0, {folder!r})
from models import {shape}, model_of, tokens
model = model_of({shape})
ids = tokens(model, {rows}, {length})
for _ in range({steps}):
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
"""


def rows(size: str, repeats: int) -> Iterator[Row]:
    """Forward and backward passes of two trainings, one after the other or side by side."""
    works = [("offline model", "OFFLINE", 32, 24, 200 if size == "full" else 2)]
    if size == "full":
        works.append(("SmolLM2-135M", "SMOLLM2", 4, 128, 2))
    for what, shape, batch, length, steps in works:

        def code(threads: int, shape: str = shape, batch: int = batch, length: int = length, steps: int = steps) -> str:
            folder = sys.path[0]
            return STEP.format(threads=threads, folder=folder, shape=shape, rows=batch, length=length, steps=steps)

        def together(code: str = code(1)) -> None:
            running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
            assert all(one.wait() == 0 for one in running)

        def in_turn(code: str = code(2)) -> None:
            for _ in range(2):
                subprocess.run([sys.executable, "-c", code], check=True)

        ours, theirs = alternate(repeats, together, in_turn)
        work = f"two times {steps} steps of {batch} x {length} tokens, {what}"
        yield within("two jobs of one thread", "one after the other, two threads", work, ours, theirs, 1)


if __name__ == "__main__":
    main(rows)
