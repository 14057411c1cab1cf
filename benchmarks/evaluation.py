"""Evaluation of the offline model on the default preset's tasks, against lm-eval itself at its best batch size.

Both ask and score the same items; ours keeps a record of each as well.
"""

from __future__ import annotations

import math
import tempfile
from functools import partial
from pathlib import Path
from statistics import fmean, median
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

    from folora.storage import Record

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
        records = harness.answers(model, names)
        check_equal(records, peer(model, tokenizer, own, params.evaluation.batch_size))
        ours, *theirs = alternate(
            repeats,
            partial(harness.answers, model, names),
            *(partial(peer, model, tokenizer, own, batch) for batch in batches),
        )
    best = min(range(len(batches)), key=lambda one: median(theirs[one]))
    work = f"{len(records):,} items of {len(names)} tasks, offline model"
    note = f"ours at batch {params.evaluation.batch_size}, and kept; peer at {batches[best]}"
    yield faster("evaluation", "lm-eval's evaluate with its HFLM", work, ours, theirs[best], 1, note)


def peer(model: Any, tokenizer: Any, tasks: dict[str, Any], batch: int) -> Any:
    """What the harness finds with its own model."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, add_bos_token=True)
    lm.generate_until = partial(lm.generate_until, disable_tqdm=True)
    groups: dict[str, Any] = {"tasks": tasks, "groups": {}, "group_map": {}}
    return evaluate(lm, groups, bootstrap_iters=0, verbosity="ERROR")


def check_equal(records: list[Record], found: Any) -> None:
    """See that scores are the harness's, and answers too: a model with random weights scores zero."""
    for name, samples in found["samples"].items():
        own = [record for record in records if record["task"] == name]
        score = found["results"][name]["exact_match,none"]  # as all tasks of the preset are scored
        assert math.isclose(fmean(record["score"] for record in own), score, abs_tol=1e-12), name
        answers = [sample["filtered_resps"][0] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        assert [record["answer"] for record in own] == answers, name


if __name__ == "__main__":
    main(rows)
