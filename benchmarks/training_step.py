"""A training step with FoLoRA's optimizer, against the same PEFT model with torch's AdamW."""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from bench import Row, alternate, main, within
from models import sized, tokens
from peft import LoraConfig, get_peft_model

import folora

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

RANK = 16


def rows(size: str, repeats: int) -> Iterator[Row]:
    """Time forward and backward pass, and the step of each optimizer after it."""
    model = sized(size)
    calibration = tokens(model, 4, 64)
    task = calibration.flip(1)
    spectrum = folora.solve_spectrum(
        *(folora.second_moments(model, [{"input_ids": ids}]) for ids in (calibration, task))
    )
    adapted = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))
    plain = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizers = {
        "gated": folora.gated_adam(adapted, spectrum, learning_rate=1e-5, gate_b="off"),
        "gated, B too": folora.gated_adam(adapted, spectrum, learning_rate=1e-5),
        "AdamW": torch.optim.AdamW(plain, lr=1e-5, foreach=True),
    }
    for ids in (tokens(model, 16, 128), tokens(model, 4, 128)) if size == "full" else (tokens(model, 4, 32),):
        passes = alternate(max(repeats // 2, 1), partial(pass_over, adapted, ids))[0]
        updates = dict(zip(optimizers, alternate(2 * repeats, *(one.step for one in optimizers.values())), strict=True))
        bound = 1.02 if ids.numel() >= 2048 else 1.05
        work = f"{ids.numel():,} tokens, {model.num_parameters() / 1e6:.0f} M parameters, rank {RANK}"
        alone = [median(passes) + one for one in updates["AdamW"]]
        for name, note in (("gated", ""), ("gated, B too", "B's pencils solved every 10 steps")):
            ours = [median(passes) + one for one in updates[name]]
            yield within(f"training step, {name}", "AdamW, foreach", work, ours, alone, bound, note)
    bases = 4 * sum(one.basis.numel() for one in spectrum.inputs.values())
    products = alternate(2 * repeats, partial(rotate, spectrum))[0]
    limit = [a + b for a, b in zip(updates["AdamW"], products, strict=True)]
    note = f"beside Adam's moments it holds the bases, {bases / 1e6:.0f} MB, which are the spectrum's"
    yield within("optimizer step alone, gated", "AdamW + the two products", work, updates["gated"], limit, 1.15, note)


def pass_over(model: Any, ids: Tensor) -> None:
    """Gradients of one batch."""
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


@torch.no_grad()
def rotate(spectrum: folora.pencil.Spectrum) -> None:
    """Into the basis of every layer input and back, for the A of all layers that read it, and nothing else."""
    for leader, layers in spectrum.groups.items():
        basis = spectrum.inputs[leader].basis
        (torch.ones(RANK * len(layers), len(basis)) @ basis) @ basis.mT


if __name__ == "__main__":
    main(rows)
