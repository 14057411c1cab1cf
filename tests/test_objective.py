from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from small import adapt, assert_near, base_model, optimizer, train

from folora.methods import method_from
from folora.objective import Objective, divergence, masked_divergence

if TYPE_CHECKING:
    from torch import Tensor

    from folora.adapter import AdaptedModel

# two rows of the task, learned from the third token on, and two of proxy text, the last of each padded
BATCH = {
    "input_ids": torch.tensor([[1, 4, 2, 9, 7, 3], [1, 8, 8, 2, 0, 0], [1, 6, 10, 5, 3, 3], [1, 2, 9, 0, 0, 0]]),
    "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0], [1] * 6, [1, 1, 1, 0, 0, 0]]),
    "labels": torch.tensor(
        [
            [-100, -100, 2, 9, 7, 3],
            [-100, -100, 8, 2, -100, -100],
            [-100, 6, 10, 5, 3, 3],
            [-100, 2, 9, -100, -100, -100],
        ]
    ),
}
TASK_ROWS = 2
LEARNED = [(row, column) for row in range(4) for column in range(1, 6) if BATCH["labels"][row, column] >= 0]


def objective(adapted: AdaptedModel, task_rows: int = TASK_ROWS, **options: Any) -> Objective:
    return Objective(method_from("m", {"kind": "lora", **options}), adapted, task_rows)


def trained(kind: str = "lora") -> AdaptedModel:
    adapted = adapt(kind)
    train(adapted, optimizer(adapted, kind, rate=0.1))
    return adapted


@torch.no_grad()
def probabilities(model: Any) -> Tensor:
    """Of the next token, (batch, length, vocabulary), float64."""
    batch = {key: BATCH[key] for key in ("input_ids", "attention_mask")}
    return torch.softmax(model(**batch).logits.double(), dim=-1)


def expected_loss(adapted: AdaptedModel, *, distil: bool, mask_target: float) -> float:
    """The formula, token by token."""
    q, p = probabilities(base_model()), probabilities(adapted.model)
    losses, masked = [], []
    for row, column in LEARNED:
        y = int(BATCH["input_ids"][row, column])
        here = q[row, column - 1].tolist(), p[row, column - 1].tolist()
        if distil and row >= TASK_ROWS:
            losses.append(sum(a * math.log(a / b) for a, b in zip(*here, strict=True)))
        else:
            losses.append(-math.log(here[1][y]))
        if row < TASK_ROWS:
            others = [[x for token, x in enumerate(side) if token != y] for side in here]
            a, b = ([x / sum(side) for x in side] for side in others)
            masked.append(sum(x * math.log(x / z) for x, z in zip(a, b, strict=True)))
    return sum(losses) / len(losses) + mask_target * sum(masked) / len(masked)


@pytest.mark.parametrize("distil", [False, True])
@pytest.mark.parametrize("mask_target", [0.0, 2.5])
@pytest.mark.parametrize("kind", ["lora", "pissa"])
def test_loss_follows_the_formula(distil: bool, mask_target: float, kind: str) -> None:
    adapted = trained(kind)
    options = {"replay": 2, "replay_loss": "distillation" if distil else "tokens", "mask_target": mask_target}
    found = objective(adapted, **options)(adapted.model, BATCH)
    assert float(found.detach()) == pytest.approx(
        expected_loss(adapted, distil=distil, mask_target=mask_target), rel=1e-4
    )


@pytest.mark.parametrize("replay", [0, 2])
def test_plain_loss_is_that_of_transformers(replay: int) -> None:
    adapted = trained()
    found = objective(adapted, replay=replay)(adapted.model, BATCH)
    torch.testing.assert_close(found, adapted.model(**BATCH).loss)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, adapted.trained) for loss in (found, adapted.model(**BATCH).loss))
    )


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4])
@pytest.mark.parametrize("distil", [False, True])
@pytest.mark.parametrize("mask_target", [0.0, 2.5])
def test_micro_batches_have_the_gradient_of_the_batch(micro_batch: int, distil: bool, mask_target: float) -> None:
    adapted = trained()
    adapted.regulariser = lambda: adapted.trained[0].square().sum()
    options = {"replay": 2, "replay_loss": "distillation" if distil else "tokens", "mask_target": mask_target}
    whole = objective(adapted, **options)(adapted.model, BATCH)
    method = method_from("m", {"kind": "lora", **options})
    parts = list(Objective(method, adapted, TASK_ROWS, micro_batch).parts(adapted.model, BATCH))
    assert len(parts) == math.ceil(4 / micro_batch)
    gradients = torch.autograd.grad(whole, adapted.trained)
    summed = [torch.autograd.grad(part, adapted.trained, allow_unused=True) for part in parts]
    for i, expected in enumerate(gradients):
        assert_near(sum(part[i] for part in summed), expected)
    torch.testing.assert_close(sum(part.detach() for part in parts), whole.detach())


@pytest.mark.parametrize("kind", ["lora", "folora", "dora", "full"])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_activations_made_twice_give_the_same_gradient(kind: str, micro_batch: int | None) -> None:
    adapted = trained(kind)
    adapted.model.train()
    method = method_from("m", {"kind": "lora", "replay": 2, "replay_loss": "distillation", "mask_target": 2.5})
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            adapted.model.activation_checkpointing_enable({"use_reentrant": False})
        adapted.model.zero_grad()
        for part in Objective(method, adapted, TASK_ROWS, micro_batch).parts(adapted.model, BATCH):
            part.backward()
        gradients.append([parameter.grad for parameter in adapted.trained])
    for found, expected in zip(*gradients, strict=True):
        assert_near(found, expected, 1e-6)


def test_distillation_waits_for_replay() -> None:
    adapted = trained()
    plain, found = (objective(adapted, replay_loss=loss)(adapted.model, BATCH) for loss in ("tokens", "distillation"))
    assert torch.equal(found, plain)


def test_regulariser_joins_the_loss() -> None:
    adapted = trained()
    plain = objective(adapted)(adapted.model, BATCH)
    adapted.regulariser = lambda: adapted.trained[0].square().sum()
    found = objective(adapted)(adapted.model, BATCH)
    torch.testing.assert_close(found - plain, adapted.trained[0].square().sum())


@pytest.mark.parametrize("kind", ["lora", "pissa", "oplora", "full"])
def test_distillation_pulls_nowhere_at_the_base_and_back_to_it_elsewhere(kind: str) -> None:
    adapted = adapt(kind)

    def pull(loss: str) -> float:
        of_proxy = objective(adapted, task_rows=0, replay=4, replay_loss=loss)(adapted.model, BATCH)
        return float(torch.cat([g.flatten() for g in torch.autograd.grad(of_proxy, adapted.trained)]).norm())

    assert pull("distillation") < 1e-4 * pull("tokens")
    train(adapted, optimizer(adapted, kind, rate=0.1))
    assert pull("distillation") > 1e-2 * pull("tokens")


def logits(seed: int) -> Tensor:
    return 3 * torch.randn(5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TARGETS = torch.tensor([0, 6, 3, 3, 1])


def masked(base: Tensor, adapted: Tensor) -> Tensor:
    return masked_divergence(base.log_softmax(-1), adapted.log_softmax(-1), TARGETS)


def test_masked_divergence_is_that_of_the_other_tokens() -> None:
    base, adapted = logits(0), logits(1)
    keep = torch.ones(5, 7).scatter(1, TARGETS[:, None], 0).bool()
    q, p = (side[keep].reshape(5, 6).log_softmax(-1) for side in (base, adapted))
    expected = torch.nn.functional.kl_div(p, q, reduction="none", log_target=True).sum(1)
    assert_near(masked(base, adapted), expected, 1e-12)
    assert expected.min() > 0.1


def test_masked_divergence_does_not_see_the_target() -> None:
    base, adapted = logits(0), logits(1)
    for size in (-30.0, 5.0, 30.0):
        raised = adapted.scatter_add(1, TARGETS[:, None], torch.full((5, 1), size, dtype=torch.float64))
        assert_near(masked(base, raised), masked(base, adapted), 1e-9)
        assert_near(masked(raised, base), masked(adapted, base), 1e-9)
        assert_near(masked(base, base.scatter(1, TARGETS[:, None], size)), torch.zeros(5), size=1.0)


def test_masked_divergence_leaves_the_gradient_of_the_target_alone() -> None:
    base, adapted = logits(0), logits(1).requires_grad_()
    masked(base, adapted).sum().backward()
    assert_near(adapted.grad.gather(1, TARGETS[:, None]), torch.zeros(5, 1), size=1.0)
    assert adapted.grad.abs().max() > 0.1
    assert torch.isfinite(adapted.grad).all()


def test_divergence_is_kl_of_base_to_adapted() -> None:
    q, p = (logits(seed).log_softmax(-1) for seed in (0, 1))
    expected = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=side) for side in (q, p)))
    assert_near(divergence(q, p), expected, 1e-12)
    assert divergence(q, q).abs().max() == 0
