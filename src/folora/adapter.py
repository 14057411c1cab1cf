"""What training changes: the model with its adapter, and how the change is saved and loaded.

Every checkpoint is a change of the untouched base model. A method that takes a part s B₀A₀ out of the base weights
before training (PiSSA, CorDA, ...) computes W - s B₀A₀ + s B A, which is plain LoRA of twice the rank:

    ΔW = s (B A - B₀A₀) = s [B, -B₀] [A; A₀]

A method whose change has full rank is saved as the changed weights themselves.
"""

from __future__ import annotations

import copy
import json
import warnings
from abc import ABC, abstractmethod
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from folora.deltas import DenseLayer, Layer, LayerGroup, LoRALayer, grouped
from folora.errors import FoLoRAError
from folora.spread import MAX_MEMORY, materialise_adapter
from folora.storage import PEFT_CONFIG, PEFT_WEIGHTS, read_tensors, write_json, write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from peft import PeftMixedModel, PeftModel
    from transformers import PreTrainedModel

    from folora.base import Base
    from folora.counted_text import CountedText
    from folora.moments import Moments
    from folora.pencil import Spectrum

NAME = "default"  # PEFT's name of the only adapter of a model
WEIGHTS_FILE = "weights.safetensors"
NOTABLE_ROUNDING = 1e-6  # of a weight's norm; float32 stays a tenth below


@dataclass(frozen=True)
class Context:
    """What a method may build its adapter from.

    Attributes:
        rank: r of the adapter.
        alpha: s = alpha / r.
        spectrum: basis, eigenvalues and moments of every layer input.
        base: where the model comes from.
        proxy: token ids of the text that stands for the pretraining data, BOS first.
        task: the text that the utility is taken over.
    """

    rank: int
    alpha: int
    spectrum: Spectrum
    base: Base
    proxy: list[list[int]]
    task: CountedText


class AdaptedModel(ABC):
    """A model ready to train.

    Attributes:
        model: what the Trainer trains.
        groups: the adapted layers by the input they read.
        regulariser: a scalar that joins the loss of every step, or None.
        task: the text that the utility is taken over, for methods that measure it again; None in the library.
        rounding: how far any layer's frozen weight is off the W - s B₀A₀ that a checkpoint takes for granted, of ‖W‖.
    """

    def __init__(self, model: Any, groups: list[LayerGroup]) -> None:
        self.model = model
        self.groups = groups
        self.regulariser: Callable[[], Tensor] | None = None
        self.task: CountedText | None = None
        self.rounding = 0.0

    @property
    def layers(self) -> list[Any]:
        """All adapted layers, of the type their groups hold."""
        return [layer for group in self.groups for layer in group.layers]

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that training changes, in the model's order."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def moved(self) -> bool:
        """Whether any layer differs from the base model's."""
        return any(layer.moved() for layer in self.layers)

    @torch.no_grad()
    def base_logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits of the base model on a batch, without gradients, (batch, length, vocabulary)."""
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        training = self.model.training
        if training:  # to say so to every module takes its time
            self.model.eval()
        with self._as_base():
            logits = self.model(**inputs, use_cache=False).logits
        if training:
            self.model.train()
        return logits

    @torch.no_grad()
    def task_moments(self) -> Moments:
        """Second moments of the layer inputs over the task's text, by the first layer of each group."""
        assert self.task is not None, "the library, which sets none, refuses methods that ask"
        training = self.model.training
        self.model.eval()
        moments = self.task.moments(self.model, {g.layers[0].name: self.linear(g.layers[0]) for g in self.groups})
        self.model.train(training)
        return moments

    @property
    def scalable(self) -> bool:
        """Whether ``shrink`` is possible."""
        return False

    def shrink(self, factor: float) -> None:
        """Scale ΔW of every layer in place; only where ``scalable``."""
        raise NotImplementedError

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the change to ``folder``, with the same bytes every time; ``load_checkpoint`` reads it."""

    def linear(self, layer: Layer) -> Any:
        """The plain linear module of a layer, which PEFT may have wrapped."""
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        module = base.get_submodule(layer.name)
        return module.get_base_layer() if hasattr(module, "get_base_layer") else module

    @contextmanager
    def _as_base(self) -> Iterator[None]:
        """Within the block the model computes what the base model does."""
        modules = [self.linear(layer) for layer in self.layers]
        edited = [module.weight.data for module in modules]
        for module, layer in zip(modules, self.layers, strict=True):
            module.weight.data = layer.weight.detach()
        try:
            with self.model.disable_adapter() if hasattr(self.model, "disable_adapter") else nullcontext():
                yield
        finally:
            for module, weight in zip(modules, edited, strict=True):
                module.weight.data = weight


class LoRAModel(AdaptedModel):
    """A PEFT model whose change PEFT can save and load: LoRA, or DoRA."""

    @torch.no_grad()
    def take_out(self) -> None:
        """Keep the function at the base model's: W ← W - s B₀A₀ wherever the start has a B₀ that is not zero.

        It is rounded to W's type, by ``rounding``.
        """
        for layer in self.layers:
            if isinstance(layer, LoRALayer) and layer.B.any():
                layer.taken = (layer.A.detach().clone(), layer.B.detach().clone())
                rest = layer.weight - layer.scaling * layer.B @ layer.A
                self.linear(layer).weight.data = rounded = rest.to(layer.weight.dtype)
                W, A, B = (part.double() for part in (layer.weight, layer.A, layer.B))
                error = (rounded - (W - layer.scaling * B @ A)).norm() / W.norm()
                self.rounding = max(self.rounding, float(error))

    @property
    def scalable(self) -> bool:
        return all(isinstance(layer, LoRALayer) and layer.taken is None for layer in self.layers)

    @torch.no_grad()
    def shrink(self, factor: float) -> None:
        for layer in self.layers:
            layer.B.mul_(factor)

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """Save the adapter so that ``PeftModel.from_pretrained`` loads it on the untouched base model."""
        lora = [layer for layer in self.layers if isinstance(layer, LoRALayer)]
        if any(layer.taken or layer.projectors for layer in lora):
            _save_factors(self.model.peft_config[NAME], lora, folder)
        else:
            self.model.save_pretrained(str(folder))
            (folder / "README.md").unlink(missing_ok=True)  # an empty template
        config = folder / PEFT_CONFIG
        content = json.loads(config.read_text())
        # PEFT keeps the names in a set, whose order changes with the hash seed
        content["target_modules"] = sorted(content["target_modules"])
        write_json(config, content)


def _save_factors(config: Any, layers: list[LoRALayer], folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = {}
    for layer in layers:
        left, right = layer.factors()
        tensors[f"base_model.model.{layer.name}.lora_A.weight"] = right.detach().contiguous()
        tensors[f"base_model.model.{layer.name}.lora_B.weight"] = left.detach().contiguous()
    rank = right.shape[0]
    config = copy.copy(config)
    config.r, config.lora_alpha = rank, round(layers[0].scaling * rank)  # s = alpha / r stays what it was
    config.init_lora_weights = config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / PEFT_WEIGHTS, metadata={"format": "pt"})


class DenseModel(AdaptedModel):
    """A model whose linear layers change as a whole; a checkpoint holds their weights.

    Raises:
        FoLoRAError: the weights are too coarse to be trained.
    """

    def __init__(self, model: Any, groups: list[LayerGroup]) -> None:
        super().__init__(model, groups)
        coarse = {layer.weight.dtype for layer in self.layers} - {torch.float32}
        if coarse:
            reason = f"this method trains the weights themselves, which {coarse.pop()} is too coarse for"
            raise FoLoRAError(f"foundation.loading.dtype: {reason}: choose float32")

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        weights = {layer.name: layer.current() for layer in self.layers if isinstance(layer, DenseLayer)}
        write_tensors(folder / WEIGHTS_FILE, weights, {"artefact": "weights"})


def add_lora(model: PreTrainedModel, context: Context, **options: Any) -> LoRAModel:
    """Add LoRA to every layer of the spectrum; A is drawn from torch's global generator, B is zero.

    Args:
        model: the base model.
        context: names the layers and their spectra.
        options: further fields of PEFT's ``LoraConfig``.
    """
    from peft import LoraConfig, get_peft_model

    weights = weights_of(model, context)
    if "init_lora_weights" in options:  # PEFT's own starts edit the weights in place
        weights = {name: weight.clone() for name, weight in weights.items()}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=context.rank,
        lora_alpha=context.alpha,
        lora_dropout=0.0,
        target_modules=list(weights),
        revision=context.base.manifest["commit"],
        **options,
    )
    model.name_or_path = context.base.manifest["source"] or str(context.base.folder)
    wrapped = get_peft_model(model, config)
    found = sum(NAME in getattr(module, "lora_A", {}) for module in wrapped.modules())
    if found != len(weights):  # it matches names by their end
        raise FoLoRAError(f"adapter.target_modules: PEFT adapts {found} layers, the spectrum has {len(weights)}")
    adapted = lora_model(wrapped, context.spectrum, weights)
    adapted.task = context.task
    return adapted


def lora_model(model: PeftModel | PeftMixedModel, spectrum: Spectrum, weights: dict[str, Tensor]) -> LoRAModel:
    """The LoRA layers of a PEFT model, grouped by the input they read; ``weights`` are those of the base model."""
    wrapped = dict(model.get_base_model().named_modules())

    def layer(name: str) -> LoRALayer:
        module: Any = wrapped[name]
        factors = module.lora_A[NAME].weight, module.lora_B[NAME].weight
        return LoRALayer(name, *factors, weights[name], module.scaling[NAME])

    return LoRAModel(model, grouped(spectrum, layer))


def weights_of(model: PreTrainedModel, context: Context) -> dict[str, Tensor]:
    """The weight (m, d) of every layer of the spectrum, by module name.

    Raises:
        FoLoRAError: the model has no such layer.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    for name in context.spectrum.layers:
        if name not in modules:
            remedy = "run the spectrum stage again"
            raise FoLoRAError(f"adapter: layer {name} of the spectrum is not in the model: {remedy}")
    return {name: modules[name].weight.detach() for name in context.spectrum.layers}


def check_rank(model: PreTrainedModel, context: Context, *, spare: int = 0) -> None:
    """See that every layer has the singular triplets that a method takes as its start, and some to spare.

    Raises:
        FoLoRAError: the adapter's rank is too great for a layer's smaller side.
    """
    for name, weight in weights_of(model, context).items():
        if context.rank + spare > min(weight.shape):
            limit = f"layer {name} has {min(weight.shape)} singular values"
            raise FoLoRAError(f"adapter.rank: {context.rank} is too much for this method, {limit}: lower it")


def check_start(layer: LoRALayer, directions: int) -> None:
    """See that there is a direction for each row of a layer's A.

    Raises:
        FoLoRAError: the adapter's rank is too great.
    """
    rank = layer.A.shape[0]
    if rank > directions:
        limit = f"the input of layer {layer.name} has {directions} directions"
        raise FoLoRAError(f"adapter.rank: {rank} is too much for this method, {limit}: lower it")


def load_checkpoint(model: PreTrainedModel | PeftModel, checkpoint: Path) -> PreTrainedModel | PeftModel:
    """Load a saved change on a base model, or in place of the change of the same method that is already on it.

    The base model may keep W (m, d) of a layer transposed, as GPT-2 does.

    Raises:
        FoLoRAError: the checkpoint is damaged.
    """
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
    from safetensors import SafetensorError
    from transformers.pytorch_utils import Conv1D

    if (checkpoint / WEIGHTS_FILE).exists():
        weights, _ = read_tensors(checkpoint / WEIGHTS_FILE, artefact="weights")
        modules: dict[str, Any] = dict(model.named_modules())
        for name, weight in weights.items():
            module = modules.get(name)
            weight = weight.mT.contiguous() if isinstance(module, Conv1D) else weight
            held = getattr(module, "weight", None)
            if held is None or held.shape != weight.shape:
                raise FoLoRAError(f"{checkpoint}: the model has no {name} of that shape: train its run again")
            if held.is_meta:
                raise FoLoRAError(f"{MAX_MEMORY}: {checkpoint} holds whole weights: unset it, or give more memory")
            held.data = weight.to(held.device, held.dtype)
        return model
    try:
        if not isinstance(model, PeftModel):
            with warnings.catch_warnings():  # PEFT fills factors that have no memory yet, see materialise_adapter
                warnings.filterwarnings("ignore", message=".* to a meta parameter")
                model = PeftModel.from_pretrained(model, checkpoint, torch_device="cpu").eval()
            if not materialise_adapter(model):
                return model
        set_peft_model_state_dict(model, load_peft_weights(str(checkpoint), device="cpu"))
    except (SafetensorError, OSError, ValueError) as error:
        raise FoLoRAError(
            f"{checkpoint}: damaged or incomplete ({error}): delete its run and train it again"
        ) from error
    return model
