"""A run as others take it over: its adapter with a model card, or the merged model."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from folora.base import open_base, with_own_layers
from folora.commands.results import base_record, final_record
from folora.errors import FoLoRAError
from folora.hub import from_hub
from folora.loading import HALF_ONLY
from folora.params import flatten
from folora.records import read_manifest
from folora.serving import TRANSFORMERS, from_pretrained, usage_of
from folora.storage import ADAPTER, MANIFEST_FILE, PEFT_CONFIG, digest_of_file, publish, read_json, read_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from folora.base import Base
    from folora.params import Params
    from folora.storage import Manifest, Record

COMPARED = 16  # held-out rows on which a merged model is compared with base and adapter
TAG = "folora"  # of every card
CLOSE = 1e-3  # logits of a merge in float32 differ by less
ROW_KEYS = ("prompt", "response", "messages", "chat", "rows")  # of a task, that say what its rows are

CARD = """---
{metadata}
---

# {title}

{what} of {model} for the task `{task}`, made by the method `{kind}` with FoLoRA's pipeline.

| score on the test split | base | adapted |
| --- | ---: | ---: |
{figures}

A score is a mean over items: right or wrong, or, of a task scored by likelihood, the mean probability of a token of the
right answer. KL to the base model on its own text: {kl:.4f} nats per token.{merged}

## Use

```python
{load}
```

## What it was trained on

Rows of {data}, by these parameters:

```yaml
{values}
```

## How it was made

| parameter | value |
| --- | --- |
{parameters}
"""


@dataclass(frozen=True)
class Places:
    """Where the results of a pipeline lie.

    Attributes:
        runs: folder with METHOD/RUN.
        evaluations: folder with the results.
        foundation: output of the foundation stage.
        heldout: text that a merged model is compared on.
        rows: folder with what the task stage made of every task.
    """

    runs: Path
    evaluations: Path
    foundation: Path
    heldout: Path
    rows: Path


def export_run(params: Params, name: str, places: Places, output: Path, *, merge: bool) -> float | None:
    """Write a folder with the adapter, or the merged model in float32, and its model card.

    Args:
        params: names the run.
        name: of the run.
        places: where the results lie.
        output: the folder to write.
        merge: whether the adapter becomes a part of the weights.

    Returns:
        The greatest difference between logits before and after merging; None without a merge.

    Raises:
        FoLoRAError: the run is missing, not measured, or not of the rows that are there, changes whole weights and is
            not merged, a merge went wrong, or something else than an earlier export is in the place of ``output``.
    """
    taken = any(output.iterdir()) if output.is_dir() else output.exists()
    if taken and not _is_export(output):
        raise FoLoRAError(f"{output}: is there already, and no export: name a folder to make")
    found = final_record(params, name, places.runs, places.evaluations)
    before = base_record(params.runs[name].task, places.evaluations)
    folder = places.runs / params.runs[name].method / name
    base = open_base(places.foundation)
    manifest = read_manifest(folder, run=name, **base.identity)
    settings = trained_on(manifest, places.rows / f"{params.runs[name].task}.parquet")
    adapter = folder / ADAPTER
    if not merge and not (adapter / PEFT_CONFIG).exists():
        raise FoLoRAError(f"{name}: changed whole weights, which no adapter holds: --merge writes the model")
    with publish(output) as made:
        difference = None
        if merge:
            difference = write_merged(base, adapter, places.heldout, made)
        else:
            shutil.copytree(adapter, made)
        model = _name_of(base)
        code = base.loading.trust_remote_code
        if merge:
            load = f"{TRANSFORMERS}\nmodel = {from_pretrained(str(output), code=code)}"
        else:
            load = usage_of(name, adapter, model, code=code).load.replace(str(adapter), str(output))
        card = model_card(manifest, settings, base, before, found, load, difference)
        (made / "README.md").write_text(card)
    return difference


def _is_export(folder: Path) -> bool:
    """Whether a folder was written by ``export_run``."""
    card = folder / "README.md"
    text = card.read_text(errors="replace") if card.is_file() else ""
    return text.startswith("---\n") and f"\n- {TAG}\n" in text


def write_merged(base: Base, adapter: Path, heldout: Path, output: Path) -> float:
    """Write the merged model in float32, and its tokenizer.

    Returns:
        The greatest difference between logits of the adapted model and of the written one, on held-out text.

    Raises:
        FoLoRAError: that is too great.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from folora.adapter import load_checkpoint

    tokenizer = base.load_tokenizer()
    rows = read_table(heldout, artefact="proxy", **base.identity)[0]["token_ids"].to_pylist()[:COMPARED]
    attention = "sdpa" if base.loading.attention == HALF_ONLY else base.loading.attention
    bare = base.load_model().float()
    bare.set_attn_implementation(attention)

    def logits(
        model: Any,
    ) -> Iterator[torch.Tensor]:  # on the CPU, a row at a time: of a large vocabulary they are many
        return (model(input_ids=torch.tensor([ids], device=model.device)).logits.cpu() for ids in rows)

    model: Any = load_checkpoint(bare, adapter)
    with torch.no_grad():
        before = list(logits(model))
        if hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload()
        with_own_layers(model)
        model.save_pretrained(output)
        del model, bare  # there is memory for one
        model = AutoModelForCausalLM.from_pretrained(
            output,
            dtype=torch.float32,
            attn_implementation=attention,
            trust_remote_code=base.loading.trust_remote_code,
        )
        model.to(base.loading.device)
        changes = [(one - other).abs().max() for one, other in zip(logits(model), before, strict=True)]
    difference = float(torch.stack(changes).max())
    if not difference < CLOSE:
        raise FoLoRAError(f"{adapter}: merging changes the logits by {difference:.1e}: use the adapter as it is")
    tokenizer.padding_side = tokenizer.init_kwargs.get("padding_side", tokenizer.padding_side)  # as the base's own says
    tokenizer.save_pretrained(output)
    return difference


def trained_on(manifest: Manifest, rows: Path) -> Record:
    """The entry of tasks that the rows of a run were made by, which params.yaml may hold no more.

    Args:
        manifest: of the run.
        rows: its task, as the task stage wrote it.

    Raises:
        FoLoRAError: that is missing, or was made again since.
    """
    if digest_of_file(rows) != manifest["inputs"]["task"]:
        run = manifest["run"]
        raise FoLoRAError(f"{rows}: not the rows that {run} was trained on: dvc repro train@{run}")
    return read_table(rows, artefact="task")[1]["task"]


def _data_of(dataset: str) -> tuple[str, str | None]:
    """What a card says of a data set, and its hub id if it was fetched from a hub."""
    path = Path(dataset) / MANIFEST_FILE
    manifest = read_json(path) if path.is_file() else None
    if not isinstance(manifest, dict) or manifest.get("artefact") != "download":
        return f"`{dataset}`", None
    source, commit = manifest["download"], manifest["commit"]
    config = "" if source["config"] is None else f", configuration {source['config']}"
    at = "" if commit is None else f", commit {commit}"  # without it: a local folder
    return f"`{source['dataset']}`{config}, split {source['split']}{at}", source["dataset"] if commit else None


def _name_of(base: Base) -> str:
    """Hub id or folder of a base model."""
    return base.manifest["source"] or str(base.folder)


def model_card(
    manifest: Manifest,
    settings: Record,
    base: Base,
    before: Record,
    found: Record,
    load: str,
    difference: float | None,
) -> str:
    """The README of an exported folder, in the hub's format: where it comes from, what it keeps, how it was made.

    Args:
        manifest: of the run.
        settings: the entry of tasks that its rows were made by.
        base: the base model.
        before: metrics of the base model.
        found: metrics of the run.
        load: Python that loads it.
        difference: between logits before and after merging; None of an adapter.
    """
    from huggingface_hub import EvalResult, ModelCardData

    name, kind, task = manifest["run"], manifest["params"]["method"]["kind"], manifest["params"]["run"]["task"]
    model, gguf = _name_of(base), base.manifest.get("gguf")
    data, hub_id = _data_of(settings["dataset"])
    rows = ["target", "kept", *(row for row in found if row.startswith("kept/"))]
    metadata = ModelCardData(
        base_model=model,
        datasets=None if hub_id is None else [hub_id],
        library_name="peft" if difference is None else "transformers",
        pipeline_tag="text-generation",
        tags=[TAG, kind],
        model_name=name,
        eval_results=[
            EvalResult("text-generation", f"{task}-{row}", row, "score", found[row]) for row in ("target", "kept")
        ],
    )
    return CARD.format(
        metadata=metadata.to_yaml(),
        title=name,
        what="An adapter" if difference is None else "A fine-tuned model, merged in float32",
        model=f"`{model}`" + (f" (the GGUF file `{gguf['file']}`, dequantised)" if gguf else ""),
        task=task,
        kind=kind,
        figures="\n".join(f"| {row} | {before[row]:.3f} | {found[row]:.3f} |" for row in rows),
        kl=found["kl"],
        merged="" if difference is None else f" Merging changed no logit by more than {difference:.1e}.",
        load=load,
        data=data,
        values="\n".join(
            f"{key}: {json.dumps(settings[key], ensure_ascii=False)}" for key in ROW_KEYS if settings[key]
        ),
        parameters="\n".join(f"| `{key}` | {value} |" for key, value in sorted(flatten(manifest["params"]).items())),
    )


def push_folder(folder: Path, repository: str, *, private: bool) -> str:
    """Upload an exported folder to a hub; returns its address.

    Raises:
        FoLoRAError: it is no exported folder, or the hub refuses.
    """
    from huggingface_hub import HfApi

    if not (folder / "README.md").is_file():
        raise FoLoRAError(f"{folder}: holds no model card: write it with folora export")
    api = HfApi()

    def upload() -> str:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder))

    address: str = from_hub("push", repository, None, upload)
    return address
