"""Methods that differ from LoRA in their start, each against the equation of its paper, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import scipy.linalg
import torch
from small import (
    PROXY,
    RANK,
    SCALING,
    TASK,
    adapt,
    assert_near,
    base_model,
    context,
    eigh,
    moment,
    optimizer,
    pairs,
    product,
    ridged,
    seen_change,
    svd,
    train,
)
from torch import Tensor

from folora.errors import FoLoRAError
from folora.methods import method_from

FIRST, LAST = slice(0, RANK), slice(-RANK, None)


@pytest.mark.parametrize(("kind", "chosen"), [("pissa", FIRST), ("milora", LAST)])
def test_pissa_and_milora_start_at_the_first_and_the_last_singular_triplets(kind: str, chosen: slice) -> None:
    for layer, _ in pairs(adapt(kind)):
        U, S, V = svd(layer.weight)
        assert_near(product(layer), U[:, chosen] * S[chosen] @ V[:, chosen].mT, 1e-6, size=S[0])
        for energies in (layer.A.square().sum(1), layer.B.square().sum(0)):  # an even share to each side
            assert_near(energies, S[chosen] / SCALING, 1e-6, size=S[0])


def test_olora_starts_at_the_qr_decomposition() -> None:
    for layer, _ in pairs(adapt("olora")):
        Q, R = map(torch.from_numpy, scipy.linalg.qr(layer.weight.double().numpy(), mode="economic"))
        signs = (Q[:, FIRST] * layer.B.detach().double()).sum(0).sign()
        determined = R[FIRST].norm(dim=1) > 1e-6  # beyond the rank of W the columns of Q are free
        assert_near(layer.B[:, determined] * signs[determined], Q[:, FIRST][:, determined])
        assert_near(layer.A * signs[:, None], R[FIRST])
        assert_near(layer.B.mT @ layer.B, torch.eye(RANK))


@pytest.mark.parametrize(("mode", "text", "chosen"), [("knowledge", PROXY, LAST), ("instruction", TASK, FIRST)])
def test_corda_splits_w_as_seen_through_the_moment(mode: str, text: dict[str, Tensor], chosen: slice) -> None:
    for layer, leader in pairs(adapt("corda", mode=mode)):
        W, C = layer.weight.double(), ridged(text[leader])
        U, S, V = svd(W @ C)
        right = V.mT @ torch.linalg.inv(C)
        assert_near(U * S @ right, W, 1e-9)  # all triplets together are W
        assert_near(product(layer), U[:, chosen] * S[chosen] @ right[chosen], size=W.abs().max())
        assert_near(layer.B.square().sum(0), S[chosen] / SCALING, size=S[0])
        assert_near(layer.A.norm(dim=1), (S[chosen] / SCALING).sqrt() * right[chosen].norm(dim=1), 1e-3)


@pytest.mark.parametrize(("mode", "kind"), [("knowledge", "milora"), ("instruction", "pissa")])
def test_corda_on_white_inputs_is_milora_or_pissa(mode: str, kind: str) -> None:
    for (found, _), (expected, _) in zip(pairs(adapt("corda", mode=mode, white=True)), pairs(adapt(kind)), strict=True):
        assert_near(product(found), product(expected), size=expected.weight.abs().max())


def test_eva_starts_at_the_leading_singular_vectors_of_the_stacked_task_inputs() -> None:
    for layer, leader in pairs(adapt("eva")):
        leading = svd(TASK[leader])[2][:, FIRST].mT
        signs = (layer.A.detach().double() * leading).sum(1).sign()
        assert_near(layer.A * signs[:, None], leading)
        assert not layer.B.any()


def quiet(leader: str) -> Tensor:
    """The projector onto the r directions that the proxy text excites least."""
    vectors = eigh(moment(PROXY[leader]))[1][:, FIRST]
    return vectors @ vectors.mT


@pytest.mark.parametrize("freeze_a", [False, True])
def test_lora_null_starts_at_w_within_the_quietest_directions(freeze_a: bool) -> None:
    for layer, leader in pairs(adapt("lora-null", freeze_a=freeze_a)):
        N, W = quiet(leader), layer.weight.double()
        assert_near(layer.A.double() @ N, layer.A)
        assert_near(product(layer), W @ N)
        for energies in (layer.A.square().sum(1), layer.B.square().sum(0)):
            assert_near(energies, svd(W @ N)[1][FIRST] / SCALING)
        assert layer.A.requires_grad is not freeze_a


def test_lora_null_with_a_frozen_changes_w_within_the_quietest_directions_only() -> None:
    adapted = adapt("lora-null", freeze_a=True)
    before = [layer.A.detach().clone() for layer in adapted.layers]
    train(adapted, optimizer(adapted, "lora-null", freeze_a=True, weight_decay=0.5))
    for (layer, leader), A in zip(pairs(adapted), before, strict=True):
        assert torch.equal(layer.A, A)
        assert layer.factors()[1].shape[0] == RANK
        assert_near(seen_change(adapted, layer) @ quiet(leader), seen_change(adapted, layer), size=1e-2)


def test_lora_null_with_a_trained_leaves_them() -> None:
    adapted = adapt("lora-null")
    train(adapted, optimizer(adapted, "lora-null"))
    for layer, leader in pairs(adapted):
        moved = seen_change(adapted, layer)
        assert (moved @ quiet(leader) - moved).norm() > 0.1 * moved.norm()
        assert layer.factors()[1].shape[0] == 2 * RANK


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_sc_lora_maximises_the_contrast_of_outputs(beta: float) -> None:
    """By Ky Fan the maximum of tr(Qᵀ M Q) over orthonormal Q is the sum of the r greatest eigenvalues of M."""
    for layer, leader in pairs(adapt("sc-lora", beta=beta)):
        W, Q = layer.weight.double(), SCALING * layer.B.detach().double()
        task, kept = (moment(x[leader] @ W.mT) for x in (TASK, PROXY))
        M = (1 - beta) * task / task.trace() - beta * kept / kept.trace()
        assert_near(Q.mT @ Q, torch.eye(RANK))
        assert float((Q.mT @ M @ Q).trace()) == pytest.approx(float(eigh(M)[0][LAST].sum()), abs=1e-6)
        assert_near(layer.A, Q.mT @ W, size=W.abs().max())


@pytest.mark.parametrize(
    ("kind", "rank"),
    [("pissa", 5), ("olora", 5), ("milora", 5), ("corda", 5), ("lora-null", 5), ("sc-lora", 5), ("osf", 4)],
)
def test_a_rank_beyond_a_layer_s_singular_values_is_named(kind: str, rank: int) -> None:
    """The smallest side of a layer is 4; LoRA itself may have more rows than that."""
    wide = replace(context(), rank=rank)
    with pytest.raises(FoLoRAError, match=rf"adapter\.rank: {rank} is too much for this method, layer .* has 4"):
        method_from(kind, {"kind": kind}).adapt(base_model(), wide)
    assert method_from("lora", {"kind": "lora"}).adapt(base_model(), wide).layers[0].A.shape[0] == rank


@pytest.mark.parametrize("options", [{"kind": "eva"}, {"kind": "folora", "start": "spectral"}])
def test_a_rank_beyond_the_directions_of_a_layer_s_input_is_named(options: dict[str, str]) -> None:
    rank = max(layer.in_features for layer in base_model().modules() if isinstance(layer, torch.nn.Linear)) + 1
    with pytest.raises(FoLoRAError, match=rf"adapter\.rank: {rank} is too much for this method, the input of layer"):
        method_from(options["kind"], options).adapt(base_model(), replace(context(), rank=rank))
