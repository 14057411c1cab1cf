from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import adapt, assert_near, base_model, context, optimizer, push, seen_change
from torch import Tensor, nn

from folora.methods.ewc_lora import fisher_information

WEIGHT = [[0.5, -2.0, 0.1, 3.0], [1.5, 0.3, -1.0, 0.0], [-0.7, 0.2, 0.9, -4.0], [0.0, 1.0, -0.2, 0.4]]


class SoftmaxRegression(nn.Module):
    """p(next | token) = softmax(W e_token), with the mean loss over a sequence, as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor(WEIGHT))

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.linear(nn.functional.one_hot(input_ids, 4).float())
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:]))


def test_fisher_information_is_the_sum_over_samples_of_squared_gradients() -> None:
    rows = [[0, 1, 3, 3, 2], [0, 2], [0, 3, 1]]
    odds = np.exp(np.array(WEIGHT))
    expected = np.zeros((4, 4))
    for row in rows:
        gradient = np.zeros((4, 4))
        for token, following in pairwise(row):
            gradient[:, token] += np.eye(4)[following] - odds[:, token] / odds[:, token].sum()
        expected += gradient**2
    found = fisher_information(SoftmaxRegression(), ["linear"], rows)
    assert_near(found["linear"], torch.from_numpy(expected / 7))  # seven predicted tokens


def test_a_change_of_the_weights_is_priced_by_their_fisher_information() -> None:
    adapted = adapt("ewc-lora", strength=3.0, sequences=4)
    fisher = fisher_information(base_model(), [layer.name for layer in adapted.layers], context().proxy[:4])
    assert adapted.regulariser().item() == 0
    push(optimizer(adapted, "ewc-lora"), adapted.trained)
    expected = sum(float((fisher[layer.name] * seen_change(adapted, layer) ** 2).sum()) for layer in adapted.layers)
    assert adapted.regulariser().item() == pytest.approx(3 / 2 * expected, rel=1e-4)


@pytest.mark.parametrize("side", ["A", "B"])
def test_gradient_of_the_price_is_that_of_finite_differences(side: str) -> None:
    """The price is quadratic in A and in B, where a central difference is exact."""
    adapted = adapt("ewc-lora")
    push(optimizer(adapted, "ewc-lora"), adapted.trained)
    adapted.model.double()
    factors = [getattr(layer, side) for layer in adapted.layers]
    directions = [torch.randn(p.shape, generator=torch.Generator().manual_seed(5)) for p in factors]

    def price(step: float) -> float:
        with torch.no_grad():
            for p, direction in zip(factors, directions, strict=True):
                p.add_(step * direction)
        return adapted.regulariser().item()

    slopes = torch.autograd.grad(adapted.regulariser(), factors)
    slope = sum(float((found * direction).sum()) for found, direction in zip(slopes, directions, strict=True))
    assert (price(1) - price(-2)) / 2 == pytest.approx(slope, rel=1e-6)
    assert abs(slope) > 1e-3
