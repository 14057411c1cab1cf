"""The train stage: one run, from the frozen base model to a LoRA adapter, its checkpoints and its history.

A run folder holds ``adapter/`` (the result), ``checkpoints/STEP/`` (the last one equals the result),
``history.parquet`` and ``manifest.json``.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from folora.adapter import AdaptedModel, Context
from folora.divergence import HeldOutText
from folora.errors import FoLoRAError
from folora.meter import ForgettingMeter
from folora.objective import Objective
from folora.params import run_params
from folora.proxy import HELDOUT
from folora.records import card_of, peft_adapter, source_tags
from folora.schedule import batch_rows, equal_token_steps
from folora.spectrum import read_spectrum
from folora.storage import (
    FORMAT,
    MANIFEST_FILE,
    digest_of_file,
    publish,
    read_table,
    write_json,
    write_table,
)
from folora.tracking import RunLog, run_log

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from folora.base import Base
    from folora.methods import Method
    from folora.params import Params, Run

Row = dict[str, list[int]]
IGNORED = -100  # the label that PyTorch's cross entropy leaves out


@dataclass(frozen=True)
class TrainInputs:
    """Files a run reads."""

    task: Path
    proxy: Path
    heldout: Path
    spectrum: Path


def train_run(params: Params, name: str, base: Base, inputs: TrainInputs, output: Path) -> None:
    """Train one run and write its folder.

    Raises:
        FoLoRAError: an input is damaged or of another model or parameter set, or training left the adapter unmoved.
    """
    run = params.runs[name]
    manifest = run_manifest(params, name, base, inputs)
    task_rows = read_task_rows(params, run, base, inputs.task)
    shards = _proxy_shards(params, inputs).items()
    proxy = [ids for shard, path in shards for ids in _proxy_ids(params, base, path, shard)]
    spectrum = read_spectrum(inputs.spectrum, **base.identity, task=params.tasks[run.task].model_dump())
    heldout = _proxy_ids(params, base, inputs.heldout, HELDOUT)[: params.train.meter_sequences]

    torch.manual_seed(run.seed)
    tokenizer = base.load_tokenizer()
    bare = base.load_model()
    text = HeldOutText(bare, heldout, params.evaluation.batch_size, tokenizer.pad_token_id)
    method = params.methods[run.method]
    adapted = method.adapt(bare, Context(params.adapter, spectrum, base, proxy))
    rows = ScheduledRows(task_rows, [full_row(ids) for ids in proxy], params, run.seed, method)
    with publish(output) as folder, run_log(params.tracking, card_of(manifest), source_tags(params)) as log:
        recorder = Recorder(folder, adapted, text, rows.steps, params.train.checkpoints, log)
        fit(adapted, tokenizer, rows, recorder, params, run)
        if not adapted.moved():
            raise FoLoRAError(f"runs.{name}: training changed no weight: raise the learning rate or the steps")
        adapted.save(folder / "adapter")
        about = {"artefact": "history", "run": name, "gates": recorder.gates}
        write_table(folder / "history.parquet", recorder.table(), about)
        write_json(folder / MANIFEST_FILE, manifest)
        if peft_adapter(folder):
            log.adapter(folder / "adapter", rows.steps)


def run_manifest(params: Params, name: str, base: Base, inputs: TrainInputs) -> dict[str, Any]:
    """What a run is made from; its digest is the run's identity."""
    return {
        "format": FORMAT,
        "artefact": "run",
        "run": name,
        **base.identity,
        "inputs": {
            "task": digest_of_file(inputs.task),
            "heldout": digest_of_file(inputs.heldout),
            "spectrum": digest_of_file(inputs.spectrum),
            "proxy": [digest_of_file(path) for path in _proxy_shards(params, inputs).values()],
        },
        "params": run_params(params, name),
    }


def _proxy_shards(params: Params, inputs: TrainInputs) -> dict[str, Path]:
    return {str(shard): inputs.proxy / f"{shard}.parquet" for shard in params.proxy.shards}


def _proxy_ids(params: Params, base: Base, path: Path, shard: str) -> list[list[int]]:
    settings = params.proxy.model_dump(exclude={"shards"})
    table, _ = read_table(path, artefact="proxy", **base.identity, proxy=settings, shard=shard)
    return table["token_ids"].to_pylist()


def read_task_rows(params: Params, run: Run, base: Base, path: Path) -> list[Row]:
    """Task rows with labels on the response only."""
    table, _ = read_table(path, artefact="task", **base.identity, task=params.tasks[run.task].model_dump())
    return [
        {"input_ids": ids, "labels": [i if counts else IGNORED for i, counts in zip(ids, mask, strict=True)]}
        for ids, mask in zip(table["input_ids"].to_pylist(), table["loss_mask"].to_pylist(), strict=True)
    ]


def full_row(ids: list[int]) -> Row:
    """A proxy row: every token but BOS is learned."""
    return {"input_ids": ids, "labels": [IGNORED, *ids[1:]]}


class ScheduledRows(torch.utils.data.Dataset):
    """Rows in the order of a schedule, so that the sequential sampler yields the planned batches.

    Attributes:
        steps: optimizer steps.
        batch_size: rows a step; the task's come first, then those of the proxy text.
    """

    def __init__(self, task: list[Row], proxy: list[Row], params: Params, seed: int, method: Method) -> None:
        settings = params.train
        sizes = {"batch_size": settings.batch_size, "replay": method.replay}
        self.steps = settings.steps
        if method.replay_match == "tokens":
            self.steps = equal_token_steps(
                settings.steps, [len(row["labels"]) for row in task], [len(row["labels"]) for row in proxy], **sizes
            )
        self.batch_size = settings.batch_size + method.replay
        self._rows = [*task, *proxy]
        self._order = batch_rows(seed=seed, steps=self.steps, task_rows=len(task), proxy_rows=len(proxy), **sizes)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, position: int) -> Row:
        return self._rows[self._order[position]]


class ObjectiveTrainer(Trainer):
    """transformers' Trainer with a method's objective in place of the model's own loss."""

    def __init__(self, objective: Objective, **options: Any) -> None:
        super().__init__(**options)
        self._objective = objective

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> torch.Tensor:
        """The loss of one batch."""
        return self._objective(model, inputs)


def fit(
    adapted: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: ScheduledRows,
    recorder: Recorder,
    params: Params,
    run: Run,
) -> None:
    """Train with transformers' Trainer: linear decay, token-weighted loss, clipping by the global norm."""
    settings = params.train
    method = params.methods[run.method]
    optimizer = method.optimizer(adapted, run.learning_rate)
    recorder.record_gates(optimizer)
    with TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=rows.steps,
            per_device_train_batch_size=rows.batch_size,
            train_sampling_strategy="sequential",
            lr_scheduler_type="linear",
            max_grad_norm=settings.max_grad_norm,
            logging_steps=settings.log_every,
            logging_first_step=True,  # a run shorter than log_every has a history too
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            disable_tqdm=not sys.stderr.isatty(),
            use_cpu=not torch.cuda.is_available(),
            seed=run.seed,
            include_num_input_tokens_seen="non_padding",
        )
        trainer = ObjectiveTrainer(
            Objective(method, adapted, settings.batch_size),
            model=adapted.model,
            args=arguments,
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            optimizers=(optimizer, None),
            callbacks=[recorder],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


class Recorder(TrainerCallback):
    """Writes checkpoints along the way and keeps the history of losses and of the forgetting meter."""

    def __init__(
        self, folder: Path, adapted: AdaptedModel, text: HeldOutText, steps: int, checkpoints: int, log: RunLog
    ) -> None:
        self._folder, self._adapted, self._text, self._log = folder / "checkpoints", adapted, text, log
        self._meter = ForgettingMeter(adapted.groups)
        self._at = {round(steps * (i + 1) / checkpoints) for i in range(checkpoints)}
        self._tokens, self._since = 0, time.perf_counter()
        self.history: list[dict[str, float]] = []
        self.gates: dict[str, float] = {}

    def record_gates(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep and log the mean gate of each layer input, where the optimizer gates the updates of A."""
        of_parameter = {
            id(parameter): coordinates.gate
            for group, coordinates in zip(optimizer.param_groups, getattr(optimizer, "coordinates", []), strict=False)
            for parameter in group["params"]
        }
        for group in self._adapted.groups:
            layer = group.layers[0]
            gate = of_parameter.get(id(getattr(layer, "A", None)))
            if gate is not None:
                self.gates[layer.name] = float(torch.as_tensor(gate).mean())
        self._log.constants({f"gate/{name}": gate for name, gate in self.gates.items()})

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        del args, state, control
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save a checkpoint where one is due."""
        del args, control
        if state.global_step in self._at:
            self._adapted.save(self._folder / str(state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **_: Any) -> None:
        """Read the meter whenever the Trainer logs a loss."""
        del args, control
        if "loss" not in logs:
            return
        step, tokens = state.global_step, state.num_input_tokens_seen
        speed = (tokens - self._tokens) / (time.perf_counter() - self._since)
        model.eval()
        reading = {
            "loss": float(logs["loss"]),
            "learning_rate": float(logs["learning_rate"]),
            "grad_norm": float(logs["grad_norm"]),
            **self._meter.read(),
            "kl": self._text.measure(model).kl,
        }
        model.train()
        self.history.append({"step": step, **reading})
        # speed differs from one training to the next and stays out of the history, whose bytes do not
        logged = {**reading, "tokens_per_second": speed}
        self._log.metrics({f"train/{key}": value for key, value in logged.items()}, step)
        self._tokens, self._since = tokens, time.perf_counter()

    def table(self) -> Any:
        """The history as an Arrow table, one row a reading."""
        import pyarrow as pa

        return pa.Table.from_pylist(self.history)
