"""The simulated runner, on graphs whose times are known, and the graph that it simulates."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulate import Job, critical_path, enough, graph_of, jobs_of, makespan, outlook, planned_costs, schedule
from transformers import LlamaConfig

from folora.commands.shape import empty_model, shape_of
from folora.commands.stage_plans import plan_stages
from folora.errors import FoLoRAError
from folora.foundation import LOADING
from folora.params import PretrainedFoundation

if TYPE_CHECKING:
    from pathlib import Path

    from folora.params import Params

DIAMOND = {
    "start": Job(2),
    "short": Job(1, ("start",)),
    "long": Job(5, ("start",)),
    "end": Job(3, ("short", "long")),
}
# Graham's: with a worker more than fits, the first job in order is not the one that matters
UNLUCKY = {"a": Job(1), "b": Job(1), "c": Job(1), "d": Job(1), "last": Job(2)}


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, Job]:
    """Jobs that wait for some of those before them."""
    jobs: dict[str, Job] = {}
    for number in range(draw(st.integers(1, 12))):
        after = draw(st.lists(st.sampled_from(sorted(jobs)), unique=True, max_size=3)) if jobs else []
        jobs[f"{number:02}"] = Job(draw(st.integers(1, 20)), tuple(after))
    return jobs


def best(jobs: dict[str, Job], workers: int) -> float:
    """The makespan of the best order in which jobs can be taken."""
    orders = (dict(order) for order in itertools.permutations(jobs.items()))
    return min(makespan(order, workers) for order in orders)


@pytest.mark.parametrize(("workers", "expected"), [(1, 11), (2, 10), (9, 10)])
def test_a_diamond(workers: int, expected: float) -> None:
    assert makespan(DIAMOND, workers) == expected
    assert critical_path(DIAMOND) == ["start", "long", "end"]
    assert enough(DIAMOND) == 2


def test_an_order_that_is_not_the_best() -> None:
    assert makespan(UNLUCKY, 2) == 4
    assert best(UNLUCKY, 2) == 3
    assert schedule(UNLUCKY, 2) == {"a": 0, "b": 0, "c": 1, "d": 1, "last": 2}


def test_what_is_said_of_a_number_of_workers() -> None:
    with_overhead = {name: Job(job.seconds + 1, job.after) for name, job in DIAMOND.items()}
    found = outlook(with_overhead, 2, overhead=1)
    assert (found.makespan, found.bound) == (13, 13)
    assert found.efficiency == pytest.approx(11 / 26)


@given(graphs(), st.integers(1, 5))
def test_every_schedule_is_possible_and_within_the_bounds(jobs: dict[str, Job], workers: int) -> None:
    starts = schedule(jobs, workers)
    ends = {name: starts[name] + job.seconds for name, job in jobs.items()}
    assert all(starts[name] >= ends[before] for name, job in jobs.items() for before in job.after)
    for now in starts.values():
        assert sum(starts[name] <= now < ends[name] for name in jobs) <= workers
    total = sum(job.seconds for job in jobs.values())
    longest = sum(jobs[name].seconds for name in critical_path(jobs))
    taken = makespan(jobs, workers)
    assert max(longest, total / workers) <= taken + 1e-9
    assert taken <= total / workers + (1 - 1 / workers) * longest + 1e-9
    assert makespan(jobs, 1) == total
    assert makespan(jobs, len(jobs)) == longest


def test_stages_take_what_is_planned(tiny_params: Params, tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    config.save_pretrained(tmp_path)
    foundation = {"source": "pretrained", "model": "a/b", "revision": None, "loading": LOADING}
    params = tiny_params.model_copy(update={"foundation": PretrainedFoundation.model_validate(foundation)})
    stages = graph_of("tiny")
    jobs = jobs_of(stages, planned_costs(stages, params, tmp_path, single=1e9, double=1e6), overhead=7)
    shape, _ = shape_of(empty_model(params, tmp_path), params)
    for plan in plan_stages(params, shape, 1e9, 1e6):
        taken = [job.seconds - 7 for name, job in jobs.items() if name.startswith(plan.stage)]
        assert len(taken) == plan.jobs
        assert sum(taken) == pytest.approx(plan.seconds)
    assert jobs["foundation"].seconds == jobs["report"].seconds == 7


def test_stages_take_what_they_cost_or_the_median_of_their_kind() -> None:
    stages = graph_of("tiny")
    costs = {output: 10.0 for stage in stages.values() for output in stage.outputs}
    del costs["artifacts/runs/lora/lora-3e-3-s0"]
    costs["artifacts/runs/folora-replay/folora-replay-1e-2-s0"] = 30.0
    jobs = jobs_of(stages, costs, overhead=7)
    assert jobs["train@lora-3e-3-s0"].seconds == 37
    assert jobs["foundation"] == Job(17)
    assert jobs["heldout"].after == ("foundation",)
    assert critical_path(jobs)[0] == "foundation"
    assert critical_path(jobs)[-1] == "report"
    with pytest.raises(FoLoRAError, match=r"^no cost of covariance-proxy, .*, train: give a ledger"):
        jobs_of(stages, {"artifacts/foundation": 1.0}, overhead=0)
    with pytest.raises(FoLoRAError, match=r"nothing\.yaml: there is no such preset$"):
        graph_of("nothing")
