"""What a killed stage leaves in its scratch folder, taken up again: equal bytes, and none of the work done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

import folora.counted_text
import folora.evaluate
import folora.proxy
import folora.spectrum
from folora.covariance import compute_covariance
from folora.errors import FoLoRAError
from folora.evaluate import evaluate_method
from folora.moments import WORKSPACE
from folora.params import Params
from folora.proxy import generate_proxy
from folora.recorder import Recorder
from folora.records import read_journal
from folora.resume import PARAMETERS_FILE, SEAL_FILE, last_state
from folora.scratch import INTERVAL, SCRATCH, kept, save_seconds, scratch
from folora.spectrum import compute_spectrum
from folora.storage import identity_of, read_json
from folora.train import TrainInputs, train_run

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Pipeline, SaveParams

pytestmark = pytest.mark.usefixtures("in_tmp")

LORA = "lora-3e-3-s0"
BUDGET = WORKSPACE + 65_000  # bytes, for three of the eight layer inputs
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "weight_decay": 0.1},
    "lora-budget": {"kind": "lora", "kl_budget": 1e-4},
    "dora": {"kind": "dora"},
    "pissa": {"kind": "pissa"},
    "ewc-lora": {"kind": "ewc-lora"},
    "osf": {"kind": "osf"},
    "full": {"kind": "full"},
    "adam-nscl": {"kind": "adam-nscl"},
    "folora-replay": {"kind": "folora", "replay": 4},
    "folora-gate-b-full": {"kind": "folora", "gate_b": "full", "refresh_b": 2},
    "folora-gate-b-diag": {"kind": "folora", "gate_b": "diag", "refresh_b": 4},
    "folora-refreshed": {"kind": "folora", "refresh_utility": 2},
    "folora-refreshed-filter": {"kind": "folora", "refresh_utility": 4, "form": "filter"},
}


class Killed(BaseException):
    """Stands in for the end of a process: no handler of the project catches it."""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def killed_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int) -> list[int]:
    """Let a function be called so often, then end the process; returns the count of its calls, to look at."""
    original = getattr(owner, name)
    count = [0]

    def counted(*arguments: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] > calls:
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)
    return count


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save unfinished work at every opportunity."""
    monkeypatch.setenv(INTERVAL, "0")


def train(pipeline: Pipeline, method: dict[str, Any], output: Path, **values: Any) -> None:
    values = pipeline.values() | values
    values["methods"] = values["methods"] | {"lora": method}
    values["train"] = values["train"] | {"steps": 9}
    inputs = TrainInputs(pipeline.task, pipeline.proxy, pipeline.heldout, pipeline.spectra)
    train_run(Params.model_validate(values), LORA, pipeline.base, inputs, output)


def steps_taken(monkeypatch: pytest.MonkeyPatch, limit: int = 1000) -> list[int]:
    """Ends the process when it begins a step after so many; returns the count of steps begun."""
    return killed_after(monkeypatch, Recorder, "on_step_begin", limit)


# training
@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_training_goes_on_and_gets_the_same_bytes(
    pipeline: Pipeline,
    method: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The Trainer logs at steps 1, 3, 6 and 9; this one dies in its eighth step, and in its seventh the next time."""

    def said() -> list[str]:
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("kl_budget")]

    train(pipeline, METHODS[method], tmp_path / "undisturbed")
    undisturbed = said()
    for limit, expected in ((7, 8), (0, 1)):
        with monkeypatch.context() as patched:
            steps = steps_taken(patched, limit)
            with pytest.raises(Killed):
                train(pipeline, METHODS[method], tmp_path / "run")
            assert steps == [expected]
    with monkeypatch.context() as patched:
        steps = steps_taken(patched)
        train(pipeline, METHODS[method], tmp_path / "run")
        assert steps == [3]
    assert said() == undisturbed  # how often it was drawn back, too
    assert contents(tmp_path / "run") == contents(tmp_path / "undisturbed")
    assert not list(SCRATCH.iterdir())
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.usefixtures("often")
def test_a_training_killed_before_anything_was_saved_begins_again(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(pipeline, METHODS["lora"], tmp_path / "undisturbed")
    with monkeypatch.context() as patched:
        steps_taken(patched, 0)
        with pytest.raises(Killed):
            train(pipeline, METHODS["lora"], tmp_path / "run")
    train(pipeline, METHODS["lora"], tmp_path / "run")
    assert contents(tmp_path / "run") == contents(tmp_path / "undisturbed")


def interrupted(pipeline: Pipeline, output: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Scratch folder of a training that has saved its states at steps 3 and 6, and died."""
    with monkeypatch.context() as patched:
        steps_taken(patched, 7)
        with pytest.raises(Killed):
            train(pipeline, METHODS["lora"], output)
    (folder,) = SCRATCH.iterdir()
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    return folder


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("victim", ["trainer_state.json", "optimizer.pt", PARAMETERS_FILE, SEAL_FILE])
def test_a_state_cut_short_is_passed_over(
    pipeline: Pipeline, victim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(pipeline, METHODS["lora"], tmp_path / "undisturbed")
    folder = interrupted(pipeline, tmp_path / "run", monkeypatch)
    damaged = folder / "checkpoint-6" / victim
    damaged.write_bytes(damaged.read_bytes()[:-9])
    steps = steps_taken(monkeypatch)
    train(pipeline, METHODS["lora"], tmp_path / "run")
    assert steps == [6]
    assert contents(tmp_path / "run") == contents(tmp_path / "undisturbed")


@pytest.mark.usefixtures("often")
def test_an_adapter_cut_short_takes_the_states_after_it_along(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints are due at steps 4 and 9 here; the state of step 3 came before the first."""
    folder = interrupted(pipeline, tmp_path / "run", monkeypatch)
    (adapter,) = (folder / "checkpoints").rglob("adapter_model.safetensors")
    adapter.write_bytes(adapter.read_bytes()[:-1])
    state = last_state(folder)
    assert state is not None
    assert state.name == "checkpoint-3"
    assert not (folder / "checkpoint-6").exists()


@pytest.mark.usefixtures("often")
def test_other_parameters_take_up_nothing(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(pipeline, tmp_path / "run", monkeypatch)
    steps = steps_taken(monkeypatch)
    train(pipeline, METHODS["lora"] | {"weight_decay": 0.2}, tmp_path / "run")
    assert steps == [9]


@pytest.mark.usefixtures("often")
def test_a_journal_has_every_reading_of_a_resumed_training_once(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(pipeline, tmp_path / "run", monkeypatch)
    train(pipeline, METHODS["lora"], tmp_path / "run")
    _, readings = read_journal(identity_of(read_json(tmp_path / "run" / "manifest.json")))
    assert [one.step for one in readings if one.key == "train/loss"] == [1, 3, 6, 9]


def test_nothing_is_saved_of_a_short_training(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps_taken(monkeypatch, 7)
    with pytest.raises(Killed):
        train(pipeline, METHODS["lora"], tmp_path / "run")
    (folder,) = SCRATCH.iterdir()
    assert not list(folder.glob("checkpoint-*"))


def test_sigterm_leaves_nothing_half_written(pipeline: Pipeline, save_params: SaveParams, tmp_path: Path) -> None:
    values = pipeline.values()
    values["train"] |= {"steps": 100_000, "checkpoints": 1}
    arguments = [
        *("train", LORA, "--params", save_params(values), "--output", tmp_path / "run", "--threads", 1),
        *("--foundation", pipeline.folder / "foundation", "--task-rows", pipeline.task, "--proxy", pipeline.proxy),
        *("--heldout", pipeline.heldout, "--spectrum", pipeline.spectra),
    ]
    command = [sys.executable, "-c", "from folora.cli import main; main()", *map(str, arguments)]
    with subprocess.Popen(command, env=os.environ | {INTERVAL: "0"}, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not list(SCRATCH.glob("*/checkpoint-*/" + SEAL_FILE)):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert not list(tmp_path.glob(".*.partial"))
    assert not (tmp_path / "run").exists()
    (folder,) = SCRATCH.iterdir()
    assert last_state(folder) is not None


# the other stages
def test_sampling_goes_on_at_the_batch_it_stopped_in(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = pipeline.params.proxy.model_copy(update={"batch_size": 5})
    generate_proxy(settings, "sampled", "0", pipeline.base, tmp_path / "undisturbed.parquet")
    with monkeypatch.context() as patched:
        killed_after(patched, folora.proxy, "sample", 2)
        with pytest.raises(Killed):
            generate_proxy(settings, "sampled", "0", pipeline.base, tmp_path / "0.parquet")
    count = killed_after(monkeypatch, folora.proxy, "sample", 1000)
    generate_proxy(settings, "sampled", "0", pipeline.base, tmp_path / "0.parquet")
    assert count == [-(-settings.sequences // 5) - 2]
    assert (tmp_path / "0.parquet").read_bytes() == (tmp_path / "undisturbed.parquet").read_bytes()
    assert not list(SCRATCH.iterdir())


@pytest.mark.usefixtures("often")
def test_moments_go_on_after_the_last_sums(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = pipeline.values()
    values["covariance"] |= {"batch_size": 3}
    params = Params.model_validate(values)
    rows = pipeline.proxy / "0.parquet"
    compute_covariance(params, pipeline.base, rows, tmp_path / "undisturbed.safetensors")
    with monkeypatch.context() as patched:
        killed_after(patched, folora.counted_text.Sums, "save_at_times", 2)
        with pytest.raises(Killed):
            compute_covariance(params, pipeline.base, rows, tmp_path / "0.safetensors")
    count = killed_after(monkeypatch, folora.counted_text.Sums, "save_at_times", 1000)
    compute_covariance(params, pipeline.base, rows, tmp_path / "0.safetensors")
    assert count == [-(-params.proxy.sequences // 3) - 2]
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "undisturbed.safetensors").read_bytes()


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("batches", [1, 32, 40])  # of 32 in each of three passes
def test_moments_within_a_budget_go_on_in_the_pass_they_stopped_in(
    batches: int, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = pipeline.values()
    values["covariance"] |= {"batch_size": 3, "memory_budget": BUDGET}
    params = Params.model_validate(values)
    rows = pipeline.proxy / "0.parquet"
    with monkeypatch.context() as patched:
        killed_after(patched, folora.counted_text.Sums, "save_at_times", batches)
        with pytest.raises(Killed):
            compute_covariance(params, pipeline.base, rows, tmp_path / "0.safetensors")
    count = killed_after(monkeypatch, folora.counted_text.Sums, "save_at_times", 1000)
    compute_covariance(params, pipeline.base, rows, tmp_path / "0.safetensors")
    assert count == [3 * -(-params.proxy.sequences // 3) - batches]
    values["covariance"] |= {"memory_budget": None}
    compute_covariance(Params.model_validate(values), pipeline.base, rows, tmp_path / "undisturbed.safetensors")
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "undisturbed.safetensors").read_bytes()


def test_spectrum_goes_on_at_the_input_it_stopped_in(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def solve() -> None:
        moments = pipeline.proxy_moments, pipeline.task_moments
        compute_spectrum(pipeline.params, "subtraction", "sampled", 0, pipeline.base, *moments, tmp_path / "x")

    with monkeypatch.context() as patched:
        killed_after(patched, folora.spectrum, "input_spectrum", 3)
        with pytest.raises(Killed):
            solve()
    damaged = next(SCRATCH.glob("*/0.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-9])
    count = killed_after(monkeypatch, folora.spectrum, "input_spectrum", 1000)
    solve()
    assert count == [8 - 3 + 1]
    assert (tmp_path / "x").read_bytes() == pipeline.spectrum.read_bytes()


def test_evaluation_goes_on_at_the_checkpoint_it_stopped_in(
    pipeline: Pipeline, runs: Path, evaluations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate() -> None:
        arguments = pipeline.base, pipeline.world, pipeline.heldout, runs / "lora", tmp_path / "lora"
        evaluate_method(pipeline.params, "lora", *arguments)

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patched:
        killed_after(patched, folora.evaluate, "load_checkpoint", 1)
        with pytest.raises(Killed):
            evaluate()
    count = killed_after(monkeypatch, folora.evaluate, "load_checkpoint", 1000)
    evaluate()
    assert count == [1]
    assert contents(tmp_path / "lora") == contents(evaluations / "lora")


# scratch
def test_conditions_name_the_folder() -> None:
    with scratch(a=1) as one, scratch(a=2) as other:
        assert one != other
    with scratch(a=1) as again:
        assert again == one
    assert not one.exists()
    torch.set_num_threads(2)
    with scratch(a=1) as threads:
        assert threads != one
    torch.set_num_threads(1)


def test_a_folder_stays_when_the_block_fails() -> None:
    def die() -> None:
        with scratch(a=1) as folder:
            kept(folder / "value.json", lambda: [1.5, None])
            raise Killed

    with pytest.raises(Killed):
        die()
    with scratch(a=1) as folder:
        assert kept(folder / "value.json", lambda: pytest.fail("made twice")) == [1.5, None]


@pytest.mark.parametrize("damage", ["", "[]", "null", '{"digest": "x"', '{"value": [2], "digest": "x"}'])
def test_a_damaged_value_is_made_again(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    path.write_text(damage)
    assert kept(path, lambda: [1]) == [1]
    assert json.loads(path.read_text())["value"] == [1]


def test_an_interval_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERVAL, "5m")
    with pytest.raises(FoLoRAError, match="FOLORA_SAVE_SECONDS: '5m' is no number of seconds"):
        save_seconds()


def test_an_unwritable_scratch_is_named() -> None:
    SCRATCH.parent.mkdir()
    SCRATCH.touch()
    with pytest.raises(FoLoRAError, match=r"\.folora/scratch/.*cannot be written"), scratch(a=1):
        pass
