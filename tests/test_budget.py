from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import pytest

from folora.adapter import load_checkpoint
from folora.budget import keep_inside
from folora.divergence import HeldOutText
from folora.errors import FoLoRAError
from folora.evaluate import checkpoints_of
from folora.params import Params
from folora.storage import read_table
from folora.train import TrainInputs, train_run

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Pipeline

RUN = "lora-3e-3-s0"


class Scaled:
    """A change of size one whose KL is a power of its size."""

    def __init__(self, power: float) -> None:
        self.size, self.power = 1.0, power

    def shrink(self, factor: float) -> None:
        self.size *= factor

    def kl(self) -> float:
        return self.size**self.power


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("budget", [0.9, 0.5, 1e-3])
def test_ends_inside_and_not_far_from_the_budget(power: float, budget: float) -> None:
    model: Any = Scaled(power)
    assert keep_inside(model, model.kl, budget) == model.kl()
    # a KL that grows faster than the square is overshot, by no more than one step
    assert 0.9 * min(1.0, budget ** (power / 2 - 1)) * budget < model.kl() <= budget


def test_inside_already_nothing_changes() -> None:
    model: Any = Scaled(2.0)
    assert keep_inside(model, model.kl, 1.0) == 1.0
    assert model.size == 1.0


def test_a_budget_out_of_reach_is_an_error() -> None:
    model: Any = Scaled(0.0)
    with pytest.raises(FoLoRAError, match=r"kl_budget: 0\.5 nats per token is not reached"):
        keep_inside(model, model.kl, 0.5)


@pytest.mark.usefixtures("in_tmp")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_runs_end_inside_their_budgets(seed: int, pipeline: Pipeline, tmp_path: Path) -> None:
    """What the evaluation measures on the held-out text lies inside, at every checkpoint."""
    values = pipeline.values()
    bare, padding = pipeline.base.load_model(), pipeline.base.load_tokenizer().pad_token_id
    text = HeldOutText(bare, read_table(pipeline.heldout)[0]["token_ids"].to_pylist(), 8, padding)
    kls: dict[float | None, list[float]] = {}
    for budget in (3e-5, 6e-5, 1e-4, 2e-4, 4e-4, None):
        methods = values["methods"] | {"lora": {"kind": "folora", "kl_budget": budget}}
        run = values["runs"][RUN] | {"seed": seed, "learning_rate": 0.02}
        params = Params.model_validate(values | {"methods": methods, "runs": values["runs"] | {RUN: run}})
        inputs = TrainInputs(pipeline.task, pipeline.proxy, pipeline.heldout, pipeline.spectra)
        folder = tmp_path / str(budget)
        train_run(params, RUN, pipeline.base, inputs, folder)
        model: Any = bare
        kls[budget] = []
        for checkpoint in checkpoints_of(folder):
            model = load_checkpoint(model, checkpoint)
            kls[budget].append(text.measure(model).kl)
        bare = model.unload()
        history = read_table(folder / "history.parquet")[0].to_pylist()
        assert budget is None or max(row["kl"] for row in history) <= budget
    assert all(max(found) <= budget * (1 + 1e-4) for budget, found in kls.items() if budget is not None)
    assert kls[None][-1] > 4e-4  # without a budget it leaves all of them


def test_a_model_that_diverged_is_not_drawn_back() -> None:
    adapted: Any = None  # not touched
    with pytest.raises(FoLoRAError, match="the training diverged, its KL is nan: lower the run's learning_rate"):
        keep_inside(adapted, lambda: math.nan, 0.1)


@pytest.mark.usefixtures("in_tmp")
@pytest.mark.parametrize("budget", [1e-4, 10.0])
def test_a_run_says_how_its_budget_ended(
    budget: float, pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = pipeline.values()
    methods = values["methods"] | {"lora": {"kind": "lora", "kl_budget": budget}}
    run = values["runs"][RUN] | {"learning_rate": 0.02}
    params = Params.model_validate(values | {"methods": methods, "runs": values["runs"] | {RUN: run}})
    inputs = TrainInputs(pipeline.task, pipeline.proxy, pipeline.heldout, pipeline.spectra)
    train_run(params, RUN, pipeline.base, inputs, tmp_path / "run")
    kl = read_table(tmp_path / "run" / "history.parquet")[0]["kl"].to_pylist()[-1]
    rows = read_table(pipeline.heldout)[0]["token_ids"].to_pylist()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("kl_budget")]
    ended = f"kl_budget: {budget:g} nats per token; KL at the end {kl:g}"
    assert line.startswith(f"{ended}, on {sum(map(len, rows)) - len(rows)} tokens of {len(rows)} held-out rows; ")
    assert re.search(f"; times that the change was scaled back: {r'[1-9][0-9]*' if budget < 1 else 0}$", line)


REFUSED = ["pissa", "olora", "milora", "corda", "lora-null", "sc-lora", "dora", "osf", "full"]  # as the guide says


@pytest.mark.usefixtures("in_tmp")
@pytest.mark.parametrize("kind", REFUSED)
def test_a_change_that_cannot_be_scaled_refuses_a_budget(kind: str, pipeline: Pipeline, tmp_path: Path) -> None:
    values = pipeline.values()
    methods = values["methods"] | {"lora": {"kind": kind, "kl_budget": 0.1}}
    params = Params.model_validate(values | {"methods": methods})
    inputs = TrainInputs(pipeline.task, pipeline.proxy, pipeline.heldout, pipeline.spectra)
    with pytest.raises(FoLoRAError, match=rf"methods\.lora\.kl_budget: the change of {kind} cannot be scaled back"):
        train_run(params, RUN, pipeline.base, inputs, tmp_path / "run")
    assert not (tmp_path / "run").exists()
