from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from folora.schedule import batch_rows, checkpoint_steps, equal_token_steps

PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)
plans = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31 - 1),
        "steps": st.integers(1, 12),
        "task_rows": st.integers(1, 9),
        "batch_size": st.integers(1, 7),
        "proxy_rows": st.integers(1, 9),
        "replay": st.integers(0, 4),
    }
)


def streams(plan: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The task rows and the proxy rows, each in their order over all batches."""
    order = batch_rows(**plan)
    width = plan["batch_size"] + plan["replay"]
    assert len(order) == plan["steps"] * width
    task = [row for i, row in enumerate(order) if i % width < plan["batch_size"]]
    return task, [row - plan["task_rows"] for i, row in enumerate(order) if i % width >= plan["batch_size"]]


@PROPERTY
@given(plans)
def test_every_epoch_holds_each_row_once(plan: dict[str, Any]) -> None:
    for stream, rows in zip(streams(plan), (plan["task_rows"], plan["proxy_rows"]), strict=True):
        for start in range(0, len(stream), rows):
            epoch = stream[start : start + rows]
            assert set(epoch) <= set(range(rows))
            assert len(set(epoch)) == len(epoch)


@PROPERTY
@given(plans, st.integers(1, 12))
def test_more_steps_continue_the_same_batches(plan: dict[str, Any], more: int) -> None:
    shorter = batch_rows(**plan)
    longer = batch_rows(**plan | {"steps": plan["steps"] + more})
    assert longer[: len(shorter)] == shorter


@PROPERTY
@given(plans, st.integers(0, 4))
def test_replay_leaves_the_task_rows_alone(plan: dict[str, Any], replay: int) -> None:
    assert streams(plan | {"replay": replay})[0] == streams(plan)[0]


def test_seeds_epochs_and_sources_are_shuffled_apart() -> None:
    plan = {"steps": 2, "task_rows": 30, "batch_size": 30, "proxy_rows": 30, "replay": 30}
    orders = [
        stream[start : start + 30] for seed in (0, 1) for stream in streams(plan | {"seed": seed}) for start in (0, 30)
    ]
    assert len(set(map(tuple, orders))) == 8
    assert all(type(row) is int for row in orders[0])


def test_the_order_is_pinned() -> None:
    """A changed order would change every result without a changed parameter."""
    found = batch_rows(seed=3, steps=2, task_rows=5, batch_size=3, proxy_rows=4, replay=1)
    assert found == [4, 2, 1, 5, 3, 0, 3, 6]


@PROPERTY
@given(
    st.integers(1, 500),
    st.lists(st.integers(1, 60), min_size=1, max_size=9),
    st.lists(st.integers(2, 60), min_size=1, max_size=9),
    st.integers(1, 64),
    st.integers(0, 64),
)
def test_equal_token_steps_see_the_tokens_of_training_without_replay(
    steps: int, task: list[int], proxy: list[int], batch_size: int, replay: int
) -> None:
    found = equal_token_steps(steps, task, proxy, batch_size=batch_size, replay=replay)
    alone = batch_size * sum(task) / len(task)
    together = alone + replay * sum(proxy) / len(proxy)
    assert 1 <= found <= steps
    assert found == 1 or abs(found * together - steps * alone) <= 0.501 * together
    assert replay or found == steps


def test_as_many_proxy_tokens_as_task_tokens_halve_the_steps() -> None:
    assert equal_token_steps(300, [8, 12], [5, 5], batch_size=4, replay=8) == 150


@given(st.integers(1, 500), st.integers(1, 20))
@PROPERTY
def test_checkpoints_are_spread_evenly_and_end_at_the_last_step(steps: int, checkpoints: int) -> None:
    due = sorted(checkpoint_steps(steps, checkpoints))
    assert due[-1] == steps
    assert len(due) <= checkpoints
    gaps = [after - before for before, after in zip([0, *due], due, strict=False)]
    if checkpoints <= steps:
        assert max(gaps) - min(gaps) <= 1
