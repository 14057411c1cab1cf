"""What a model looks like, from its configuration alone: no weights are loaded or fetched."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from folora.coverage import Covered, coverage
from folora.moments import SINGLE, split_passes
from folora.params import OfflineFoundation, PretrainedFoundation
from folora.triangle import half_size

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from folora.params import Params


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

    @property
    def forward(self) -> float:
        """Operations of a token's forward pass."""
        return 2.0 * self.parameters

    @property
    def logits(self) -> int:
        """Bytes of a token's."""
        return SINGLE * self.vocabulary

    @property
    def activations(self) -> int:
        """Bytes of a token's within one block."""
        return SINGLE * (6 * self.width + 3 * self.intermediate)

    def factors(self, rank: int) -> int:
        """Bytes of an adapter."""
        return SINGLE * rank * sum(m + d for m, d in self.layers)

    def passes(self, budget: int | None) -> list[list[int]]:
        """Widths of the layer inputs whose moments are summed in each pass over a text."""
        named = {str(number): d for number, d in enumerate(self.inputs)}
        return [[named[name] for name in names] for names in split_passes(named, budget)]

    def spectrum_size(self, directions: int | None) -> int:
        """Numbers in the bases and moments of the layer inputs."""
        return 2 * self.squares + sum(d * min(d, directions or d) for d in self.inputs)


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
