"""What training changes: the model with its adapter, layer by layer, and how the change is saved and loaded.

Every checkpoint is a change of the untouched base model. A method that takes a part s B₀A₀ out of the base weights
before training (PiSSA, CorDA, ...) computes W - s B₀A₀ + s B A, which is plain LoRA of twice the rank:

    ΔW = s (B A - B₀A₀) = s [B, -B₀] [A; A₀]

A method whose change has full rank is saved as the changed weights themselves.
"""

from __future__ import annotations

import copy
import json
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from folora.errors import FoLoRAError
from folora.storage import read_tensors, write_json, write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from peft import PeftModel
    from transformers import PreTrainedModel

    from folora.base import Base
    from folora.pencil import LayerSpectrum, Spectrum

NAME = "default"  # PEFT's name of the only adapter of a model
WEIGHTS_FILE = "weights.safetensors"


@dataclass(frozen=True)
class Context:
    """What a method may build its adapter from.

    Attributes:
        rank: r of the adapter.
        alpha: s = alpha / r.
        spectrum: basis, eigenvalues and moments of every layer input.
        base: where the model comes from.
        proxy: token ids of the text sampled from the base model, BOS first.
    """

    rank: int
    alpha: int
    spectrum: Spectrum
    base: Base
    proxy: list[list[int]]


@dataclass
class LoRALayer:
    """One adapted linear layer, y = W x + s B A x.

    Attributes:
        name: module name in the base model.
        A: (r, d) parameter.
        B: (m, r) parameter.
        weight: (m, d), W of the base model.
        scaling: s.
        taken: (A₀, B₀), whose product s B₀A₀ was taken out of the base weights, or None.
        projectors: (m, m) on the left of B and (d, d) on the right of A, or None.
    """

    name: str
    A: nn.Parameter
    B: nn.Parameter
    weight: Tensor
    scaling: float
    taken: tuple[Tensor, Tensor] | None = None
    projectors: tuple[Tensor, Tensor] | None = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """(left (m, k), right (k, d)) with ΔW = s · left · right; k is r, or 2r where a part was taken out."""
        left: Tensor = self.B
        right: Tensor = self.A
        if self.projectors is not None:
            left, right = self.projectors[0] @ left, right @ self.projectors[1]
        if self.taken is None:
            return left, right
        A0, B0 = self.taken
        if not self.A.requires_grad:  # a frozen A keeps its row space, so rank r is enough
            return left - B0, right
        return torch.cat([left, -B0], dim=1), torch.cat([right, A0])

    def moved(self) -> bool:
        """Whether the layer differs from the base model's."""
        if self.taken is not None:  # rounding keeps B₀A₀ - B₀A₀ off zero
            return not (torch.equal(self.A, self.taken[0]) and torch.equal(self.B, self.taken[1]))
        left, right = self.factors()
        return bool((left @ right).any())


class Projected(nn.Module):
    """A weight seen through projectors on its left or its right."""

    def __init__(self, *, left: Tensor | None = None, right: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        seen = weight if self.left is None else self.left @ weight
        return seen if self.right is None else seen @ self.right

    left: Tensor | None
    right: Tensor | None


@dataclass
class DenseLayer:
    """One linear layer whose weight changes as a whole.

    Attributes:
        name: module name in the base model.
        weight: (m, d), W of the base model.
        current: returns the weight as it stands, (m, d).
    """

    name: str
    weight: Tensor
    current: Callable[[], Tensor]
    scaling: float = 1.0

    def factors(self) -> tuple[Tensor, Tensor]:
        """(ΔW, I)."""
        change = self.current() - self.weight
        return change, torch.eye(change.shape[1], dtype=change.dtype, device=change.device)

    def moved(self) -> bool:
        """Whether the layer differs from the base model's."""
        return not torch.equal(self.current(), self.weight)


Layer = LoRALayer | DenseLayer


@dataclass(frozen=True)
class LayerGroup:
    """The adapted layers that read one input, with the spectrum of that input."""

    layers: list[Any]  # of LoRALayer, or all of DenseLayer
    spectrum: LayerSpectrum


class AdaptedModel:
    """A model ready to train.

    Attributes:
        model: what the Trainer trains.
        groups: the adapted layers by the input they read.
        regulariser: a scalar that joins the loss of every step, or None.
    """

    def __init__(self, model: Any, groups: list[LayerGroup]) -> None:
        self.model = model
        self.groups = groups
        self.regulariser: Callable[[], Tensor] | None = None

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
        training = self.model.training
        self.model.eval()
        with self._as_base():
            logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        self.model.train(training)
        return logits

    @property
    def scalable(self) -> bool:
        """Whether ``shrink`` is possible."""
        return False

    def shrink(self, factor: float) -> None:
        """Scale ΔW of every layer in place."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write the change to ``folder``, with the same bytes every time; ``load_checkpoint`` reads it."""
        raise NotImplementedError

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
        """Keep the function at the base model's: W ← W - s B₀A₀ wherever the start has a B₀ that is not zero."""
        for layer in self.layers:
            if isinstance(layer, LoRALayer) and layer.B.any():
                layer.taken = (layer.A.detach().clone(), layer.B.detach().clone())
                self.linear(layer).weight.data = layer.weight - layer.scaling * layer.B @ layer.A

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
        config = folder / "adapter_config.json"
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
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


class DenseModel(AdaptedModel):
    """A model whose linear layers change as a whole; a checkpoint holds their weights."""

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

    names = [name for group in context.spectrum.groups.values() for name in group]
    modules = dict(model.named_modules())
    missing = [name for name in names if name not in modules]
    if missing:
        raise FoLoRAError(
            f"adapter: layer {missing[0]} of the spectrum is not in the model: run the spectrum stage again"
        )
    # PEFT's own starts edit the weights in place
    edits = "init_lora_weights" in options
    weights = {name: modules[name].weight.detach() for name in names}
    if edits:
        weights = {name: weight.clone() for name, weight in weights.items()}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=context.rank,
        lora_alpha=context.alpha,
        lora_dropout=0.0,
        target_modules=names,
        revision=context.base.manifest["commit"],
        **options,
    )
    model.name_or_path = context.base.manifest["source"] or str(context.base.folder)
    adapted = get_peft_model(model, config)
    wrapped = dict(adapted.get_base_model().named_modules())

    def layer(name: str) -> LoRALayer:
        module: Any = wrapped[name]
        factors = module.lora_A[NAME].weight, module.lora_B[NAME].weight
        return LoRALayer(name, *factors, weights[name], module.scaling[NAME])

    return LoRAModel(adapted, grouped(context.spectrum, layer))


def grouped(spectrum: Spectrum, layer: Callable[[str], Layer]) -> list[LayerGroup]:
    """Make the layers of the spectrum, grouped by the input they read."""
    return [
        LayerGroup([layer(name) for name in names], spectrum.inputs[leader])
        for leader, names in spectrum.groups.items()
    ]


def load_checkpoint(model: PreTrainedModel | PeftModel, checkpoint: Path) -> PreTrainedModel | PeftModel:
    """Load a saved change on a base model, or in place of the change of the same method that is already on it.

    Raises:
        FoLoRAError: the checkpoint is damaged.
    """
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
    from safetensors import SafetensorError

    if (checkpoint / WEIGHTS_FILE).exists():
        weights, _ = read_tensors(checkpoint / WEIGHTS_FILE, artefact="weights")
        for name, weight in weights.items():
            model.get_submodule(name).weight.data = weight
        return model
    try:
        if not isinstance(model, PeftModel):
            return PeftModel.from_pretrained(model, checkpoint).eval()
        set_peft_model_state_dict(model, load_peft_weights(str(checkpoint), device="cpu"))
    except (SafetensorError, OSError, ValueError) as error:
        raise FoLoRAError(
            f"{checkpoint}: damaged or incomplete ({error}): delete its run and train it again"
        ) from error
    return model
