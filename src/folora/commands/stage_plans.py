"""What each stage takes of a machine: tokens, memory, disk and time, from the model's shape.

Times are floating-point operations over the speed of a matrix product measured now, times ``OVERHEAD``: the right order
of magnitude, no more. Rows count with their greatest length.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from folora.moments import DOUBLE, SINGLE, memory_of
from folora.pencil import krylov_columns

if TYPE_CHECKING:
    from folora.commands.shape import Shape
    from folora.params import Params, Run

OVERHEAD = 3.0  # assumed, not measured: what small products and all between them cost beyond the large ones
EIGENPROBLEM = 13  # operations per d³: Cholesky, three triangular solves, eigh
LIBRARIES = 6e8  # bytes of a process that has loaded them and no model


@dataclass(frozen=True)
class Work:
    """All jobs of a stage: tokens and floating-point operations, bytes of disk, and bytes of memory of a job."""

    jobs: int
    tokens: int
    memory: float
    disk: float
    operations: float


@dataclass(frozen=True)
class StagePlan(Work):
    """A stage, its work, and how long that takes."""

    HEAD: ClassVar = ["stage", "jobs", "tokens", "memory", "disk", "time"]

    stage: str
    seconds: float

    def cells(self) -> list[str]:
        """Cells of a table."""
        tokens = f"{self.tokens:,}" if self.tokens else "–"
        return [self.stage, str(self.jobs), tokens, in_bytes(self.memory), in_bytes(self.disk), duration(self.seconds)]


def plan_stages(params: Params, shape: Shape, single: float, double: float) -> list[StagePlan]:
    """Every stage but the report; of evaluate the texts that drift is measured on, not the items of its tasks.

    Args:
        params: the parameter file.
        shape: of the model.
        single: float32 operations a second.
        double: float64 operations a second.
    """
    works = {
        "proxy": _sample(params, shape, len(params.proxy.shards) * len(params.proxy.sources), params.proxy.sequences),
        "heldout": _sample(params, shape, 1, params.proxy.heldout_sequences),
        "covariance": _covariance(params, shape),
        "spectrum": _spectrum(params, shape),
        "train": _train(params, shape),
        "evaluate": _evaluate(params, shape),
    }
    return [
        StagePlan(
            stage=stage,
            seconds=OVERHEAD * work.operations / (double if stage == "spectrum" else single),
            **vars(work) | {"memory": LIBRARIES + work.memory},
        )
        for stage, work in works.items()
    ]


def measured_stages(params: Params, shape: Shape, device: str) -> list[StagePlan]:
    """Every stage at the speeds that this machine has now: of this device, and of its CPU for the spectrum."""
    return plan_stages(params, shape, _speed("float32", device), _speed("float64", "cpu"))


def _sample(params: Params, shape: Shape, jobs: int, sequences: int) -> Work:
    """Text that the base model writes."""
    proxy = params.proxy
    tokens = jobs * sequences * proxy.max_length
    batch = min(proxy.batch_size, proxy.sequences)
    memory = shape.size + batch * (SINGLE * shape.cached * proxy.max_length + 6 * shape.logits)
    return Work(jobs, tokens, memory, 3 * SINGLE * tokens, shape.forward * tokens)


def _covariance(params: Params, shape: Shape) -> Work:
    """Moments of every shard and of every task's rows, of which the data set alone knows how many they all are."""
    proxy, settings = params.proxy, params.covariance
    texts = len(proxy.shards) * len(proxy.sources)
    tokens = texts * proxy.sequences * proxy.max_length
    tokens += sum((settings.task_rows or task.rows or 0) * task.max_length for task in params.tasks.values())
    jobs = texts + len(params.tasks)
    summed = shape.passes(settings.memory_budget)  # widths of the layer inputs in each pass
    longest = max(proxy.max_length, *(task.max_length for task in params.tasks.values()))
    memory = shape.size + max(map(memory_of, summed)) + settings.batch_size * longest * shape.activations
    operations = (len(summed) * shape.forward + 2 * shape.halves) * tokens
    return Work(jobs, tokens, memory, jobs * DOUBLE * shape.halves, operations)


def _spectrum(params: Params, shape: Shape) -> Work:
    """The pencil of every layer input; where the proxy text has shards that of its first half too."""
    spectra, directions = len(params.tasks) * len(params.proxy.sources), params.spectrum.directions
    costs = [pencil_cost(d, directions) for d in shape.inputs]
    memory = max(3 * DOUBLE * d**2 + beside for d, (_, beside) in zip(shape.inputs, costs, strict=True))
    solved = spectra * (2 if len(params.proxy.shards) > 1 else 1)
    return Work(
        spectra * len(params.spectrum.parts),
        0,
        memory,
        spectra * SINGLE * shape.spectrum_size(directions),
        solved * sum(operations for operations, _ in costs),
    )


def _train(params: Params, shape: Shape) -> Work:
    """Every run."""
    train, runs, proxy = params.train, params.runs.values(), params.proxy
    length = {name: task.max_length for name, task in params.tasks.items()}
    tokens = train.steps * sum(_step_tokens(params, run, length[run.task]) for run in runs)
    factors = shape.factors(params.adapter.rank)
    kept = 1 if train.gradient_checkpointing else shape.blocks  # blocks whose activations are in memory at once
    inputs = SINGLE * shape.width * shape.blocks if train.gradient_checkpointing else 0
    at_once = max(_pass_tokens(params, run, length[run.task]) for run in runs)
    measured = min(params.evaluation.batch_size, proxy.heldout_sequences) * proxy.max_length
    memory = shape.size + SINGLE * shape.spectrum_size(params.spectrum.directions) + 4 * factors
    memory += at_once * (shape.activations * kept + inputs + 4 * shape.logits) + 3 * shape.logits * measured
    disk = len(runs) * (train.checkpoints + 1) * factors
    return Work(len(runs), tokens, memory, disk, (2 + train.gradient_checkpointing) * shape.forward * tokens)


def _evaluate(params: Params, shape: Shape) -> Work:
    """Every method and the base model, on the texts that drift is measured on."""
    evaluation, proxy = params.evaluation, params.proxy
    texts = [(proxy.heldout_sequences, proxy.max_length)]
    texts += [(text.rows, text.max_length) for text in evaluation.texts.values()]
    tokens = sum(rows * length for rows, length in texts)
    jobs, readings = 1 + len(params.methods), 1 + len(params.runs) * params.train.checkpoints
    known = [kept_bytes(rows * length, shape.vocabulary) for rows, length in texts]  # the base model's predictions
    # these are made once a job, or else with every reading
    passes = [readings + (jobs if kept else readings) for kept in known]
    at_once = max(min(evaluation.batch_size, rows) * length for rows, length in texts)
    reading = at_once * max(5 * shape.logits, shape.activations + 3.5 * shape.logits)
    memory = shape.size + shape.factors(params.adapter.rank) + sum(known) + reading
    disk = 2 * SINGLE * (1 + len(params.runs)) * tokens
    read = sum(count * rows * length for count, (rows, length) in zip(passes, texts, strict=True))
    return Work(jobs, readings * tokens, memory, disk, shape.forward * read)


def kept_bytes(positions: int, vocabulary: int) -> int:
    """Bytes of the base model's predictions of a text that the evaluation keeps; 0 where they are too many."""
    from folora.divergence import KEPT_BYTES

    size = SINGLE * positions * vocabulary
    return size if size <= KEPT_BYTES else 0


def pencil_cost(d: int, directions: int | None) -> tuple[float, float]:
    """Operations of solving a pencil of width d for so many directions, and bytes of memory beside its moments."""
    if directions is None or krylov_columns(directions) >= d:
        return EIGENPROBLEM * float(d) ** 3, 8.0 * DOUBLE * d**2
    columns = krylov_columns(directions)
    return d**3 / 3 + 4.0 * d**2 * columns + 8.0 * d * columns**2, 3.0 * DOUBLE * (d**2 + d * columns)


def _step_tokens(params: Params, run: Run, length: int) -> int:
    """Tokens of a training step, padded to the longest."""
    return params.train.batch_size * length + params.methods[run.method].replay * params.proxy.max_length


def _pass_tokens(params: Params, run: Run, length: int) -> int:
    """Tokens of a forward pass of training, padding and all."""
    replay = params.methods[run.method].replay
    rows = params.train.batch_size + replay
    longest = max(length, params.proxy.max_length) if replay else length
    return min(rows, params.train.micro_batch or rows) * longest


def _speed(name: str, device: str) -> float:
    """Floating-point operations a second of this machine's large matrix products."""
    import torch

    size = 1024 if device == "cpu" else 8192
    matrix = torch.ones(size, size, dtype=getattr(torch, name), device=device)
    float((matrix @ matrix)[0, 0])  # a GPU is waited for
    begun = time.perf_counter()
    float((matrix @ matrix)[0, 0])
    return 2 * size**3 / (time.perf_counter() - begun)


def in_bytes(value: float) -> str:
    """In the unit that suits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:,.1f} {unit}"
    return f"{value / 1e3:,.0f} kB"


def duration(seconds: float) -> str:
    """About how long, in the unit that suits."""
    for unit, size in (("d", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
