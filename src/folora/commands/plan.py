"""What a parameter file asks of this machine, before anything is spent, and what is to be said of it."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from folora.commands.shape import empty_model, shape_of
from folora.commands.stage_plans import LIBRARIES, duration, in_bytes, measured_stages, pencil_cost
from folora.devices import main_memory
from folora.errors import FoLoRAError
from folora.moments import DOUBLE, memory_of
from folora.params import OfflineFoundation
from folora.rows import read_rows
from folora.triangle import half_size

if TYPE_CHECKING:
    from torch.nn import Linear
    from transformers import PreTrainedModel

    from folora.commands.shape import Shape
    from folora.commands.stage_plans import StagePlan
    from folora.coverage import Covered
    from folora.params import Evaluation, Memory, Params


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
        *_left_out(model, shape, params.spectrum.directions),
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
    memory, disk = in_bytes(plan.memory), in_bytes(plan.disk)
    return f"{stage}, {jobs}: {tokens}{disk} of disk, about {duration(plan.seconds)} here; {memory} of memory each"


def _device(params: Params) -> str:
    """What the model runs on here, as far as this machine has it."""
    import torch

    if isinstance(params.foundation, OfflineFoundation) or not torch.cuda.is_available():
        return "cpu"
    return params.foundation.loading.device


def _warnings(stages: list[StagePlan], shape: Shape) -> list[str]:
    """What does not fit this machine, and which layer inputs take most."""
    memory, free = main_memory(), shutil.disk_usage(Path.cwd()).free
    found = [
        f"{stage.stage} needs {in_bytes(stage.memory)} of memory; this machine has {in_bytes(memory)}"
        for stage in stages
        if stage.memory > memory
    ]
    disk = sum(stage.disk for stage in stages)
    if disk > free:
        found.append(f"the results need {in_bytes(disk)} of disk; {in_bytes(free)} are free")
    widest, moments = max(shape.inputs), DOUBLE * shape.halves
    share = sum(d * d for d in shape.inputs if d == widest) / shape.squares
    if moments > max(shape.size, LIBRARIES):
        wide = f"{share:.0%} of it for {shape.inputs.count(widest)} inputs of width {widest:,}"
        found.append(
            f"second moments take {in_bytes(moments)}, {wide}: adapter.target_modules may leave these layers out"
        )
    return found


def _beyond(memory: Memory, stages: list[StagePlan]) -> list[str]:
    """Stages that take more memory than a job of theirs is given."""
    found = []
    for stage in stages:
        key = "proxy" if stage.stage == "heldout" else stage.stage
        given = 1e6 * getattr(memory, key)
        if stage.memory > given:
            asked = f"a job of {stage.stage} is given {in_bytes(given)}, and takes {in_bytes(stage.memory)}"
            found.append(f"memory: {asked}: raise memory.{key}")
    return found


def _left_out(model: PreTrainedModel, shape: Shape, directions: int | None) -> list[str]:
    """Which layer inputs, wider than all that are adapted, have no basis, and what it would take."""
    import torch

    from folora.layers import adapted_layers, input_groups

    layers = adapted_layers(model, "all-linear")
    left = {name: layer for name, layer in layers.items() if layer.in_features > max(shape.inputs)}
    with suppress(FoLoRAError):  # a layer that no forward pass reaches, which is left out for that
        leaders = list(input_groups(model, left, torch.zeros((1, 2), dtype=torch.long, device="meta")))
        return [
            _cost_of(d, leaders, left, shape, directions) for d in sorted({left[one].in_features for one in leaders})
        ]
    return []


def _cost_of(d: int, leaders: list[str], left: dict[str, Linear], shape: Shape, directions: int | None) -> str:
    """What the inputs of width d would take that are left out."""
    own = [name for name in leaders if left[name].in_features == d]
    names = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in own))
    operations, memory = pencil_cost(d, directions)
    times = 1 + len(own) * operations / sum(pencil_cost(one, directions)[0] for one in shape.inputs)
    moments, solving = in_bytes(len(own) * DOUBLE * half_size(d)), in_bytes(3 * DOUBLE * d**2 + memory)
    return (
        f"adapter.target_modules: {len(own)} inputs of width {d:,} ({names}) are left out; with them the moments of a "
        f"text take {moments} more, a job of spectrum {solving}, all of these {times:.1f} times the operations"
    )


def _truncated(shape: Shape, directions: int | None) -> list[str]:
    """Which layer inputs keep some of their directions only, and what that saves."""
    found = []
    for d in sorted({d for d in shape.inputs if directions and directions < d}):
        (some, less), (all_, memory) = pencil_cost(d, directions), pencil_cost(d, None)
        saved = f"{some / all_:.0%} of the operations and {in_bytes(less)} instead of {in_bytes(memory)} of all {d:,}"
        found.append(
            f"spectrum.directions: {shape.inputs.count(d)} inputs of width {d:,} keep the {directions} directions with "
            f"the greatest λ, {saved}; the others are shut"
        )
    return found


def _in_passes(shape: Shape, budget: int | None, stages: list[StagePlan]) -> list[str]:
    """What a memory budget costs, where the moments do not fit it at once."""
    passes = shape.passes(budget)
    if len(passes) == 1:
        return []
    plan = next(stage for stage in stages if stage.stage == "covariance")
    more = 2.0 * shape.parameters * (len(passes) - 1) * plan.tokens / plan.operations * plan.seconds
    held, whole = max(map(memory_of, passes)), memory_of(shape.inputs)
    return [
        f"covariance.memory_budget: {len(passes)} passes over each text, {in_bytes(held)} of moments at once instead "
        f"of {in_bytes(whole)}; {duration(more)} of the time is for the further passes"
    ]


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
