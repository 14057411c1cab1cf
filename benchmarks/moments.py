"""Second moments of all layer inputs: against PEFT's CorDA, the bare forward pass, and the least work."""

from __future__ import annotations

import warnings
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from bench import Row, alternate, faster, main, peak_memory, within
from models import sized, tokens
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import calib_cov_distribution

from folora.layers import adapted_layers, input_groups
from folora.moments import Moments, collect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor


def rows(size: str, repeats: int) -> Iterator[Row]:
    """Time both passes and the bare forward pass on the same tokens."""
    model = sized(size)
    input_ids = tokens(model, 4, 256 if size == "full" else 32)
    leaders = leaders_of(model, input_ids)
    check_equal(ours(model, input_ids[:1]), theirs(model, input_ids[:1]))
    found, peer, bare, row_by_row, least = alternate(
        repeats,
        partial(ours, model, input_ids),
        partial(theirs, model, input_ids),
        partial(forward, model, input_ids),
        partial(forward_rows, model, input_ids),
        partial(products, [layer.in_features for layer in leaders.values()], input_ids.numel()),
    )
    work = f"{input_ids.numel():,} tokens, {type(model).__name__} of {model.num_parameters() / 1e6:.0f} M parameters"
    corda = "PEFT's covariance pass for CorDA"
    yield faster("moments of all layers, whole pass", corda, work, found, peer, 2.2)
    over, peer_over = ([one - median(base) for one in times] for times, base in ((found, bare), (peer, row_by_row)))
    yield faster("the same, over the bare forward pass", corda, work, over, peer_over, 5)
    limit = [one + half / 2 for one, half in zip(bare, least, strict=True)]
    yield within("the same", "forward pass + half of every product x xᵀ", work, found, limit, 1.3)
    memory, peer_memory = ([peak_memory(partial(prepare, one, size))] for one in (ours, theirs))
    note = "sums in float64 against float32"
    row = faster("the same, memory beyond the model", corda, work, memory, peer_memory, 2, note)
    row.unit = "bytes"
    yield row


def prepare(work: Callable[..., Any], size: str) -> Callable[[], Any]:
    """A pass on a model of its own, after a forward pass whose activations the passes have alike."""
    model = sized(size)
    input_ids = tokens(model, 4, 256 if size == "full" else 32)
    forward(model, input_ids)
    return partial(work, model, input_ids)


def leaders_of(model: Any, input_ids: Tensor) -> dict[str, torch.nn.Linear]:
    """One layer of each distinct layer input."""
    layers = adapted_layers(model, "all-linear")
    return {leader: layers[leader] for leader in input_groups(model, layers, input_ids[:1, :2])}


@torch.no_grad()
def ours(model: Any, input_ids: Tensor) -> Moments:
    """The covariance stage's pass over one batch."""
    with collect(leaders_of(model, input_ids)) as collector:
        collector.select(torch.ones_like(input_ids, dtype=torch.bool))
        model.base_model(input_ids=input_ids, use_cache=False)
    return collector.moments


def theirs(model: Any, input_ids: Tensor) -> dict[str, Tensor]:
    """PEFT's pass, which takes one row a call."""
    targets = list(adapted_layers(model, "all-linear"))
    with warnings.catch_warnings():  # of the start, which is not made here
        warnings.simplefilter("ignore")
        config = LoraConfig(target_modules=targets, corda_config=CordaConfig(corda_method="kpm"))

    calib_cov_distribution(model, config, partial(forward_rows, model, input_ids), None, None)
    modules = dict(model.named_modules())
    return {name: modules[name].covariance_matrix for name in targets}


@torch.no_grad()
def forward(model: Any, input_ids: Tensor) -> None:
    """The same tokens, and nothing else."""
    model.base_model(input_ids=input_ids, use_cache=False)


@torch.no_grad()
def forward_rows(model: Any, input_ids: Tensor) -> None:
    """Likewise, a row at a time."""
    for row in input_ids:
        model.base_model(input_ids=row[None], use_cache=False)


def products(widths: list[int], count: int) -> None:
    """X xᵀ of so many tokens for every layer input."""
    for width in widths:
        x = torch.ones(count, width)
        x.mT @ x


def check_equal(moments: Moments, covariances: dict[str, Tensor]) -> None:
    """See that both found the same of one row, up to PEFT's division by its signed maximum."""
    for name in moments.sums:
        mean = moments.mean(name)
        both = torch.stack([(mean / mean.norm()).float().flatten(), covariances[name].flatten()])
        similarity = torch.nn.functional.cosine_similarity(both[0], both[1], dim=0)
        assert similarity > 1 - 1e-5, f"{name}: {similarity}"


if __name__ == "__main__":
    main(rows)
