"""How much an adapter forgets on a base model, whoever made it: by its output on held-out text, and layer by layer.

The adapter is put on the base model of the foundation stage. KL and perplexity are read on held-out proxy text, the
kept tasks are asked before and after, and each layer's change of weights is weighed with the second moments of its
input, as the forgetting meter does. Any PEFT adapter will do whose layers can be merged, of any rank.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel

from folora.deltas import DenseLayer
from folora.errors import FoLoRAError
from folora.evaluate import Evaluator, accuracies
from folora.evaluation_tasks import is_known
from folora.meter import change, output_energy
from folora.spectrum import read_spectrum
from folora.storage import PEFT_CONFIG, PEFT_WEIGHTS
from folora.texts import figures

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftModel
    from transformers import PreTrainedModel

    from folora.base import Base
    from folora.params import Params
    from folora.pencil import LayerSpectrum, Spectrum


@dataclass(frozen=True)
class Yardsticks:
    """What an adapter is measured with.

    Attributes:
        heldout: proxy text for KL and perplexity.
        spectrum: folder with the parts of a spectrum, which hold the moments of every layer input.
        tasks: folder with evaluation tasks.
    """

    heldout: Path
    spectrum: Path
    tasks: Path


class Modules(BaseModel):
    """Fields of an adapter's configuration that PEFT would take text for a list in, letter by letter."""

    modules_to_save: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    target_modules: list[str] | str | None = None


@dataclass(frozen=True)
class LayerChange:
    """E‖ΔW x‖² of a layer as a share of E‖W x‖², on proxy text (penalty) and on task text (utility)."""

    layer: str
    penalty: float
    utility: float


@dataclass(frozen=True)
class Forgetting:
    """How much an adapter forgets.

    Attributes:
        kl: KL(base ‖ adapted) on held-out proxy text, in nats per token.
        base_perplexity: of the base model on that text.
        perplexity: with the adapter.
        kept: accuracy on each kept task, of the base model and with the adapter.
        layers: relative changes, in the order of the model.
        unmeasured: adapted modules that the spectrum does not cover or PEFT cannot merge.
        unasked: kept tasks that are neither in the folder nor the harness's.
    """

    kl: float
    base_perplexity: float
    perplexity: float
    kept: dict[str, tuple[float, float]]
    layers: list[LayerChange]
    unmeasured: list[str]
    unasked: list[str]

    def mean(self, figure: str) -> float:
        """Mean over the measured layers of ``penalty`` or ``utility``; 0 where none is."""
        values = [getattr(layer, figure) for layer in self.layers]
        return sum(values) / len(values) if values else 0.0

    def as_json(self) -> dict[str, Any]:
        """Plain values, for programs."""
        return {**asdict(self), "penalty": self.mean("penalty"), "utility": self.mean("utility")}


def measure_forgetting(params: Params, adapter: Path, base: Base, yardsticks: Yardsticks) -> Forgetting:
    """Measure a PEFT adapter on a base model.

    Args:
        params: names the kept tasks, and says how held-out text was sampled.
        adapter: folder with adapter_config.json and adapter_model.safetensors.
        base: the base model.
        yardsticks: what to measure with.

    Raises:
        FoLoRAError: the adapter does not fit the base model, or a yardstick is damaged or of another model.
    """
    for name in (PEFT_CONFIG, PEFT_WEIGHTS):
        require_file(adapter / name)
    tasks = [name for name in params.evaluation.kept if is_known(name, yardsticks.tasks)]
    unasked = [name for name in params.evaluation.kept if name not in tasks]
    evaluator = Evaluator(params, base, yardsticks.tasks, yardsticks.heldout, tasks)
    spectrum = read_spectrum(*params.spectrum.files(yardsticks.spectrum), **base.identity)
    base_perplexity = figures(evaluator.base_drift())["perplexity"]
    before = accuracies(evaluator.answers(tasks)) if tasks else {}
    evaluator.model = model = put_on(evaluator.model, adapter)
    drift = figures(evaluator.drift())
    after = accuracies(evaluator.answers(tasks)) if tasks else {}
    layers, unmeasured = layer_changes(model, spectrum)
    kept = {name: (before[name], after[name]) for name in tasks}
    return Forgetting(drift["kl"], base_perplexity, drift["perplexity"], kept, layers, unmeasured, unasked)


def require_file(path: Path) -> None:
    """Raise if an adapter lacks a file that every PEFT adapter in safetensors has."""
    if not path.is_file():
        raise FoLoRAError(f"{path}: not found: name the folder of a PEFT adapter saved as safetensors")


def put_on(model: PreTrainedModel | PeftModel, adapter: Path) -> PeftModel:
    """Load a PEFT adapter on a base model.

    Raises:
        FoLoRAError: it is damaged, was made for another model, or adds tokens instead of changing layers.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    # of re: target_modules may be a pattern
    mistakes = (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, ImportError, re.error)
    try:
        Modules.model_validate_json((adapter / PEFT_CONFIG).read_bytes())
        adapted = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu").eval()
    except (SafetensorError, *mistakes) as error:
        raise FoLoRAError(f"{adapter}: does not fit this base model, or is damaged: {str(error)[:200]}") from error
    if adapted.active_peft_config.is_prompt_learning:
        raise FoLoRAError(f"{adapter}: adds tokens to the prompt and changes no layer: name an adapter that does")
    return adapted


@torch.no_grad()
def layer_changes(model: PeftModel, spectrum: Spectrum) -> tuple[list[LayerChange], list[str]]:
    """Relative changes of the adapted layers, and the names of the modules they cannot be measured for."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inputs = {name: spectrum.inputs[leader] for leader, names in spectrum.groups.items() for name in names}
    measured, unmeasured = [], []
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) or (isinstance(module, BaseTunerLayer) and name not in inputs):
            unmeasured.append(name)
        elif isinstance(module, BaseTunerLayer):
            layer = _changed_layer(name, module)
            if layer:
                measured.append(_relative_change(layer, inputs[name]))
            else:
                unmeasured.append(name)
    return measured, unmeasured


def _changed_layer(name: str, module: Any) -> DenseLayer | None:
    """A layer before and after merging, in float32; None of a kind of adapter that PEFT cannot merge."""
    weight = module.get_base_layer().weight
    original, single = weight.data, weight.detach().float()
    weight.data = single.clone()  # in bfloat16 most of a small change would be rounded away
    try:
        module.merge()
        merged = weight.detach().clone()
        module.unmerge()
    except RuntimeError:
        return None
    finally:
        weight.data = original
    return DenseLayer(name, single, lambda: merged)


def _relative_change(layer: DenseLayer, spectrum: LayerSpectrum) -> LayerChange:
    penalty, utility = (
        float(change(layer, moment) / output_energy(layer, moment)) for moment in (spectrum.penalty, spectrum.utility)
    )
    return LayerChange(layer.name, penalty, utility)
