"""The train stage: one run, from the frozen base model to a LoRA adapter, its checkpoints and its history.

A run folder holds ``adapter/`` (the result), ``checkpoints/STEP/`` (the last one equals the result),
``history.parquet``, ``coverage.json`` (what of the model is adapted) and ``manifest.json``.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import DataCollatorForSeq2Seq, PrinterCallback, TrainingArguments

from folora import processes
from folora.adapter import NOTABLE_ROUNDING, AdaptedModel, Context
from folora.counted_text import task_text
from folora.coverage import COVERAGE_FILE, Covered, coverage, print_coverage
from folora.divergence import HeldOutText
from folora.errors import FoLoRAError
from folora.objective import Objective
from folora.optimizer import check_first_step
from folora.params import run_params
from folora.recorder import Recorder
from folora.records import budget_figures, card_of, peft_adapter, source_tags
from folora.resume import STATES_KEPT, ResumableTrainer, StateSaver, last_state, step_of
from folora.rows import HELDOUT, PROXY_COLUMNS, masked_rows
from folora.schedule import batch_rows, checkpoint_steps, equal_token_steps
from folora.scratch import scratch
from folora.spectrum import read_spectrum
from folora.storage import (
    ADAPTER,
    CHECKPOINTS,
    FORMAT,
    HISTORY_FILE,
    MANIFEST_FILE,
    digest_of_file,
    made_with,
    publish,
    read_table,
    write_json,
    write_table,
)
from folora.tracking import run_log

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from folora.base import Base
    from folora.methods import Method
    from folora.params import Params, Run
    from folora.rows import MaskedRow
    from folora.tracking import RunLog

Row = dict[str, list[int]]
IGNORED = -100  # the label that PyTorch's cross entropy leaves out


@dataclass(frozen=True)
class TrainInputs:
    """Files a run reads."""

    task: Path
    proxy: Path
    heldout: Path
    spectrum: Path


@dataclass(frozen=True)
class Training:
    """A run that is ready to begin.

    Attributes:
        params: all parameters.
        run: the run's own.
        adapted: the model.
        tokenizer: pads the batches.
        rows: the schedule.
        text: measures the KL to the base.
        measured: the rows of that text.
        covered: what of the model is adapted.
    """

    params: Params
    run: Run
    adapted: AdaptedModel
    tokenizer: PreTrainedTokenizerBase
    rows: ScheduledRows
    text: HeldOutText
    measured: list[list[int]]
    covered: list[Covered]

    @property
    def method(self) -> Method:
        """Of the run."""
        return self.params.methods[self.run.method]

    def recorder(self, folder: Path | None = None, log: RunLog | None = None) -> Recorder:
        """Keeps checkpoints in a folder, the history, and the KL inside its budget."""
        due = checkpoint_steps(self.rows.steps, self.params.train.checkpoints)
        return Recorder(self.adapted, self.text, self.method.kl_budget, due, folder, log)

    def fit(self, recorder: Recorder, unfinished: Path, state: Path | None) -> None:
        """Train with transformers' Trainer: linear decay, token-weighted loss, clipping by the global norm.

        Args:
            recorder: of this process.
            unfinished: the run's scratch folder.
            state: in it, to go on from; None to begin.
        """
        settings = self.params.train
        optimizer = self.method.optimizer(self.adapted, self.run.learning_rate)
        share = processes.share_of(self.rows.batch_size)
        task_rows = max(settings.batch_size - processes.rank() * share, 0)  # its part of a batch is contiguous
        check_first_step(optimizer, self.adapted.moved)
        recorder.record_gates(optimizer)
        arguments = TrainingArguments(
            output_dir=str(unfinished),
            max_steps=self.rows.steps,
            per_device_train_batch_size=share,
            train_sampling_strategy="sequential",
            lr_scheduler_type="linear",
            max_grad_norm=settings.max_grad_norm,
            logging_steps=settings.log_every,
            logging_nan_inf_filter=False,  # or a loss that is not finite would be logged as the mean of the others
            logging_first_step=True,  # a run shorter than log_every has a history too
            save_strategy="no",  # StateSaver says when
            save_total_limit=STATES_KEPT,
            report_to=[],
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            disable_tqdm=not sys.stderr.isatty(),
            use_cpu=self.adapted.model.device.type == "cpu",
            activation_checkpointing=settings.gradient_checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False},
            seed=self.run.seed,
            include_num_input_tokens_seen="non_padding",
            ddp_find_unused_parameters=False,
        )
        trainer = ObjectiveTrainer(
            Objective(self.method, self.adapted, task_rows, settings.micro_batch),
            model=self.adapted.model,
            args=arguments,
            train_dataset=self.rows,
            data_collator=DataCollatorForSeq2Seq(self.tokenizer),
            optimizers=(optimizer, None),
            callbacks=[recorder, StateSaver(unfinished)],
        )
        trainer.remove_callback(PrinterCallback)
        self.adapted.model.train()  # every module: PEFT's wrapper says it trains while what it wraps does not
        trainer.train(resume_from_checkpoint=str(state) if state else None)
        processes.check_alike(self.adapted.trained)


def train_run(
    params: Params, name: str, base: Base, inputs: TrainInputs, output: Path, *, shard_base: bool = False
) -> float | None:
    """Train one run and write its folder; returns the median seconds of an optimizer step.

    A run that was killed goes on from its last saved state (``resume.py``) and gets the same bytes. Of several
    processes the first keeps all that is written, and the others train along.

    Args:
        params: all parameters.
        name: of the run.
        base: its model.
        inputs: files it reads.
        output: its folder.
        shard_base: whether each of several processes holds a part of the frozen weights only.

    Raises:
        FoLoRAError: an input is damaged or of another model or parameter set, or the first step moved nothing.
    """
    training = prepare(params, name, base, inputs, shard_base=shard_base)
    if processes.rank() > 0:
        training.fit(training.recorder(), *processes.from_first((Path(), None)))
        return None
    print_coverage(training.covered)
    rounding: dict[str, float] = {}
    if training.adapted.rounding > NOTABLE_ROUNDING:
        rounding = {"rounding": training.adapted.rounding}
        print(
            f"W - s B₀A₀ is rounded to {base.loading.dtype}: a checkpoint differs from the model in training by up to "
            f"{training.adapted.rounding:.1e} of a layer's weight; foundation.loading.dtype: float32 has no such error"
        )
    adapted, manifest = training.adapted, run_manifest(params, name, base, inputs)
    with scratch(**manifest) as unfinished:
        state = last_state(unfinished)
        begun = step_of(state) if state else 0
        with (
            publish(output) as folder,
            run_log(params.tracking, card_of(manifest), source_tags(params), begun) as log,
        ):
            checkpoints = unfinished / CHECKPOINTS
            recorder = training.recorder(checkpoints, log)
            training.fit(recorder, *processes.from_first((unfinished, state)))
            if training.method.kl_budget:
                print(budget_outcome(training, recorder))
                log.constants(budget_figures(training.method.kl_budget, recorder.last_kl))
            adapted.save(folder / ADAPTER)
            size = sum(parameter.numel() for parameter in adapted.trained)
            about = {"artefact": "history", "run": name, "gates": recorder.gates, "trainable": size, **rounding}
            write_table(folder / HISTORY_FILE, recorder.table(), about)
            write_json(folder / COVERAGE_FILE, [vars(one) for one in training.covered])
            write_json(folder / MANIFEST_FILE, manifest | made_with())
            if peft_adapter(folder):
                log.adapter(folder / ADAPTER, training.rows.steps)
            # last: until then a full disk loses nothing
            shutil.move(checkpoints, folder / CHECKPOINTS)
    return recorder.step_seconds


def prepare(params: Params, name: str, base: Base, inputs: TrainInputs, *, shard_base: bool = False) -> Training:
    """Read what a run needs, and make its model.

    Raises:
        FoLoRAError: an input is damaged or of another model or parameter set, or the method cannot do what is asked.
    """
    run = params.runs[name]
    method = params.methods[run.method]
    if shard_base and processes.count() == 1:
        raise FoLoRAError("--shard-base: there is one process: start several with torchrun, or leave it out")
    if shard_base and not method.shardable:
        reason = f"{method.kind_name()} reads or changes whole weights, of which a process would hold a part"
        raise FoLoRAError(f"methods.{run.method}: {reason}: train it without --shard-base")
    processes.join(base.loading.device)
    task_rows = read_task_rows(params, run, base, inputs.task)
    sampling = params.proxy.sampling(run.proxy)
    shards = _proxy_shards(params, inputs).items()
    proxy = [ids for shard, path in shards for ids in _proxy_ids(base, path, shard=shard, proxy=sampling)]
    made_for = {"task": params.tasks[run.task].model_dump(), "proxy": sampling}
    spectrum = read_spectrum(*params.spectrum.files(inputs.spectrum), **base.identity, **made_for)
    heldout = _proxy_ids(base, inputs.heldout, shard=HELDOUT, proxy=params.proxy.heldout_sampling())

    torch.manual_seed(run.seed)
    tokenizer = base.load_tokenizer()
    bare = base.load_model(sharded=shard_base)
    spectrum = spectrum.to(bare.device)
    covered = coverage(bare, spectrum.layers)
    # a budget holds on all of the text that the evaluation measures; without one a part of it is enough
    measured = heldout if method.kl_budget else heldout[: params.train.meter_sequences]
    at_once = params.train.micro_batch or params.train.batch_size
    text = HeldOutText(bare, measured, at_once, tokenizer.pad_token_id)
    counted = task_text(task_rows, params.covariance, tokenizer.pad_token_id)
    context = Context(params.adapter.rank, params.adapter.alpha, spectrum, base, proxy, counted)
    adapted = method.adapt(bare, context)
    if method.kl_budget and not adapted.scalable:
        key = f"methods.{run.method}.kl_budget"
        raise FoLoRAError(f"{key}: the change of {method.kind_name()} cannot be scaled back: choose another kind")
    rows = ScheduledRows(
        [task_row(*row) for row in task_rows], [full_row(ids) for ids in proxy], params, run.seed, method
    )
    return Training(params, run, adapted, tokenizer, rows, text, measured, covered)


def budget_outcome(training: Training, recorder: Recorder) -> str:
    """A line on a KL budget at the end: what was allowed, what was measured, and on which text."""
    tokens = sum(len(ids) - 1 for ids in training.measured)
    text = f"{tokens} tokens of {len(training.measured)} held-out rows"
    ended = f"{training.method.kl_budget:g} nats per token; KL at the end {recorder.last_kl:g}, on {text}"
    return f"kl_budget: {ended}; times that the change was scaled back: {recorder.drawn_back}"


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
            "spectrum": [digest_of_file(path) for path in params.spectrum.files(inputs.spectrum)],
            "proxy": [digest_of_file(path) for path in _proxy_shards(params, inputs).values()],
        },
        "params": run_params(params, name),
    }


def _proxy_shards(params: Params, inputs: TrainInputs) -> dict[str, Path]:
    return {str(shard): inputs.proxy / f"{shard}.parquet" for shard in params.proxy.shards}


def _proxy_ids(base: Base, path: Path, **expected: object) -> list[list[int]]:
    table, _ = read_table(path, PROXY_COLUMNS, artefact="proxy", **base.identity, **expected)
    return table["token_ids"].to_pylist()


def read_task_rows(params: Params, run: Run, base: Base, path: Path) -> list[MaskedRow]:
    """The rows of a run's task, each with which of its tokens are learned.

    Raises:
        FoLoRAError: the file is damaged or of another model or task.
    """
    task = params.tasks[run.task].model_dump()
    table, _ = read_table(path, artefact="task", **base.identity, task=task)
    return masked_rows(path, table)


def task_row(ids: list[int], learned: list[bool]) -> Row:
    """A task row: what is marked is learned."""
    return {"input_ids": ids, "labels": [i if counts else IGNORED for i, counts in zip(ids, learned, strict=True)]}


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


class ObjectiveTrainer(ResumableTrainer):
    """The Trainer with a method's objective in place of the model's own loss."""

    def __init__(self, objective: Objective, **options: Any) -> None:
        super().__init__(**options)
        self._objective = objective

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        wrapped = super()._wrap_model(model, training, dataloader)
        return processes.around_shards(model) if wrapped is model and training else wrapped

    def training_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> torch.Tensor:
        """Add the gradient of one batch, micro-batch by micro-batch; returns its loss."""
        if not model.training:  # to say so to every module takes longer than the update of an adapter
            model.train()
        losses = []
        for part in self._objective.parts(model, self._prepare_inputs(inputs)):
            self.accelerator.backward(part)
            losses.append(part.detach())
        return torch.stack(losses).sum()

    def floating_point_ops(self, inputs: Any) -> int:
        """None: nothing here reads the estimate, and making it walks over all parameters at every step."""
        del inputs
        return 0
