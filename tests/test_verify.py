"""``folora verify``: with hashes on a graph of three stages, with tolerances on small artefacts of every kind."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import GRAPH
from typer.testing import CliRunner
from workspace import AUTHOR, run

from folora.cli import app
from folora.commands.verify import deviations
from folora.errors import FoLoRAError
from folora.storage import write_json, write_table, write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def recorded(graph: Path) -> Path:
    """The graph, its ``dvc.lock`` in git."""
    run(graph, "git", "init", "--quiet")
    run(graph, "git", "add", "dvc.lock")
    run(graph, "git", *AUTHOR, "commit", "--quiet", "-m", "results")
    return graph


def verify(*options: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON."""
    result = CliRunner().invoke(app, ["verify", "--json", *options])
    return result.exit_code, json.loads(result.stdout)


def test_level_1_is_every_hash(recorded: Path) -> None:
    code, said = verify()
    assert (code, said["level"]) == (0, 1)
    assert {one["stage"]: one["state"] for one in said["stages"]} == dict.fromkeys(
        ("first", "second@a", "second@b", "third"), "equal"
    )
    assert "level 1: 4 stages agree, bit by bit" in CliRunner().invoke(app, ["verify"]).stdout
    assert (recorded / "third.txt").exists()


def test_a_run_of_other_bytes_is_no_level_though_dvc_lock_has_them(recorded: Path) -> None:
    (recorded / "source").write_text("other\n")
    run(recorded, "dvc", "repro", "--quiet")
    code, said = verify()
    assert (code, said["level"]) == (1, None)
    states = [(one["state"], one["inputs"]) for one in said["stages"]]
    assert states == [("differs", "equal"), *3 * [("differs", "differs")]]
    assert "no level: 4 of 4 stages differ or are missing; first: first" in CliRunner().invoke(app, ["verify"]).stdout


def test_a_missing_output_is_named(recorded: Path) -> None:
    (recorded / "a.txt").unlink()
    code, said = verify()
    assert (code, said["level"]) == (1, None)
    (missing,) = (one for one in said["stages"] if one["state"] == "missing")
    assert (missing["stage"], missing["where"]) == ("second@a", "a.txt")


@pytest.mark.usefixtures("graph")
def test_without_a_recorded_lock_it_says_what_to_do() -> None:
    result = CliRunner().invoke(app, ["verify"])
    assert isinstance(result.exception, FoLoRAError)
    assert str(result.exception) == "HEAD: git has no dvc.lock there: name another --revision, or a folder: --against"


def test_against_a_folder(graph: Path, tmp_path: Path) -> None:
    shutil.copytree(graph, tmp_path / "other")
    assert verify("--against", str(tmp_path / "other"))[1]["level"] == 1
    (tmp_path / "other" / "first.txt").write_text("other\n")  # no number that could be close
    code, said = verify("--against", str(tmp_path / "other"))
    assert code == 1
    assert [one["state"] for one in said["stages"]] == ["differs", "equal", "equal", "equal"]


def test_bytes_that_differ_are_never_level_1(graph: Path, tmp_path: Path) -> None:
    (graph / "dvc.yaml").write_text(GRAPH.replace("first.txt", "first.json"))
    shutil.copytree(graph, tmp_path / "other")
    for place, threads in ((graph, 1), (tmp_path / "other", 2)):
        write_json(place / "first.json", {"made_with": {"threads": threads}})
    _, said = verify("--against", str(tmp_path / "other"))
    assert (said["level"], said["stages"][0]["state"]) == (2, "within")


def off(write: Callable[[Path, Any], None], one: Any, other: Any, folder: Path, name: str) -> dict[str, bool]:
    """What is off between two artefacts, and whether it is within its tolerance."""
    for place, content in (("one", one), ("other", other)):
        (folder / place).mkdir(exist_ok=True)
        write(folder / place / name, content)
    found = list(deviations(folder / "one" / name, folder / "other" / name))
    return {one.where.removeprefix(f"{name}: "): one.excess <= 1 for one in found if one.excess}


@pytest.mark.parametrize(
    ("artefact", "relative", "within"),
    [("covariance", 1e-6, True), ("covariance", 1e-4, False), ("trained", 1e-3, True), ("trained", 0.1, False)],
)
def test_tensors_within_a_share_of_their_norm(artefact: str, relative: float, within: bool, tmp_path: Path) -> None:
    def write(path: Path, x: torch.Tensor) -> None:
        write_tensors(path, {"x": x, "same": torch.ones(2)}, {"artefact": artefact})

    x = torch.randn(64, dtype=torch.float64)
    assert off(write, x, x + relative * x, tmp_path, "a.safetensors") == {"x": within}
    assert off(write, x, x[:-1], tmp_path, "a.safetensors") == {"names or shapes of tensors": False}


def test_a_spectrum_is_the_same_in_another_basis_of_equal_eigenvalues(tmp_path: Path) -> None:
    def write(path: Path, basis: torch.Tensor) -> None:
        tensors = {"q.basis": basis, "q.eigenvalues": torch.tensor([0.5, 0.5, 2.0], dtype=torch.float64)}
        write_tensors(
            path, tensors, {"artefact": "spectrum", "groups": {"q": ["q"]}, "health": {"residual": basis.sum().item()}}
        )

    basis = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    turned = basis[:, [1, 0, 2]] * torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    assert off(write, basis, turned, tmp_path, "a.safetensors") in ({}, {"q.basis": True})
    assert off(write, basis, basis[:, [0, 2, 1]], tmp_path, "a.safetensors") == {"q.basis": False}


def test_rows_may_tip_and_numbers_are_compared_where_they_did_not(tmp_path: Path) -> None:
    def write(path: Path, tipped: int) -> None:
        ids = [[1, 2] if row < tipped else [1, 2, 3] for row in range(200)]
        logprobs = [[-1.0 - 1e-6 * tipped] * len(row) for row in ids]
        write_table(path, pa.table({"token_ids": ids, "logprobs": logprobs}), {"artefact": "proxy"})

    assert off(write, 0, 2, tmp_path, "0.parquet") == {"rows": True, "logprobs": True}
    assert off(write, 0, 100, tmp_path, "0.parquet") == {"rows": False, "logprobs": True}


def test_what_must_be_equal_and_what_need_not(tmp_path: Path) -> None:
    about = {"artefact": "run", "model": "0" * 64, "inputs": {"proxy": ["1" * 64]}, "made_with": {"torch": "2.13.0"}}
    about |= {"params": {"threads": 1, "train": {"steps": 6}}}
    same = about | {"model": "2" * 64, "inputs": {"proxy": ["3" * 64]}, "made_with": {"torch": "2.13.1"}}
    same |= {"params": {"threads": 2, "train": {"steps": 6}}}
    assert off(write_json, about, same, tmp_path, "manifest.json") == {}
    other = about | {"params": {"threads": 1, "train": {"steps": 7}}}
    assert off(write_json, about, other, tmp_path, "manifest.json") == {"params.train.steps is 6, not 7": False}


def test_the_report_is_its_numbers(tmp_path: Path) -> None:
    write = write_json
    assert off(write, {"kept": 0.5}, {"kept": 0.51}, tmp_path, "metrics.json") == {"kept": True}
    assert off(write, {"kept": 0.5}, {"kept": 0.6}, tmp_path, "metrics.json") == {"kept": False}
    assert off(write, {"kept": 0.5}, {"kept": None}, tmp_path, "metrics.json") == {"kept": False}


def test_metrics_that_are_no_number_are_equal_to_none_only(tmp_path: Path) -> None:
    def write(path: Path, value: float | None) -> None:
        write_table(path, pa.table({"kl": pa.array([value], pa.float64())}), {"artefact": "metrics"})

    assert off(write, None, np.inf, tmp_path, "metrics.parquet") == {"kl": False}
    assert off(write, 1.0, 1.001, tmp_path, "metrics.parquet") == {"kl": True}


@pytest.mark.parametrize("name", ["a.safetensors", "a.parquet", "a.json", "a.txt"])
def test_a_damaged_file_differs(name: str, tmp_path: Path) -> None:
    found = off(lambda path, text: path.write_text(text), "{", "[", tmp_path, name)
    assert list(found.values()) == [False]
