from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from folora.deltas import DenseLayer, LayerGroup, LoRALayer
from folora.meter import ForgettingMeter, change, output_energy
from folora.pencil import LayerSpectrum


def noise(seed: int, *shape: int) -> Tensor:
    """Signed, shifted, and badly scaled over the last dimension, in an order that changes with the seed."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) - 0.3) * torch.logspace(-1.5, 1.5, shape[-1]).roll(seed)


def tokens(seed: int, width: int, count: int = 40) -> Tensor:
    return noise(seed, count, width)


def moment(x: Tensor) -> Tensor:
    return x.mT @ x / len(x)


def layer(seed: int, rows: int, width: int, rank: int = 3, scaling: float = 2.5) -> LoRALayer:
    A, B = nn.Parameter(noise(seed, rank, width)), nn.Parameter(noise(seed + 1, rows, rank))
    return LoRALayer("x", A, B, noise(seed + 2, rows, width), scaling)


def group(seed: int, width: int, *rows: int, scaling: float = 2.5) -> LayerGroup:
    penalty, utility = moment(tokens(seed + 50, width)), moment(tokens(seed + 60, width, 2))
    layers = [layer(seed + 10 * number, height, width, scaling=scaling) for number, height in enumerate(rows)]
    return LayerGroup(layers, LayerSpectrum(torch.eye(width), torch.ones(width), penalty, utility, 0.01, 40, 1.0, {}))


def explicit(one: LoRALayer, C: Tensor) -> float:
    """tr(ΔW C ΔWᵀ) in float64, with ΔW in full."""
    update = one.scaling * one.B.detach().double() @ one.A.detach().double()
    return float((update @ C.double() @ update.T).trace())


def explicit_share(one: LoRALayer, C: Tensor) -> float:
    W = one.weight.double()
    return explicit(one, C) / float((W @ C.double() @ W.T).trace())


@pytest.mark.parametrize(("rows", "width", "rank"), [(4, 6, 3), (7, 5, 2), (2, 3, 8)])
@pytest.mark.parametrize("count", [40, 2])
@pytest.mark.parametrize("scaling", [0.25, 2.0])
def test_change_is_that_of_the_explicit_update(rows: int, width: int, rank: int, count: int, scaling: float) -> None:
    one, x = layer(1, rows, width, rank, scaling), tokens(9, width, count)
    found = float(change(one, moment(x)).detach())
    assert found == pytest.approx(explicit(one, moment(x)), rel=1e-4)
    outputs = scaling * x.double() @ one.A.detach().double().T @ one.B.detach().double().T
    assert found == pytest.approx(float(outputs.square().sum(1).mean()), rel=1e-4)


def test_change_of_a_dense_layer_is_that_of_its_weights() -> None:
    one, C = layer(1, 4, 6), moment(tokens(9, 6))
    moved = one.weight + one.scaling * one.B.detach() @ one.A.detach()
    assert float(change(DenseLayer("x", one.weight, lambda: moved), C)) == pytest.approx(explicit(one, C), rel=1e-4)


def test_change_does_not_count_what_was_taken_out_of_the_weights() -> None:
    one, C = layer(1, 4, 6), moment(tokens(9, 6))
    start = layer(5, 4, 6)
    one.taken = start.A.detach(), start.B.detach()
    update = one.scaling * (one.B.double() @ one.A.double() - start.B.double() @ start.A.double()).detach()
    expected = float((update @ C.double() @ update.T).trace())
    assert float(change(one, C).detach()) == pytest.approx(expected, rel=1e-4)


def test_output_energy_is_that_of_the_frozen_layer() -> None:
    one, x = layer(1, 4, 6), tokens(9, 6)
    expected = float((x.double() @ one.weight.double().T).square().sum(1).mean())
    assert float(output_energy(one, moment(x))) == pytest.approx(expected, rel=1e-4)


def test_reads_the_mean_share_over_layers_on_both_texts() -> None:
    groups = [group(100, 6, 4, 2, 9), group(200, 3, 5)]
    pairs = [(one, one_group.spectrum) for one_group in groups for one in one_group.layers]
    reading = ForgettingMeter(groups).read()
    for side in ("penalty", "utility"):
        expected = sum(explicit_share(one, getattr(spectrum, side)) for one, spectrum in pairs) / len(pairs)
        assert reading[side] == pytest.approx(expected, rel=1e-4)
    assert reading["penalty"] != pytest.approx(reading["utility"], rel=0.05)


def test_follows_the_factors_as_they_train() -> None:
    groups = [group(100, 6, 4, 2)]
    meter = ForgettingMeter(groups)
    first = meter.read()
    with torch.no_grad():
        for one in groups[0].layers:
            one.A.mul_(-3)
    tripled = meter.read()
    assert tripled == {side: pytest.approx(9 * value, rel=1e-5) for side, value in first.items()}
    with torch.no_grad():
        for one in groups[0].layers:
            one.B.zero_()
    assert meter.read() == {"penalty": 0, "utility": 0}


def test_scaling_counts_squared() -> None:
    once, twice = (ForgettingMeter([group(100, 6, 4, scaling=s)]).read() for s in (1.0, 2.0))
    assert twice == {side: pytest.approx(4 * value, rel=1e-5) for side, value in once.items()}


def test_no_unit_of_a_layer_matters() -> None:
    """Neither the scale of its input, nor that of its weights and update together."""
    plain, other = group(100, 6, 4), group(100, 6, 4)
    spectrum = replace(other.spectrum, penalty=1e3 * other.spectrum.penalty, utility=1e-3 * other.spectrum.utility)
    one = other.layers[0]
    scaled = replace(one, B=nn.Parameter(7 * one.B.detach()), weight=7 * one.weight)
    expected = ForgettingMeter([plain]).read()
    found = ForgettingMeter([LayerGroup([scaled], spectrum)]).read()
    assert found == {side: pytest.approx(value, rel=1e-4) for side, value in expected.items()}


def test_is_plain_numbers_without_gradients() -> None:
    one = group(100, 6, 4)
    reading = ForgettingMeter([one]).read()
    assert set(map(type, reading.values())) == {float}
    assert one.layers[0].A.grad is None
