"""The command line: one command for each stage of ``dvc.yaml``; the others stand in ``commands``.

Heavy libraries are imported inside the commands, so that a stage pays for what it uses.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from folora import processes
from folora.commands.cli import DEFAULT_PARAMS, ParamsFile
from folora.commands.cli import app as commands
from folora.costs import keep_cost
from folora.energy import EnergyMeter
from folora.errors import FoLoRAError, redacted
from folora.hold import hold

if TYPE_CHECKING:
    from collections.abc import Callable

    from folora.base import Base
    from folora.params import Params

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Fine-tune a language model with LoRA without losing what it already knew.",
    epilog="Exit codes: 0 well, 1 a mistake in values or data, in one line, 2 wrong usage. Example: folora doctor",
)
app.add_typer(commands)
logger = logging.getLogger("folora")
BEFORE_TASKS = ("proxy", "heldout")  # stages that may run before those of the tasks

Output = Annotated[Path, typer.Option(help="What to write.")]
Threads = Annotated[int, typer.Option(min=1, help="Torch threads; a part of the result.")]
Foundation = Annotated[Path, typer.Option(help="Output of the foundation stage.")]
Heldout = Annotated[Path, typer.Option(help="Held-out proxy text.")]
EvaluationTasks = Annotated[Path, typer.Option(help="Folder with data and, in evaluation/, harness tasks.")]

T = TypeVar("T")
HELD = ExitStack()  # what the stage of this process holds, from `_prepare` to its end


def stage(command: Callable[..., float | None]) -> Callable[..., None]:
    """Register the command of a stage: it holds its output, and its cost is kept; train returns a step's seconds."""

    @wraps(command)
    def measured(**options: Any) -> None:
        name = command.__name__.replace("_", "-")
        if processes.count() > 1 and name != "train":
            raise FoLoRAError(f"{name}: runs in one process: start it without torchrun or accelerate")
        meter = EnergyMeter()
        with HELD:
            step = command(**options)
        if processes.rank() == 0:
            keep_cost(name, options["output"], step, meter.joules())

    return app.command(rich_help_panel="Stages")(measured)


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a mistake.")] = False) -> None:
    """What holds for every command."""
    logger.setLevel(logging.DEBUG if debug else logging.NOTSET)


def _prepare(
    path: Path, output: Path, threads: int | None = None, *, model: bool = True, spread: bool = True
) -> Params:
    """Load the parameters, hold the output, and fix what would change the last bits.

    Args:
        path: parameter file.
        output: what the stage writes.
        threads: for torch; None: the stage does not compute with it.
        model: whether a stage with threads runs the model, on a GPU where the parameters say so.
        spread: whether the model may lie on several, as ``gpus: spread`` in dvc.yaml says to a scheduler.
    """
    from folora.devices import take_devices
    from folora.params import PretrainedFoundation, load_params
    from folora.spread import gpu_count
    from folora.storage import CONDITIONS, check_writable

    params = load_params(path)
    check_writable(output)
    if processes.rank() == 0:
        HELD.enter_context(hold(output))
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
        CONDITIONS["threads"] = threads
        foundation = params.foundation
        device = foundation.loading.device if isinstance(foundation, PretrainedFoundation) else "cpu"
        # use_deterministic_algorithms would load the compiler: 1.4 s; on CUDA the cumsum of sampling may be what raises
        torch.set_deterministic_debug_mode("error" if device == "cpu" else "warn")
        if model and processes.count() == 1:  # several of one training have theirs from their launcher
            count = gpu_count(device)
            take_devices(HELD, count if spread else min(1, count))
        if model and device == "cuda" and torch.cuda.is_available():
            CONDITIONS["gpu"] = torch.cuda.get_device_name()
    return params


@stage
def foundation(
    world: Annotated[Path, typer.Option(help="Folder for the synthetic world's data and evaluation tasks.")],
    output: Output,
    threads: Threads,
    params_file: ParamsFile = DEFAULT_PARAMS,
) -> None:
    """Train the offline base model, or pin a model that exists."""
    params = _prepare(params_file, output, threads, spread=False)
    from folora.commands.first_rows import check_tasks
    from folora.foundation import pin_foundation, train_foundation
    from folora.params import PretrainedFoundation
    from folora.world import write_world

    check_tasks(params)
    if isinstance(params.foundation, PretrainedFoundation):
        commit = pin_foundation(params.foundation, output)
        if commit:
            print(f"foundation: {params.foundation.model} at commit {commit}")
    else:
        train_foundation(params.foundation, params.world, output)
    write_world(params.world, world)


@stage
def download(
    name: Annotated[str, typer.Argument(help="Entry of downloads in params.yaml.")],
    output: Output,
    params_file: ParamsFile = DEFAULT_PARAMS,
) -> None:
    """Fetch a data set from a hub and pin it."""
    params = _prepare(params_file, output)
    from folora.download import download

    commit = download(name, _entry(params.downloads, name, "downloads"), output)
    if commit:
        print(f"downloads.{name}: at commit {commit}")


@stage
def task(
    name: Annotated[str, typer.Argument(help="Entry of tasks in params.yaml.")],
    foundation: Foundation,
    output: Output,
    params_file: ParamsFile = DEFAULT_PARAMS,
) -> None:
    """Render and tokenise the training rows of a task."""
    params = _prepare(params_file, output)
    from folora.base import open_base
    from folora.task import prepare_task

    prepare_task(_entry(params.tasks, name, "tasks"), open_base(foundation), output)


@stage
def proxy(
    source: Annotated[str, typer.Argument(help="Entry of proxy.sources in params.yaml.")],
    shard: Annotated[int, typer.Argument(min=0, help="Number of the shard.")],
    foundation: Foundation,
    output: Output,
    threads: Threads,
    params_file: ParamsFile = DEFAULT_PARAMS,
) -> None:
    """Sample text from the base model, or take other text in its place."""
    params = _prepare(params_file, output, threads)
    _entry(params.proxy.sources, source, "proxy.sources")
    from folora.proxy import generate_proxy

    generate_proxy(params.proxy, source, str(shard), _base(foundation, params, "proxy"), output)


@stage
def heldout(
    foundation: Foundation,
    output: Output,
    threads: Threads,
    params_file: ParamsFile = DEFAULT_PARAMS,
) -> None:
    """Sample the text from the base model that measures KL and perplexity."""
    params = _prepare(params_file, output, threads)
    from folora.proxy import generate_heldout

    generate_heldout(params.proxy, _base(foundation, params, "heldout"), output)


@stage
def covariance(
    foundation: Foundation,
    rows: Annotated[Path, typer.Option(help="Parquet of the task or the proxy stage.")],
    output: Output,
    threads: Threads,
    params_file: ParamsFile = DEFAULT_PARAMS,
) -> None:
    """Sum the second moments of the layer inputs over some text."""
    params = _prepare(params_file, output, threads)
    from folora.covariance import compute_covariance

    compute_covariance(params, _base(foundation, params, "covariance"), rows, output)


@stage
def spectrum(
    task: Annotated[str, typer.Argument(help="Entry of tasks in params.yaml.")],
    source: Annotated[str, typer.Argument(help="Entry of proxy.sources in params.yaml.")],
    part: Annotated[int, typer.Argument(help="Entry of spectrum.parts in params.yaml.")],
    foundation: Foundation,
    proxy_moments: Annotated[Path, typer.Option(help="Folder with the covariance of every shard of the source.")],
    task_moments: Annotated[Path, typer.Option(help="Covariance of the task.")],
    output: Output,
    threads: Threads,
    params_file: ParamsFile = DEFAULT_PARAMS,
) -> None:
    """Solve the generalised eigenproblem of every layer input."""
    params = _prepare(params_file, output, threads, model=False)
    from folora.spectrum import compute_spectrum

    _entry(params.tasks, task, "tasks")
    _entry(params.proxy.sources, source, "proxy.sources")
    if part not in params.spectrum.parts:
        known = ", ".join(map(str, params.spectrum.parts))
        raise FoLoRAError(f"spectrum.parts: {part} is not in params.yaml; there are {known}")
    base = _base(foundation, params, "spectrum")
    compute_spectrum(params, task, source, part, base, proxy_moments, task_moments, output)


@stage
def train(
    run: Annotated[str, typer.Argument(help="Entry of runs in params.yaml.")],
    foundation: Foundation,
    task_rows: Annotated[Path, typer.Option(help="Parquet of the task stage.")],
    proxy: Annotated[Path, typer.Option(help="Folder with the shards of the run's proxy source.")],
    heldout: Heldout,
    spectrum: Annotated[Path, typer.Option(help="Folder with the parts of the spectrum.")],
    output: Output,
    threads: Threads,
    shard_base: Annotated[
        bool, typer.Option("--shard-base", help="Of several processes each holds a part of the frozen weights.")
    ] = False,
    params_file: ParamsFile = DEFAULT_PARAMS,
) -> float | None:
    """Train the adapter of one run."""
    params = _prepare(params_file, output, threads, spread=False)
    _entry(params.runs, run, "runs")
    from folora.train import TrainInputs, train_run

    base = _base(foundation, params, "train")
    inputs = TrainInputs(task_rows, proxy, heldout, spectrum)
    return train_run(params, run, base, inputs, output, shard_base=shard_base)


@stage
def evaluate_base(
    foundation: Foundation,
    tasks: EvaluationTasks,
    heldout: Heldout,
    output: Output,
    threads: Threads,
    params_file: ParamsFile = DEFAULT_PARAMS,
) -> None:
    """Measure the base model."""
    params = _prepare(params_file, output, threads)
    from folora.base import open_base
    from folora.commands.first_rows import check_tasks
    from folora.evaluate import evaluate_base

    base = open_base(foundation)
    check_tasks(params, base.load_tokenizer())
    evaluate_base(params, base, tasks, heldout, output)


@stage
def evaluate(
    method: Annotated[str, typer.Argument(help="Entry of methods in params.yaml.")],
    foundation: Foundation,
    tasks: EvaluationTasks,
    heldout: Heldout,
    runs: Annotated[Path, typer.Option(help="Folder with the runs of the method.")],
    output: Output,
    threads: Threads,
    params_file: ParamsFile = DEFAULT_PARAMS,
) -> None:
    """Measure every checkpoint of every run of a method."""
    params = _prepare(params_file, output, threads)
    _entry(params.methods, method, "methods")
    from folora.base import open_base
    from folora.evaluate import evaluate_method

    evaluate_method(params, method, open_base(foundation), tasks, heldout, runs, output)


@stage
def report(
    evaluations: Annotated[Path, typer.Option(help="Folder with the results of every evaluation.")],
    output: Output,
    runs: Annotated[Path | None, typer.Option(help="Folder with every run: for training curves.")] = None,
    spectra: Annotated[Path | None, typer.Option(help="Folder with the spectra, TASK/SOURCE/PART.safetensors.")] = None,
    params_file: ParamsFile = DEFAULT_PARAMS,
) -> None:
    """Draw the comparison and print its summary."""
    params = _prepare(params_file, output)
    from folora.report import write_report

    write_report(params, evaluations, output, runs=runs, spectra=spectra)


class Redacting(logging.Formatter):
    """Keeps secrets out of the log, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        """The line without them."""
        return redacted(super().format(record))


def _base(foundation: Path, params: Params, stage: str) -> Base:
    """Open the base model of a stage.

    But for the small offline model, what the stage takes is said first, and what is wrong with the rows of a task.
    """
    from folora.base import open_base
    from folora.params import PretrainedFoundation

    base = open_base(foundation)
    if isinstance(params.foundation, PretrainedFoundation) and processes.rank() == 0:
        from folora.commands.first_rows import check_tasks
        from folora.commands.plan import head_line

        print(head_line(params, base.folder, stage), file=sys.stderr)
        if stage in BEFORE_TASKS:
            check_tasks(params, base.load_tokenizer())
    return base


def _entry(table: dict[str, T], name: str, section: str) -> T:
    if name not in table:
        raise FoLoRAError(f"{section}: {name!r} is not in params.yaml; there are {', '.join(table)}")
    return table[name]


def main() -> None:
    """Run the command line; a mistake of the user is one line on standard error and exit code 1."""
    handler = logging.StreamHandler()
    handler.setFormatter(Redacting("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model that is handed to it
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # and this of weights that lie where they were asked to
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it products on CUDA differ from run to run
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars in log files
    # a scheduler's word to stop: what is half written is removed, what is unfinished is kept for the next time
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        app()
    except FoLoRAError as error:
        logger.debug("what led to it", exc_info=error)
        print(redacted(f"folora: {error}"), file=sys.stderr)
        sys.exit(1)
