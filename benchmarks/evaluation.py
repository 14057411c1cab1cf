"""Evaluation of the offline model on the default preset's tasks, against lm-eval itself at its best batch size.

Both ask and score the same items; ours keeps a record of each as well.
"""

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
        own = {name: task for asked in names for name, task in harness.tasks(asked).items()}
        ours, *theirs = alternate(
            repeats,
            partial(harness.answers, model, names),
            *(partial(peer, model, tokenizer, own, batch) for batch in batches),
        )
        items = len(harness.answers(model, names))
    best = min(range(len(batches)), key=lambda one: median(theirs[one]))
    work = f"{items:,} items of {len(names)} tasks, offline model"
    note = f"ours at batch {params.evaluation.batch_size}, and kept; peer at {batches[best]}"
    yield faster("evaluation", "lm-eval's evaluate with its HFLM", work, ours, theirs[best], 1, note)


def peer(model: Any, tokenizer: Any, tasks: dict[str, Any], batch: int) -> None:
    """The harness with its own model."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, add_bos_token=True)
    lm.generate_until = partial(lm.generate_until, disable_tqdm=True)
    groups: dict[str, Any] = {"tasks": tasks, "groups": {}, "group_map": {}}
    evaluate(lm, groups, bootstrap_iters=0, verbosity="ERROR")


if __name__ == "__main__":
    main(rows)
