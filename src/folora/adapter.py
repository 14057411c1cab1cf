"""The LoRA adapter: made by PEFT, saved as PEFT saves it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from folora.errors import FoLoRAError
from folora.methods.base import LayerGroup, LoRALayer
from folora.storage import write_json

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftModel
    from transformers import PreTrainedModel

    from folora.base import Base
    from folora.params import Adapter
    from folora.spectrum import Spectrum

NAME = "default"  # PEFT's name of the only adapter of a model


def add_adapter(model: PreTrainedModel, settings: Adapter, spectrum: Spectrum, base: Base) -> PeftModel:
    """Add a LoRA adapter to every layer of the spectrum; A is drawn from torch's global generator, B is zero."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=[name for names in spectrum.groups.values() for name in names],
        revision=base.manifest["commit"],
    )
    model.name_or_path = base.manifest["source"] or str(base.folder)
    return get_peft_model(model, config)


def layer_groups(model: PeftModel, spectrum: Spectrum) -> list[LayerGroup]:
    """The adapter's factors, grouped by the input they read.

    Raises:
        FoLoRAError: a layer of the spectrum carries no LoRA factors.
    """
    modules = dict(model.get_base_model().named_modules())

    def layer(name: str) -> LoRALayer:
        module = modules.get(name)
        if module is None or NAME not in getattr(module, "lora_A", {}):
            raise FoLoRAError(f"adapter: layer {name} of the spectrum was not adapted: run the spectrum stage again")
        return LoRALayer(
            A=module.lora_A[NAME].weight,
            B=module.lora_B[NAME].weight,
            weight=module.get_base_layer().weight,
            scaling=module.scaling[NAME],
        )

    return [LayerGroup([layer(n) for n in names], spectrum.inputs[leader]) for leader, names in spectrum.groups.items()]


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Save the adapter so that ``PeftModel.from_pretrained`` loads it, with the same bytes every time."""
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)  # an empty template
    config = folder / "adapter_config.json"
    content = json.loads(config.read_text())
    # PEFT keeps the names in a set, whose order changes with the hash seed
    content["target_modules"] = sorted(content["target_modules"])
    write_json(config, content)
