"""What a parameter file asks of a machine, before anything is spent: from the model's shape alone, without its weights.

Times are floating-point operations over the speed of a matrix product measured now, times ``OVERHEAD``: the right order
of magnitude, no more. Rows count with their greatest length.
"""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from folora.coverage import Covered, coverage
from folora.devices import main_memory
from folora.errors import FoLoRAError
from folora.moments import DOUBLE, SINGLE, memory_of, split_passes
from folora.params import OfflineFoundation, PretrainedFoundation
from folora.pencil import krylov_columns
from folora.rows import read_rows
from folora.triangle import half_size

if TYPE_CHECKING:
    from torch.nn import Linear
    from transformers import PretrainedConfig, PreTrainedModel

    from folora.params import Evaluation, Memory, Params, Run

OVERHEAD = 3.0  # assumed, not measured: what small products and all between them cost beyond the large ones
EIGENPROBLEM = 13  # operations per d³: Cholesky, three triangular solves, eigh
LIBRARIES = 6e8  # bytes of a process that has loaded them and no model


@dataclass(frozen=True)
class Shape:
    """What a plan follows from.

    Attributes:
        parameters: of the model.
        size: bytes of its weights as they are loaded.
        vocabulary: tokens.
        width: of the residual stream.
        intermediate: of the feed-forward layers.
        blocks: how many.
        cached: numbers a token leaves in the cache of keys and values.
        inputs: width d of every distinct layer input.
        layers: (m, d) of every adapted layer.
    """

    parameters: int
    size: int
    vocabulary: int
    width: int
    intermediate: int
    blocks: int
    cached: int
    inputs: list[int]
    layers: list[tuple[int, int]]

    @property
    def squares(self) -> int:
        """Σ d² over the layer inputs."""
        return sum(d * d for d in self.inputs)

    @property
    def halves(self) -> int:
        """Numbers in the moments of the layer inputs, which are symmetric."""
        return sum(map(half_size, self.inputs))

    def passes(self, budget: int | None) -> list[list[int]]:
        """Widths of the layer inputs whose moments are summed in each pass over a text."""
        named = {str(number): d for number, d in enumerate(self.inputs)}
        return [[named[name] for name in names] for names in split_passes(named, budget)]

    def spectrum_size(self, directions: int | None) -> int:
        """Numbers in the bases and moments of the layer inputs."""
        return 2 * self.squares + sum(d * min(d, directions or d) for d in self.inputs)


@dataclass(frozen=True)
class StagePlan:
    """One stage, all of its jobs: tokens and floating-point operations, bytes of disk, and bytes of memory of a job."""

    HEAD: ClassVar = ["stage", "jobs", "tokens", "memory", "disk", "time"]

    stage: str
    jobs: int
    tokens: int
    memory: float
    disk: float
    operations: float
    seconds: float

    def cells(self) -> list[str]:
        """Cells of a table."""
        tokens = f"{self.tokens:,}" if self.tokens else "–"
        return [self.stage, str(self.jobs), tokens, _bytes(self.memory), _bytes(self.disk), duration(self.seconds)]


@dataclass(frozen=True)
class Plan:
    """What is adapted, what each stage takes, and what does not fit this machine."""

    covered: list[Covered]
    stages: list[StagePlan]
    warnings: list[str]

    def as_json(self) -> dict[str, Any]:
        """Plain values, for programs."""
        stages = [vars(one) for one in self.stages]
        return {"coverage": [vars(one) for one in self.covered], "stages": stages, "warnings": self.warnings}


def make_plan(params: Params) -> Plan:
    """Plan every stage, of a model whose configuration is looked up where the parameters say.

    Raises:
        FoLoRAError: the model's configuration is not to be had, or the memory budget is too small for a layer input.
    """
    model = empty_model(params)
    shape, covered = shape_of(model, params)
    stages = measured_stages(params, shape, _device(params))
    notes = [
        *_left_out(model, params, shape, stages),
        *_truncated(shape, params.spectrum.directions),
        *_in_passes(shape, params.covariance.memory_budget, stages),
        _asked(params),
    ]
    return Plan(covered, stages, _warnings(stages, shape) + _beyond(params.memory, stages) + notes)


def head_line(params: Params, folder: Path, stage: str) -> str:
    """What a stage takes, in a line to print before it begins; ``folder`` holds the pinned model.

    Raises:
        FoLoRAError: the parameters do not fit the model, which some stage would find later.
    """
    try:
        shape, _ = shape_of(empty_model(params, folder), params)
        # that of the spectrum is solved on a CPU, and holds no GPU
        stages = measured_stages(params, shape, "cpu" if stage == "spectrum" else _device(params))
    except FoLoRAError:
        raise
    except Exception as error:  # a model's own code may do anything where there are no weights: the stage has them
        reason = f"{type(error).__name__}: {error}"[:200]
        return f"{stage}: what it takes is not known, its model cannot be looked at without weights ({reason})"
    plan = next(one for one in stages if one.stage == stage)
    tokens = f"{plan.tokens:,} tokens, " if plan.tokens else ""
    jobs = f"{plan.jobs} jobs together" if plan.jobs > 1 else "1 job"
    memory, disk = _bytes(plan.memory), _bytes(plan.disk)
    return f"{stage}, {jobs}: {tokens}{disk} of disk, about {duration(plan.seconds)} here; {memory} of memory each"


def empty_model(params: Params, folder: Path | None = None) -> PreTrainedModel:
    """The base model without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from folora.base import with_plain_layers

    settings = params.foundation
    trusted = isinstance(settings, PretrainedFoundation) and settings.loading.trust_remote_code
    config = _config(params, folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=trusted)
    with_plain_layers(model)
    return model.eval()


def _device(params: Params) -> str:
    """What the model runs on here, as far as this machine has it."""
    import torch

    if isinstance(params.foundation, OfflineFoundation) or not torch.cuda.is_available():
        return "cpu"
    return params.foundation.loading.device


def _config(params: Params, folder: Path | None) -> PretrainedConfig:
    from transformers import AutoConfig

    from folora.base import check_kind
    from folora.foundation import GGUF, character_tokenizer, offline_config
    from folora.hub import from_hub

    settings = params.foundation
    if isinstance(settings, OfflineFoundation):
        return offline_config(settings, character_tokenizer())
    source, options = settings.model, {"revision": settings.revision}
    if folder is not None:
        source, options = str(folder), {}
    elif source.endswith(GGUF):
        source, options = str(Path(source).parent), {"gguf_file": Path(source).name}
    trusted = settings.loading.trust_remote_code
    get = partial(AutoConfig.from_pretrained, source, trust_remote_code=trusted, **options)
    config: PretrainedConfig = from_hub("foundation.model", settings.model, settings.revision, get)
    if "gguf_file" not in options:  # whose weights the foundation stage makes numbers of
        check_kind(settings.model, config, [str(name) for name in config.architectures or []])
    return config


def shape_of(model: PreTrainedModel, params: Params) -> tuple[Shape, list[Covered]]:
    """Read the shape off an empty model."""
    import torch

    from folora.layers import adapted_layers, input_groups

    layers = adapted_layers(model, params.adapter.target_modules)
    groups = input_groups(model, layers, torch.zeros((1, 2), dtype=torch.long, device="meta"))
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    single = isinstance(params.foundation, OfflineFoundation) or params.foundation.loading.dtype == "float32"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    shape = Shape(
        parameters=parameters,
        size=parameters * (SINGLE if single else SINGLE // 2),
        vocabulary=config.vocab_size,
        width=config.hidden_size,
        intermediate=max(layer.out_features for layer in layers.values()),
        blocks=config.num_hidden_layers,
        cached=2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * head,
        inputs=[layers[leader].in_features for leader in groups],
        layers=[(layer.out_features, layer.in_features) for layer in layers.values()],
    )
    return shape, coverage(model, layers)


def plan_stages(params: Params, shape: Shape, single: float, double: float) -> list[StagePlan]:
    """Every stage but the report; of evaluate the texts that drift is measured on, not the items of its tasks.

    Args:
        params: the parameter file.
        shape: of the model.
        single: float32 operations a second.
        double: float64 operations a second.
    """
    proxy, train = params.proxy, params.train
    shards, tasks = len(proxy.shards) * len(proxy.sources), len(params.tasks)
    length = {name: settings.max_length for name, settings in params.tasks.items()}
    sampled, heldout = shards * proxy.sequences * proxy.max_length, proxy.heldout_sequences * proxy.max_length
    steps = [_step_tokens(params, run, length[run.task]) for run in params.runs.values()]
    trained = sum(steps) * train.steps
    rows = {name: params.covariance.task_rows or settings.rows or 0 for name, settings in params.tasks.items()}
    counted = sampled + sum(rows[name] * length[name] for name in rows)  # of all rows only the data set knows

    forward, moments = 2.0 * shape.parameters, DOUBLE * shape.halves
    spectrum, scores = SINGLE * shape.spectrum_size(params.spectrum.directions), SINGLE * shape.vocabulary
    hidden = SINGLE * (6 * shape.width + 3 * shape.intermediate)  # of a token within one block
    factors = SINGLE * params.adapter.rank * sum(m + d for m, d in shape.layers)
    rows_at_once = [_pass_tokens(params, run, length[run.task]) for run in params.runs.values()]
    kept = 1 if train.gradient_checkpointing else shape.blocks  # blocks whose activations are in memory at once
    inputs = SINGLE * shape.width * shape.blocks if train.gradient_checkpointing else 0
    batch = min(proxy.batch_size, proxy.sequences)
    sampling = shape.size + batch * (SINGLE * shape.cached * proxy.max_length + 6 * scores)
    reading = params.covariance.batch_size * max(proxy.max_length, *length.values()) * hidden
    measuring = 3 * scores * min(params.evaluation.batch_size, proxy.heldout_sequences) * proxy.max_length
    activations = max(rows_at_once) * (hidden * kept + inputs + 4 * scores)
    training = shape.size + spectrum + 4 * factors + activations + measuring
    pencils = [pencil_cost(d, params.spectrum.directions) for d in shape.inputs]
    solving = max(3 * DOUBLE * d**2 + memory for d, (_, memory) in zip(shape.inputs, pencils, strict=True))
    summed = shape.passes(params.covariance.memory_budget)  # how much of the layer inputs in each pass
    saved = (train.checkpoints + 1) * factors
    texts = [(proxy.heldout_sequences, proxy.max_length)]
    texts += [(text.rows, text.max_length) for text in params.evaluation.texts.values()]
    jobs, measured = 1 + len(params.methods), 1 + len(params.runs) * train.checkpoints  # the base model is one of each
    read = sum(rows * tokens for rows, tokens in texts)
    known = [kept_bytes(rows * tokens, shape.vocabulary) for rows, tokens in texts]  # the base model's predictions
    # these are made once a job, or else with every reading
    passes = [measured + (jobs if kept else measured) for kept in known]
    read_at_once = max(min(params.evaluation.batch_size, rows) * tokens for rows, tokens in texts)

    def stage(name: str, jobs: int, tokens: int, memory: float, disk: float, operations: float) -> StagePlan:
        seconds = OVERHEAD * operations / (double if name == "spectrum" else single)
        return StagePlan(name, jobs, tokens, LIBRARIES + memory, disk, operations, seconds)

    solved = tasks * len(proxy.sources)
    return [
        stage("proxy", shards, sampled, sampling, 3 * SINGLE * sampled, forward * sampled),
        stage("heldout", 1, heldout, sampling, 3 * SINGLE * heldout, forward * heldout),
        stage(
            "covariance",
            shards + tasks,
            counted,
            shape.size + max(map(memory_of, summed)) + reading,
            (shards + tasks) * moments,
            (len(summed) * forward + 2 * shape.halves) * counted,
        ),
        stage(
            "spectrum",
            solved * len(params.spectrum.parts),
            0,
            solving,
            solved * spectrum,
            solved * _pencils(params) * sum(operations for operations, _ in pencils),
        ),
        stage(
            "train",
            len(steps),
            trained,
            training,
            len(steps) * saved,
            (2 + train.gradient_checkpointing) * forward * trained,
        ),
        stage(
            "evaluate",
            jobs,
            measured * read,
            shape.size + factors + sum(known) + read_at_once * max(5 * scores, hidden + 3.5 * scores),
            2 * SINGLE * (1 + len(params.runs)) * read,
            forward * sum(count * rows * tokens for count, (rows, tokens) in zip(passes, texts, strict=True)),
        ),
    ]


def measured_stages(params: Params, shape: Shape, device: str) -> list[StagePlan]:
    """Every stage at the speeds that this machine has now: of this device, and of its CPU for the spectrum."""
    return plan_stages(params, shape, _speed("float32", device), _speed("float64", "cpu"))


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


def _pencils(params: Params) -> int:
    """Pencils that are solved of each layer input: that of one half of the proxy text too, where it has shards."""
    return 2 if len(params.proxy.shards) > 1 else 1


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


def _warnings(stages: list[StagePlan], shape: Shape) -> list[str]:
    """What does not fit this machine, and which layer inputs take most."""
    memory, free = main_memory(), shutil.disk_usage(Path.cwd()).free
    found = [
        f"{stage.stage} needs {_bytes(stage.memory)} of memory; this machine has {_bytes(memory)}"
        for stage in stages
        if stage.memory > memory
    ]
    disk = sum(stage.disk for stage in stages)
    if disk > free:
        found.append(f"the results need {_bytes(disk)} of disk; {_bytes(free)} are free")
    widest, moments = max(shape.inputs), DOUBLE * shape.halves
    share = sum(d * d for d in shape.inputs if d == widest) / shape.squares
    if moments > max(shape.size, LIBRARIES):
        wide = f"{share:.0%} of it for {shape.inputs.count(widest)} inputs of width {widest:,}"
        found.append(
            f"second moments take {_bytes(moments)}, {wide}: adapter.target_modules may leave these layers out"
        )
    return found


def _beyond(memory: Memory, stages: list[StagePlan]) -> list[str]:
    """Stages that take more memory than a job of theirs is given."""
    found = []
    for stage in stages:
        key = "proxy" if stage.stage == "heldout" else stage.stage
        given = 1e6 * getattr(memory, key)
        if stage.memory > given:
            asked = f"a job of {stage.stage} is given {_bytes(given)}, and takes {_bytes(stage.memory)}"
            found.append(f"memory: {asked}: raise memory.{key}")
    return found


def _left_out(model: PreTrainedModel, params: Params, shape: Shape, stages: list[StagePlan]) -> list[str]:
    """Which layer inputs, wider than all that are adapted, have no basis, and what it would take."""
    import torch

    from folora.layers import adapted_layers, input_groups

    layers = adapted_layers(model, "all-linear")
    left = {name: layer for name, layer in layers.items() if layer.in_features > max(shape.inputs)}
    with suppress(FoLoRAError):  # a layer that no forward pass reaches, which is left out for that
        leaders = list(input_groups(model, left, torch.zeros((1, 2), dtype=torch.long, device="meta")))
        return [_cost_of(d, leaders, left, params, stages) for d in sorted({left[one].in_features for one in leaders})]
    return []


def _cost_of(d: int, leaders: list[str], left: dict[str, Linear], params: Params, stages: list[StagePlan]) -> str:
    """What the inputs of width d would take that are left out."""
    own = [name for name in leaders if left[name].in_features == d]
    names = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in own))
    operations, memory = pencil_cost(d, params.spectrum.directions)
    planned = next(stage for stage in stages if stage.stage == "spectrum")
    solved = len(params.tasks) * len(params.proxy.sources)
    times = 1 + solved * _pencils(params) * len(own) * operations / planned.operations
    moments, solving = _bytes(len(own) * DOUBLE * half_size(d)), _bytes(3 * DOUBLE * d**2 + memory)
    return (
        f"adapter.target_modules: {len(own)} inputs of width {d:,} ({names}) are left out; with them the moments of a "
        f"text take {moments} more, a job of spectrum {solving}, all of these {times:.1f} times the operations"
    )


def _truncated(shape: Shape, directions: int | None) -> list[str]:
    """Which layer inputs keep some of their directions only, and what that saves."""
    found = []
    for d in sorted({d for d in shape.inputs if directions and directions < d}):
        (some, less), (all_, memory) = pencil_cost(d, directions), pencil_cost(d, None)
        saved = f"{some / all_:.0%} of the operations and {_bytes(less)} instead of {_bytes(memory)} of all {d:,}"
        found.append(
            f"spectrum.directions: {shape.inputs.count(d)} inputs of width {d:,} keep the {directions} directions with "
            f"the greatest λ, {saved}; the others are shut"
        )
    return found


def _asked(params: Params) -> str:
    """How many items of evaluation tasks are asked, where that can be told here."""
    settings, last = params.evaluation, "the time that they take is not known"
    items = {name: _items(name, settings) for name in params.evaluation_tasks()}
    known = {name: count for name, count in items.items() if count is not None}
    if len(known) < len(items):
        first = next(name for name in items if name not in known)
        return (
            f"evaluate: the items of {len(items) - len(known)} evaluation tasks, {first} the first, are not here to be "
            f"counted, and {last}; evaluation.limit takes the first so many of each"
        )
    each = {
        name: sum(known[one] for one in {task.target, task.validation, *settings.kept})
        for name, task in params.tasks.items()
    }
    of_runs = params.train.checkpoints * sum(each[run.task] for run in params.runs.values())
    asked = f"{sum(known.values()):,} items for the base model, {of_runs:,} for all checkpoints"
    if settings.limit:  # a task of a hub may have fewer
        asked = f"at most {asked} (of a group: for each of its parts)"
    return f"evaluate: {asked}; {last}"


def _items(name: str, settings: Evaluation) -> int | None:
    """Items of an evaluation task: of rows that are here, or else as many as are asked at most; None: who knows."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    folder = Path(settings.tasks)
    try:
        task = YAML(typ="safe", pure=True).load(folder / "evaluation" / f"{name}.yaml")
        split = task.get("test_split") or task.get("validation_split") or "test"
        rows = read_rows(str(folder / task["dataset_kwargs"]["data_files"][split]), "evaluation.tasks")
    except (FoLoRAError, OSError, YAMLError, LookupError, TypeError, AttributeError):
        return settings.limit  # of a hub, or not made yet; what is wrong with it the evaluation says
    return min(len(rows), settings.limit or len(rows))


def _in_passes(shape: Shape, budget: int | None, stages: list[StagePlan]) -> list[str]:
    """What a memory budget costs, where the moments do not fit it at once."""
    passes = shape.passes(budget)
    if len(passes) == 1:
        return []
    plan = next(stage for stage in stages if stage.stage == "covariance")
    more = 2.0 * shape.parameters * (len(passes) - 1) * plan.tokens / plan.operations * plan.seconds
    held, whole = max(map(memory_of, passes)), memory_of(shape.inputs)
    return [
        f"covariance.memory_budget: {len(passes)} passes over each text, {_bytes(held)} of moments at once instead of "
        f"{_bytes(whole)}; {duration(more)} of the time is for the further passes"
    ]


def _bytes(value: float) -> str:
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
