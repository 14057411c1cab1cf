"""A training step with FoLoRA's optimizer, against the same PEFT model with torch's AdamW in its faster form."""

from __future__ import annotations

from functools import partial
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import torch
from bench import Row, alternate, main, measured, within
from models import sized, tokens
from peft import LoraConfig, get_peft_model

import folora
from folora.methods.folora import FoLoRA

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

RANK = 16
PERIOD = FoLoRA(kind="folora").refresh_b  # updates, of which one solves B's pencils
LEAST = 5  # passes, and periods


def rows(size: str, repeats: int) -> Iterator[Row]:
    """Time forward and backward pass, and after it whole periods of updates of each optimizer."""
    repeats = max(repeats, LEAST)
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
        "AdamW, foreach": torch.optim.AdamW(plain, lr=1e-5, foreach=True),
        "AdamW, fused": torch.optim.AdamW(plain, lr=1e-5, fused=True),
    }
    notes = {"gated": "", "gated, B too": f"B's pencils solved every {PERIOD} updates"}
    works = [one.step for one in optimizers.values()] + [partial(rotate, spectrum)]
    for ids in (tokens(model, 16, 128), tokens(model, 4, 128)) if size == "full" else (tokens(model, 4, 32),):
        passes = alternate(repeats, partial(pass_over, adapted, ids))[0]
        *updates, products = (in_periods(times) for times in alternate(repeats * PERIOD, *works))
        update = dict(zip(optimizers, updates, strict=True))
        bound = 1.02 if ids.numel() >= 2048 else 1.05
        work = f"{ids.numel():,} tokens, {model.num_parameters() / 1e6:.0f} M parameters, rank {RANK}"
        peer = min((name for name in update if name not in notes), key=lambda name: median(update[name]))
        alone = added(passes, update[peer])
        shared = f"both sides have the same timed passes; updates are means of {PERIOD}"
        for name, note in notes.items():
            note = "; ".join(filter(None, [shared, note]))
            yield within(f"training step, {name}", peer, work, added(passes, update[name]), alone, bound, note)
    work = f"{model.num_parameters() / 1e6:.0f} M parameters, rank {RANK}"
    limit, both = added(update[peer], products), f"{peer} + the two products"
    yield within("optimizer step alone, gated", both, work, update["gated"], limit, 1.15, held(spectrum))
    for name, note in notes.items():
        what = f"optimizer step alone, {name}"
        yield measured(what, f"{peer}, same parameters", work, update[name], update[peer], note)


def in_periods(times: list[float]) -> list[float]:
    """Mean over each period: its median would leave out the update that solves."""
    return [fmean(times[begin : begin + PERIOD]) for begin in range(0, len(times), PERIOD)]


def added(some: list[float], others: list[float]) -> list[float]:
    """Seconds of one piece of work and then another, in each repeat."""
    return [one + other for one, other in zip(some, others, strict=True)]


def held(spectrum: folora.pencil.Spectrum) -> str:
    """What a training holds in memory for its spectrum."""
    inputs = spectrum.inputs.values()
    bases = sum(one.basis.nbytes for one in inputs)
    moments = sum(one.penalty.nbytes + one.utility.nbytes for one in inputs)
    return (
        f"a training holds beside Adam's moments the bases, {bases / 1e6:.0f} MB, and what B's gates and the meter "
        f"read, both moments, {moments / 1e6:.0f} MB"
    )


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
