"""Evaluation of the offline model on the default preset's tasks, against lm-eval's own model at its best batch size."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from bench import Row, alternate, faster, main
from transformers import LlamaForCausalLM

from folora.foundation import character_tokenizer, offline_config
from folora.harness import Harness
from folora.params import OfflineFoundation, load_params
from folora.world import write_world

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent


def rows(size: str, repeats: int) -> Iterator[Row]:
    """Ask the same items, at the preset's batch size and at several of the harness's own."""
    params = load_params(ROOT / "params.yaml")
    assert isinstance(params.foundation, OfflineFoundation), "the default preset trains its own"
    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(offline_config(params.foundation, tokenizer)).eval()
    names, batches = (params.evaluation.kept, (64, 128, 256, 512)) if size == "full" else (["home"], (256,))
    with tempfile.TemporaryDirectory() as folder:
        write_world(params.world, Path(folder) / "world")
        tasks = Path(folder) / "world"
        harness = Harness(tasks, params.evaluation, tokenizer)
        asked = _requests(harness, names)
        ours, *theirs = alternate(
            repeats,
            partial(harness.answers, model, names),
            *(partial(peer, model, tokenizer, asked, batch) for batch in batches),
        )
    best = min(range(len(batches)), key=lambda one: median(theirs[one]))
    work = f"{len(asked):,} items of {len(names)} tasks, offline model"
    note = f"ours at batch {params.evaluation.batch_size}, and scored; peer at {batches[best]}, not scored"
    yield faster("evaluation", "lm-eval's HFLM, answers alone", work, ours, theirs[best], 1, note)


def _requests(harness: Harness, names: list[str]) -> list[Any]:
    """What the harness asks of a model for these tasks."""
    found = []
    for name in names:
        for task in harness.tasks(name).values():
            task.build_all_requests(rank=0, world_size=1)
            found += task.instances
    return found


def peer(model: Any, tokenizer: Any, requests: list[Any], batch: int) -> None:
    """The harness's own model, asked directly."""
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, add_bos_token=True)
    for kind in sorted({request.request_type for request in requests}):
        options = {"disable_tqdm": True}
        getattr(lm, kind)([request for request in requests if request.request_type == kind], **options)


if __name__ == "__main__":
    main(rows)
