"""Methods without a foundation: a Llama of one block with hostile weights, and moments of made-up layer inputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import scipy.linalg
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from folora import pencil
from folora.adapter import AdaptedModel, Context
from folora.base import Base
from folora.counted_text import CountedText
from folora.methods import method_from
from folora.pencil import LayerSpectrum, Spectrum
from folora.triangle import blocks_of, half_size

if TYPE_CHECKING:
    from folora.deltas import Layer, LoRALayer

RANK = 3
SCALING = 2.0
SHRINKAGE = 0.02
BLOCK = "model.layers.0"
GROUPS = {
    f"{BLOCK}.self_attn.q_proj": [f"{BLOCK}.self_attn.{name}_proj" for name in "qkv"],
    f"{BLOCK}.self_attn.o_proj": [f"{BLOCK}.self_attn.o_proj"],
    f"{BLOCK}.mlp.gate_proj": [f"{BLOCK}.mlp.{name}_proj" for name in ("gate", "up")],
    f"{BLOCK}.mlp.down_proj": [f"{BLOCK}.mlp.down_proj"],
}
DEFICIENT = f"{BLOCK}.self_attn.o_proj"  # its weight has rank 2, less than the adapter's
WIDTHS = {name: 7 if "down" in name else 12 for name in GROUPS}
BATCH = {
    "input_ids": torch.tensor([[1, 4, 2, 9, 7, 3], [1, 8, 8, 0, 5, 10]]),
    "attention_mask": torch.ones(2, 6).long(),
}


def noise(seed: int, *shape: int) -> Tensor:
    """Signed, shifted, and scaled from 0.1 to 10 over the last dimension, in an order that changes with the seed."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-1, 1, shape[-1], dtype=torch.float64).roll(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) - 0.3) * scales


def moment(tokens: Tensor) -> Tensor:
    """E[x xᵀ] of tokens (n, d)."""
    return tokens.mT @ tokens / len(tokens)


# what every layer input read: 40 tokens of proxy text, and of the task fewer than its width
PROXY = {name: noise(20 + i, 40, width) for i, (name, width) in enumerate(WIDTHS.items())}
TASK = {name: noise(30 + i, 5, width) for i, (name, width) in enumerate(WIDTHS.items())}


def base_model() -> LlamaForCausalLM:
    """The same model every time; its layers are 12 × 12, 4 × 12, 7 × 12 and 12 × 7."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=12,
        intermediate_size=7,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=16,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for seed, name in enumerate(name for names in GROUPS.values() for name in names):
            weight = model.get_submodule(name).weight
            thin = noise(seed, 12, 2) @ noise(seed + 1, 2, 12) / 10
            weight.copy_((thin if name == DEFICIENT else noise(seed, *weight.shape)) / 10)
    return model


def layer_spectrum(name: str) -> LayerSpectrum:
    return pencil.layer_spectrum(
        moment(PROXY[name]),
        moment(TASK[name]),
        shrinkage=SHRINKAGE,
        proxy_tokens=len(PROXY[name]),
        proxy_fourth=float(PROXY[name].square().sum(1).square().mean()),
        name=name,
    )


def ridged(tokens: Tensor, share: float = SHRINKAGE) -> Tensor:
    """The second moment at trace d, mixed with the identity: (1 - a) C + a I."""
    C, d = moment(tokens), tokens.shape[1]
    return (1 - share) * C * d / C.trace() + share * torch.eye(d, dtype=C.dtype)


def context(*, white: bool = False) -> Context:
    """What methods build from; ``white`` puts the identity in the place of every second moment."""
    inputs = {name: layer_spectrum(name) for name in GROUPS}
    if white:
        inputs = {
            name: replace(one, penalty=torch.eye(WIDTHS[name]), utility=torch.eye(WIDTHS[name]))
            for name, one in inputs.items()
        }
    rows = [[1, *row] for row in torch.randint(11, (6, 5), generator=torch.Generator().manual_seed(3)).tolist()]
    base = Base(Path("base"), {"source": "base", "commit": None})
    task = CountedText(BATCH["input_ids"].tolist(), None, "all", 1, 0)
    return Context(RANK, round(SCALING * RANK), Spectrum(inputs, GROUPS), base, rows, task)


def adapt(kind: str, *, seed: int = 0, white: bool = False, **options: Any) -> AdaptedModel:
    """The base model with the start of a method."""
    model = base_model()
    torch.manual_seed(seed)
    return method_from(kind, {"kind": kind, **options}).adapt(model, context(white=white))


def optimizer(adapted: AdaptedModel, kind: str, *, rate: float = 0.02, **options: Any) -> torch.optim.Optimizer:
    return method_from(kind, {"kind": kind, **options}).optimizer(adapted, rate)


def push(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range = range(4)) -> None:
    """Optimizer steps on made-up gradients, the same for equal shapes."""
    for step in steps:
        for number, parameter in enumerate(parameters):
            parameter.grad = noise(100 * step + number, *parameter.shape).to(parameter.dtype)
        optimizer.step()


def train(adapted: AdaptedModel, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    """Optimizer steps on the loss of a batch."""
    for _ in range(steps):
        optimizer.zero_grad()
        adapted.model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
        optimizer.step()


def pairs(adapted: AdaptedModel) -> list[tuple[LoRALayer, str]]:
    """Every adapted layer with the name of its input."""
    return [(layer, leader) for leader, group in zip(GROUPS, adapted.groups, strict=True) for layer in group.layers]


@torch.no_grad()
def seen_weight(adapted: AdaptedModel, layer: Layer) -> Tensor:
    """The weight that a layer of the model in training applies, read off its outputs, (m, d) float64."""
    model = adapted.model.get_base_model() if hasattr(adapted.model, "get_base_model") else adapted.model
    module = model.get_submodule(layer.name)
    return module(torch.eye(module.in_features)).mT.double()


def seen_change(adapted: AdaptedModel, layer: Layer) -> Tensor:
    """What training added to that weight."""
    return seen_weight(adapted, layer) - layer.weight.detach().double()


def product(layer: LoRALayer) -> Tensor:
    """The change s B A of plain factors, float64."""
    return layer.scaling * layer.B.detach().double() @ layer.A.detach().double()


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k,) and V (d, k) by scipy, k the shorter side."""
    U, S, Vh = scipy.linalg.svd(matrix.detach().double().numpy(), full_matrices=False)
    return torch.from_numpy(U), torch.from_numpy(S), torch.from_numpy(Vh.T)


def eigh(matrix: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Ascending (generalised) eigenvalues and their vectors as columns, by scipy."""
    values, vectors = scipy.linalg.eigh(matrix.numpy(), None if other is None else other.numpy())
    return torch.from_numpy(values), torch.from_numpy(vectors)


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-5, *, size: Tensor | float = 0.0) -> None:
    """Equal up to a share of the greatest entry expected, or of ``size`` where that is more."""
    found, expected = found.detach().double(), expected.detach().double()
    greatest = max(float(expected.abs().max()), float(size))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * greatest)


def half_of(matrix: Tensor) -> Tensor:
    """The half of a symmetric matrix (d, d)."""
    half = matrix.new_empty(half_size(len(matrix)))
    for rows, block in blocks_of(half, len(matrix)):
        block.copy_(matrix[rows, : rows.stop])
    return half
