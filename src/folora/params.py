"""Types and bounds of ``params.yaml``. The file says everything but what only some tasks or methods need.

The file is read as YAML 1.2, as DVC reads it, so that ``1e-3`` is a number everywhere.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator, model_validator

from folora.errors import FoLoRAError, describe
from folora.loading import Loading
from folora.methods import Method, method_from
from folora.selection import BASE
from folora.shrinkage import ShrinkageName

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Shrinkage = Annotated[
    Annotated[float, Field(gt=0, le=0.5)] | ShrinkageName,
    Field(description="share a of the identity in the penalty's moment, (1 - a) C + a I, or how it is estimated"),
]
Rate = Annotated[float, Field(gt=0, le=1)]
Numbers = Annotated[list[Annotated[int, Field(ge=0, le=9999)]], Field(min_length=1)]
Megabytes = Annotated[int, Field(ge=1, description="of memory for a job, in MB")]
ThreadCount = Annotated[int, Field(ge=1, le=256, description="torch threads; another count changes the last bits")]


DEEPEST = 50  # brackets within brackets; the time that the YAML library takes grows with the cube of it


def distinct(numbers: list[int], what: str) -> list[int]:
    """Refuse a list that names a number twice."""
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"a {what} is listed twice")
    return numbers


class Section(BaseModel):
    """A part of params.yaml: unknown keys are refused, values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)


class World(Section):
    """The synthetic world that the offline foundation is trained on."""

    seed: Annotated[Seed, Field(description="chooses the fact tables")]
    names: Annotated[int, Field(ge=2, le=2000, description="entries of each fact table")]
    separator: Annotated[
        Literal["-", ""], Field(description="in the keys of the facts; '-' also is the sign of subtraction")
    ]
    largest_number: Annotated[int, Field(ge=9, le=99, description="operands lie in 0 .. this")]
    test_items: Annotated[int, Field(ge=1, le=1000, description="items per skill and split of the evaluation")]


class OfflineFoundation(Section):
    """A small Llama, trained here from scratch."""

    source: Literal["offline"]
    seed: Annotated[Seed, Field(description="of the weights and of the order of the text")]
    width: Annotated[int, Field(ge=8, le=4096, description="of the residual stream; a multiple of twice the heads")]
    layers: Annotated[int, Field(ge=1, le=64, description="blocks")]
    heads: Annotated[int, Field(ge=1, le=64, description="of attention, per block")]
    intermediate: Annotated[int, Field(ge=8, le=16384, description="width between up_proj and down_proj")]
    context: Annotated[int, Field(ge=16, le=4096, description="positions")]
    steps: Annotated[Count, Field(description="optimizer steps")]
    batch_size: Annotated[Count, Field(description="examples per step")]
    learning_rate: Annotated[Rate, Field(description="of Muon, for the hidden matrices")]
    embedding_learning_rate: Annotated[Rate, Field(description="of AdamW, for all else")]
    weight_decay: Annotated[float, Field(ge=0, le=1, description="decoupled, of both optimizers")]

    @model_validator(mode="after")
    def _heads_divide_width(self) -> OfflineFoundation:
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} must be a multiple of twice the heads ({2 * self.heads})")
        return self


class PretrainedFoundation(Section):
    """A model that exists: a hub id with its revision, a local folder, or a GGUF file."""

    source: Literal["pretrained"]
    model: Annotated[str, Field(description="hub id, local folder, or a file NAME.gguf")]
    revision: Annotated[str | None, Field(description="branch, tag or commit on the hub; its commit is pinned")]
    loading: Loading


class Download(Section):
    """A data set of a hub; its rows come to lie in artifacts/downloads/NAME."""

    dataset: Annotated[str, Field(description="hub id, or a local folder of that form")]
    config: Annotated[str | None, Field(description="configuration; null: the only one")]
    split: Annotated[str, Field(description="such as train, or train[:1000]")]
    revision: Annotated[str | None, Field(description="branch, tag or commit; the commit is kept in the manifest")]


class Task(Section):
    """What to adapt to: rows to train on and the evaluation tasks that measure it."""

    dataset: Annotated[str, Field(description="folder with train.jsonl, .csv or .parquet, or one such file")]
    prompt: Annotated[str | None, Field(description="Jinja template over the columns of a row")] = None
    response: Annotated[str | None, Field(description="Jinja template over the columns of a row")] = None
    messages: Annotated[
        str | None, Field(description="in place of both: the column with chat messages, each a role and a content")
    ] = None
    chat: Annotated[
        bool, Field(description="whether prompt and response become turns of the tokenizer's chat template")
    ] = False
    learn: Annotated[
        Literal["response", "all"], Field(description="tokens that the loss is taken over: the assistant's, or all")
    ] = "response"
    rows: Annotated[int | None, Field(ge=1, description="the first so many of the data set; null: all")] = None
    max_length: Annotated[int, Field(ge=4, le=131072, description="tokens of prompt and response")]
    too_long: Annotated[
        Literal["refuse", "drop", "truncate"], Field(description="what becomes of rows beyond max_length")
    ] = "refuse"
    packing: Annotated[
        bool, Field(description="whether several rows share a sequence of max_length; later ones see earlier ones")
    ] = False
    target: Annotated[Name, Field(description="evaluation task of the target ability, test split")]
    validation: Annotated[Name, Field(description="the same on the validation split: chooses the learning rate")]

    @model_validator(mode="after")
    def _one_form(self) -> Task:
        given = [name for name in ("prompt", "response") if getattr(self, name) is not None]
        if self.messages is not None and (given or self.chat):
            raise ValueError(f"messages stands in place of {given[0] if given else 'chat'}: give one or the other")
        if self.messages is None and len(given) < 2:
            raise ValueError("give prompt and response, or messages")
        return self


class SampledSource(Section):
    """Text sampled from the base model itself."""

    kind: Literal["sampled"]
    temperature: Annotated[float, Field(gt=0, le=10, description="divides the logits; 1 is the model's distribution")]
    backend: Annotated[
        Literal["transformers", "vllm"],
        Field(description="what draws it; vllm: the same distribution, other text, made in an environment of its own"),
    ] = "transformers"

    @model_validator(mode="after")
    def _in_range_of_vllm(self) -> SampledSource:
        if self.backend == "vllm" and not 0.01 <= self.temperature <= 2:  # it refuses more, and raises less to 0.01
            raise ValueError(f"vllm samples at temperatures of 0.01 to 2 (got {self.temperature}): take transformers")
        return self


class CorpusSource(Section):
    """Rows of one data set."""

    kind: Literal["corpus"]
    dataset: Annotated[str, Field(description="in proxy.corpora: a folder with a train file, or a file, as for tasks")]
    text: Annotated[str, Field(description="Jinja template over the columns of a row")]


class RandomSource(Section):
    """Tokens drawn uniformly from the vocabulary, special tokens left out."""

    kind: Literal["random"]


Source = Annotated[SampledSource | CorpusSource | RandomSource, Field(discriminator="kind")]


class Proxy(Section):
    """Text that stands in for the pretraining data."""

    seed: Annotated[Seed, Field(description="of the sampling")]
    sources: Annotated[dict[Name, Source], Field(min_length=1, description="a run names its own")]
    corpora: Annotated[str, Field(description="folder with the data sets of corpus sources")]
    shards: Annotated[Numbers, Field(description="made apart, each its own stage")]
    sequences: Annotated[int, Field(ge=1, description="per shard")]
    heldout_sequences: Annotated[int, Field(ge=1, description="sampled at temperature 1, to measure KL and perplexity")]
    max_length: Annotated[int, Field(ge=2, le=131072, description="tokens per sequence, BOS included")]
    batch_size: Annotated[Count, Field(description="sequences sampled at once")]

    @field_validator("shards")
    @classmethod
    def _distinct(cls, shards: list[int]) -> list[int]:
        return distinct(shards, "shard")

    def sampling(self, source: str) -> dict[str, Any]:
        """What the text of a source depends on, beside the base model and the shard's number."""
        return {
            "source": self.sources[source].model_dump(exclude_defaults=True),  # older texts name no backend
            **self.model_dump(include={"seed", "sequences", "max_length", "batch_size"}),
        }

    def heldout_sampling(self) -> dict[str, Any]:
        """The same of the held-out text."""
        return self.model_dump(include={"seed", "heldout_sequences", "max_length", "batch_size"})


class Covariance(Section):
    """Second moments of the layer inputs."""

    batch_size: Annotated[Count, Field(description="rows a forward pass")]
    proxy_positions: Annotated[
        Literal["all", "without_first"], Field(description="tokens that the penalty is taken over")
    ]
    task_positions: Annotated[
        Literal["all", "without_first", "response"], Field(description="tokens that the utility is taken over")
    ]
    task_rows: Annotated[
        int | None,
        Field(ge=1, description="rows of a task that the utility is taken over, the first so many; null: all"),
    ]
    memory_budget: Annotated[
        ByteSize | None,
        Field(
            gt=0,
            description="of the moments at once, in bytes or with a unit; those that do not fit are summed in further "
            "passes over the text; changes no result; null: all in one pass",
        ),
    ] = None


class SpectrumSection(Section):
    """The generalised eigenproblem."""

    shrinkage: Shrinkage
    directions: Annotated[
        int | None,
        Field(ge=1, description="of an input, those with the greatest λ, the others are shut; null: all"),
    ] = None
    parts: Annotated[Numbers, Field(description="the layer inputs are shared out among these, each its own stage")]

    @field_validator("parts")
    @classmethod
    def _distinct(cls, parts: list[int]) -> list[int]:
        return distinct(parts, "part")

    def solving(self) -> dict[str, Any]:
        """How a pencil is solved, whichever part it is in."""
        return self.model_dump(exclude={"parts"})

    def files(self, folder: Path) -> list[Path]:
        """The artefacts of the parts in the folder of a task and a source."""
        return [folder / f"{part}.safetensors" for part in self.parts]


class Adapter(Section):
    """The LoRA adapter all methods train."""

    rank: Annotated[int, Field(ge=1, le=1024, description="r")]
    alpha: Annotated[int, Field(ge=1, le=4096, description="ΔW = alpha / r · B A")]
    target_modules: Annotated[
        Literal["all-linear"] | Annotated[list[str], Field(min_length=1)],
        Field(description="layers to adapt: all but the output embedding, or ends of module names"),
    ]


class Train(Section):
    """Training, the same for every run."""

    steps: Annotated[Count, Field(description="optimizer steps")]
    batch_size: Annotated[int, Field(ge=1, description="task rows per optimizer step")]
    micro_batch: Annotated[
        int | None, Field(ge=1, description="rows a forward pass, so that fewer fill the memory; null: all of a step's")
    ] = None
    gradient_checkpointing: Annotated[
        bool, Field(description="whether activations are computed again in the backward pass: less memory, more time")
    ] = False
    checkpoints: Annotated[int, Field(ge=1, le=1000, description="evenly spaced, the last one included")]
    max_grad_norm: Annotated[float, Field(gt=0, description="gradients are clipped to it, all together")]
    log_every: Annotated[int, Field(ge=1, description="steps between two readings of the forgetting meter")]
    meter_sequences: Annotated[int, Field(ge=1, description="held-out sequences for the live KL")]


class Run(Section):
    """One training run: a method on a task, with the text that stands for the pretraining data, a rate and a seed."""

    task: Annotated[Name, Field(description="entry of tasks")]
    proxy: Annotated[Name, Field(description="entry of proxy.sources")]
    method: Annotated[Name, Field(description="entry of methods")]
    learning_rate: Annotated[Rate, Field(description="at the start; it falls linearly to zero")]
    seed: Annotated[Seed, Field(description="of the start and of the order of the rows")]


class Text(Section):
    """A text on which drift is measured, beside the base model's own."""

    dataset: Annotated[
        str, Field(description="in evaluation.tasks: a folder with a train file, or a file, as for tasks")
    ]
    text: Annotated[str, Field(description="Jinja template over the columns of a row")]
    rows: Annotated[int, Field(ge=1, description="the first so many")]
    max_length: Annotated[int, Field(ge=2, le=131072, description="tokens; the rest of a row is left out")]


class Evaluation(Section):
    """What every checkpoint is measured on."""

    tasks: Annotated[str, Field(description="folder with evaluation/NAME.yaml, tasks of one's own for the harness")]
    kept: Annotated[list[Name], Field(min_length=1, description="tasks whose mean is the kept accuracy")]
    at_best: Annotated[
        list[Name], Field(description="further tasks, asked only at the end of the runs at a method's best rate")
    ] = []
    texts: Annotated[dict[Name, Text], Field(description="KL and perplexity are measured on these too")] = {}
    batch_size: Annotated[Count, Field(description="items at once")]
    limit: Annotated[int | None, Field(ge=1, description="the first so many items of each task; null: all")] = None
    chat: Annotated[bool, Field(description="whether prompts are put in the tokenizer's chat template")] = False
    run_generated_code: Annotated[
        bool, Field(description="whether code that the model writes is run, in a sandbox, by tasks that ask for it")
    ] = False

    @field_validator("texts")
    @classmethod
    def _names_are_free(cls, texts: dict[str, Text]) -> dict[str, Text]:
        if "heldout" in texts:
            raise ValueError("'heldout' is the base model's own text: choose another name")
        return texts


class Threads(Section):
    """Torch threads of each stage. A part of the result: another count changes the last bits."""

    foundation: ThreadCount
    proxy: ThreadCount
    covariance: ThreadCount
    spectrum: ThreadCount
    train: ThreadCount
    evaluate: ThreadCount


class Memory(Section):
    """What a job of each stage may take: Snakemake keeps it free, a cluster gives it. No part of the result."""

    foundation: Megabytes
    proxy: Megabytes
    covariance: Megabytes
    spectrum: Megabytes
    train: Megabytes
    evaluate: Megabytes


class Report(Section):
    """How the comparison is drawn."""

    reference: Annotated[Name, Field(description="method whose target accuracy the others are compared at")]


class Tracking(Section):
    """Where runs are logged."""

    experiment: Annotated[str, Field(description="of MLflow")]
    uri: Annotated[str, Field(description="of the MLflow store; MLFLOW_TRACKING_URI overrides it")]


class Params(Section):
    """All of ``params.yaml``."""

    world: World
    foundation: Annotated[OfflineFoundation | PretrainedFoundation, Field(discriminator="source")]
    downloads: dict[Name, Download]
    tasks: Annotated[dict[Name, Task], Field(min_length=1)]
    proxy: Proxy
    covariance: Covariance
    spectrum: SpectrumSection
    adapter: Adapter
    train: Train
    methods: Annotated[dict[Name, Method], Field(min_length=1)]
    runs: Annotated[dict[Name, Run], Field(min_length=1)]
    evaluation: Evaluation
    report: Report
    threads: Threads
    memory: Memory
    tracking: Tracking

    @field_validator("methods", mode="before")
    @classmethod
    def _build_methods(cls, sections: Any) -> Any:
        if not isinstance(sections, dict):
            raise ValueError("expected a table of methods")
        return {name: method_from(name, section) for name, section in sections.items()}

    @model_validator(mode="after")
    def _names_resolve(self) -> Params:
        for name, run in self.runs.items():
            if run.task not in self.tasks:
                raise ValueError(f"runs.{name}.task: {run.task!r} is not one of tasks: {', '.join(self.tasks)}")
            if run.proxy not in self.proxy.sources:
                known = ", ".join(self.proxy.sources)
                raise ValueError(f"runs.{name}.proxy: {run.proxy!r} is not one of proxy.sources: {known}")
            if run.method not in self.methods:
                raise ValueError(f"runs.{name}.method: {run.method!r} is not one of methods: {', '.join(self.methods)}")
        for name in self.methods:
            if name == BASE:
                raise ValueError(f"methods.{name}: stands for the base model in results: choose another name")
            runs = self.runs_of(name)
            if not runs:
                raise ValueError(f"methods.{name}: no entry of runs uses it: add a run or remove the method")
            if len({run.proxy for run in runs.values()}) > 1:
                raise ValueError(f"methods.{name}: its runs differ in proxy: give each source a method of its own")
        if self.spectrum.directions is not None and self.spectrum.directions < self.adapter.rank:
            rank = f"adapter.rank, {self.adapter.rank}"
            raise ValueError(f"spectrum.directions: {self.spectrum.directions} is less than {rank}: A needs as many")
        if self.report.reference not in self.methods:
            raise ValueError(f"report.reference: {self.report.reference!r} is not one of methods")
        return self

    @model_validator(mode="after")
    def _stages_have_names_of_their_own(self) -> Params:
        tables: dict[str, Iterable[str]] = {
            "downloads": self.downloads,
            "tasks": self.tasks,
            "proxy.sources": self.proxy.sources,
            "methods": self.methods,
            "runs": self.runs,
            # how DVC names a spectrum, but for its part
            "tasks, proxy.sources": [f"{task}-{source}" for task in self.tasks for source in self.proxy.sources],
        }
        for table, names in tables.items():
            rules: dict[str, str] = {}
            for name in names:
                rule = name.replace("-", "_")
                if rule in rules:
                    both = f"{rules[rule]!r} and {name!r}"
                    raise ValueError(f"{table}: {both} name one Snakemake rule, {rule}: rename one")
                rules[rule] = name
        return self

    def evaluation_tasks(self) -> list[str]:
        """The names of all evaluation tasks that some model is asked."""
        own = [name for task in self.tasks.values() for name in (task.target, task.validation)]
        return list(dict.fromkeys([*own, *self.evaluation.kept, *self.evaluation.at_best]))

    def runs_of(self, method: str) -> dict[str, Run]:
        """The runs of one method, by name, in the order of the file."""
        return {name: run for name, run in self.runs.items() if run.method == method}


def run_params(params: Params, name: str) -> dict[str, Any]:
    """What a run's result depends on, beside its input files."""
    run = params.runs[name]
    return {
        "run": run.model_dump(),
        "method": params.methods[run.method].model_dump(),
        "adapter": params.adapter.model_dump(),
        "train": params.train.model_dump(),
        "covariance": params.covariance.model_dump(
            include={"batch_size", "task_positions", "task_rows"}
        ),  # moments taken again
        "threads": params.threads.train,
    }


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def load_params(path: Path) -> Params:
    """Read and validate ``params.yaml``.

    Raises:
        FoLoRAError: missing, not YAML, or a value out of bounds; names the key and what is allowed.
    """
    if not path.is_file():
        raise FoLoRAError(f"{path}: not found: run in the folder that holds params.yaml, or name one with --params")
    return parse_params(path.read_bytes(), str(path))


def parse_params(text: str | bytes, source: str) -> Params:
    """Validate the text of a parameter file; ``source`` names it in errors.

    Raises:
        FoLoRAError: not YAML, or a value out of bounds; names the key and what is allowed.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    content = text.encode() if isinstance(text, str) else text
    if flow_depth(content) > DEEPEST:
        raise FoLoRAError(f"{source}: nests more than {DEEPEST} brackets: see the params.yaml of a fresh clone")
    try:
        values = YAML(typ="safe").load(content)
    except (YAMLError, ValueError, RecursionError) as error:  # of ValueError: a date that is none
        raise FoLoRAError(f"{source}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise FoLoRAError(f"{source}: expected a table of sections: see the params.yaml of a fresh clone")
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise FoLoRAError(f"{source}: {describe(error)}") from error


def flow_depth(text: bytes) -> int:
    """How deep brackets and braces of a text nest, wherever they stand."""
    depth = deepest = 0
    for bracket in re.findall(rb"[\[\]{}]", text):
        depth = depth + 1 if bracket in b"[{" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    return deepest
