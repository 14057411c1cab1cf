"""FoLoRA in a training loop of your own: measure, solve, train gated, watch. ``docs/library.md`` shows each.

The pipeline does the same from files; this works on any causal language model of transformers, any PEFT LoRA on it and
any iterable of batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ValidationError

from folora.adapter import NAME, LoRAModel, lora_model
from folora.errors import FoLoRAError, describe
from folora.layers import Groups, adapted_layers, input_groups
from folora.meter import ForgettingMeter
from folora.methods.base import Method
from folora.methods.folora import FoLoRA
from folora.moments import Moments, collect
from folora.optimizer import check_first_step
from folora.pencil import Spectrum
from folora.pencil import solve_spectrum as solve_pencils

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

    from folora.optimizer import GatedAdam
    from folora.shrinkage import ShrinkageName


@dataclass(frozen=True)
class SecondMoments:
    """Second moments of the layer inputs of a model over some text.

    Attributes:
        moments: sums over tokens.
        groups: name of a layer input (its first layer) to the layers that read it.
    """

    moments: Moments
    groups: Groups


@torch.no_grad()
def second_moments(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    target_modules: Literal["all-linear"] | list[str] = "all-linear",
) -> SecondMoments:
    """Measure E[x xᵀ] of the inputs of the layers that LoRA will adapt.

    Args:
        model: the base model, before PEFT wraps it.
        batches: ``input_ids`` (batch, length), and ``attention_mask`` of that shape where there is padding, as a
            DataLoader or a tokenizer yields them; other keys are passed over.
        target_modules: as for PEFT.

    Raises:
        FoLoRAError: no batch, a batch without input ids, or an entry of ``target_modules`` matches no linear layer.
    """
    layers = adapted_layers(model, target_modules)
    remaining = iter(batches)
    first = next(remaining, None)
    if first is None:
        raise FoLoRAError("second_moments: there is no batch: a generator can be read once only")
    training = model.training
    model.eval()
    try:
        groups = input_groups(model, layers, _input_ids(first, model)[:1])
        with collect({leader: layers[leader] for leader in groups}) as collector:
            for batch in chain([first], remaining):
                input_ids = _input_ids(batch, model)
                mask = batch.get("attention_mask", torch.ones_like(input_ids)).to(model.device).bool()
                collector.select(mask)
                model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False)
    finally:
        model.train(training)
    return SecondMoments(collector.moments, groups)


def _input_ids(batch: Mapping[str, Tensor], model: PreTrainedModel) -> Tensor:
    if "input_ids" not in batch:
        raise FoLoRAError(f"second_moments: a batch has no input_ids; it has {', '.join(batch)}")
    return batch["input_ids"].to(model.device)


def solve_spectrum(
    proxy: SecondMoments,
    task: SecondMoments,
    *,
    shrinkage: float | ShrinkageName = 0.01,
    directions: int | None = None,
) -> Spectrum:
    """Directions of every layer input, and λ, the utility of each for the task against its penalty.

    Args:
        proxy: over text that stands for what the model should keep, such as samples from the model itself.
        task: over text of the task.
        shrinkage: share of the identity in the penalty, or ``ledoit-wolf`` or ``oas``.
        directions: how many of a wide layer input are found, those with the greatest λ; None: all.

    Raises:
        FoLoRAError: the two are of different layers, or a pencil cannot be solved.
    """
    if proxy.groups != task.groups:
        raise FoLoRAError("solve_spectrum: the moments are of different layers: measure both on one model")
    return solve_pencils(proxy.moments, task.moments, proxy.groups, shrinkage, directions)


def gated_adam(model: PeftModel, spectrum: Spectrum, *, learning_rate: float, **options: Any) -> GatedAdam:
    """FoLoRA's optimizer for a fresh PEFT LoRA model, whose A it starts in the open directions.

    What else is trainable, such as ``modules_to_save``, gets plain AdamW. The optimizer works in transformers' Trainer
    (``optimizers=(optimizer, None)``), in trainers built on it and in a plain loop. Its first step raises if it
    leaves the adapter as it was, as where FSDP has put other parameters in the model.

    Args:
        model: from ``peft.get_peft_model``, before the first step.
        spectrum: from ``solve_spectrum`` on the same base model.
        learning_rate: at the start; a schedule may change it.
        options: of ``folora params methods``, kind folora: ``tau``, ``gate_b``, ``weight_decay``, ...

    Raises:
        FoLoRAError: an option is wrong or for runs of the pipeline only, or the LoRA layers are not those of the
            spectrum or have been trained.
    """
    try:
        method = FoLoRA(kind="folora", **options)
    except ValidationError as error:
        raise FoLoRAError(f"gated_adam: {describe(error)}") from error
    of_a_run = {*Method.model_fields, "refresh_utility"} - {"weight_decay"}
    if given := sorted(of_a_run & method.model_dump(exclude_defaults=True).keys()):
        reason = "for runs of the pipeline only; the loss and the text are yours here"
        raise FoLoRAError(f"gated_adam: {', '.join(given)}: {reason}: leave out")
    adapted = adapted_model(model, spectrum)
    if adapted.moved():
        raise FoLoRAError("gated_adam: the adapter has been trained: make the optimizer before the first step")
    method.initialise(adapted.groups)
    optimizer = method.optimizer(adapted, learning_rate)
    gated = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    others = [parameter for parameter in adapted.trained if id(parameter) not in gated]
    if others:
        optimizer.add_param_group({"params": others})
    check_first_step(optimizer, adapted.moved)
    return optimizer


def forgetting_meter(model: PeftModel, spectrum: Spectrum) -> ForgettingMeter:
    """A meter of a PEFT LoRA model; its ``read()`` gives relative ``penalty`` and ``utility`` as the adapter stands."""
    return ForgettingMeter(adapted_model(model, spectrum).groups)


def adapted_model(model: PeftModel, spectrum: Spectrum) -> LoRAModel:
    """The LoRA layers of a PEFT model by the input they read.

    Raises:
        FoLoRAError: there are none, or they are not those of the spectrum.
    """
    modules: dict[str, Any] = dict(model.get_base_model().named_modules())
    lora = {name for name, module in modules.items() if NAME in getattr(module, "lora_A", {})}
    if not lora:
        raise FoLoRAError(f"the model has no LoRA adapter named {NAME!r}: wrap it with peft.get_peft_model")
    differing = sorted(lora ^ set(spectrum.layers))
    if differing:
        where = "LoRA alone" if differing[0] in lora else "the spectrum alone"
        raise FoLoRAError(f"{differing[0]} is in {where}: give both the same target_modules")
    weights = {name: modules[name].get_base_layer().weight.detach() for name in spectrum.layers}
    return lora_model(model, spectrum, weights)
