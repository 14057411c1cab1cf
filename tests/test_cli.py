from __future__ import annotations

import shlex
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
import typer
from conftest import ROOT
from ruamel.yaml import YAML
from typer.testing import CliRunner

from folora.cli import app

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Pipeline, Refused, SaveParams

STAGES = [
    "foundation",
    "download",
    "task",
    "proxy",
    "heldout",
    "covariance",
    "spectrum",
    "train",
    "evaluate-base",
    "evaluate",
    "report",
]
COMMANDS = [
    "methods",
    "params",
    "use",
    "why",
    "verify",
    "doctor",
    "compare",
    "cost",
    "pick",
    "forget",
    "publish",
    "clean",
]


def folora(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = ["folora", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_a_mistake_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    text = (ROOT / "workflow" / "presets" / "tiny.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("rank: 4", "rank: 0"))
    done = folora("report", "--evaluations", "none", "--output", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "folora: params.yaml: adapter.rank: Input should be greater than or equal to 1 (got 0)\n"
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def test_help_is_quick_to_import(tmp_path: Path) -> None:
    script = (
        "import sys; sys.argv = ['folora', '--help']\n"
        "from folora.cli import main\n"
        "try:\n    main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'mlflow', 'pyarrow', 'lm_eval', 'dvc', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'imports {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in STAGES + COMMANDS)


def test_commands_that_only_read_import_no_torch(tmp_path: Path) -> None:
    names = ", ".join(f"folora.commands.{name}" for name in ("why", "verify", "compare", "pick", "publish", "clean"))
    script = f"import sys, {names}, folora.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=False).returncode == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_that_parses(name: str) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    assert command.epilog.startswith(f"Example: folora {name}")
    words = shlex.split(command.epilog.removeprefix("Example: ").split("||")[0].split("&&")[0])
    command.make_context(name, words[2:])


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    plain, debug = folora("use", "nope", cwd=tmp_path), folora("--debug", "use", "nope", cwd=tmp_path)
    assert (plain.returncode, debug.returncode) == (1, 1)
    assert plain.stderr.startswith("folora: 'nope' is not a preset")
    assert len(plain.stderr.splitlines()) == 1
    assert debug.stderr.endswith(plain.stderr)
    assert "Traceback" in debug.stderr
    assert "presets.py" in debug.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_explains_itself(stage: str) -> None:
    result = CliRunner().invoke(app, [stage, "--help"])
    assert result.exit_code == 0
    assert "--output" in result.output
    assert "--params" in result.output


def test_the_stages_are_those_of_dvc() -> None:
    stages = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"].values()
    commands = [stage.get("do", stage)["cmd"] for stage in stages]
    assert {command.split()[1] for command in commands} == set(STAGES)
    assert all(command.split()[0] == "folora" for command in commands)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["report"],
        ["proxy", "sampled", "0", "--foundation", "f", "--output", "o", "--threads", "0"],
        ["proxy", "sampled", "0", "--foundation", "f", "--output", "o", "--threads", "many"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], in_tmp: Path) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert not list(in_tmp.iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("task", "poetry"), "tasks: 'poetry' is not in params.yaml; there are subtraction"),
        (
            ("spectrum", "poetry", "sampled", "0", "--proxy-moments=x", "--task-moments=x", "--threads=1"),
            "tasks: 'poetry' is not in params.yaml; there are subtraction",
        ),
        (
            ("spectrum", "subtraction", "sampled", "7", "--proxy-moments=x", "--task-moments=x", "--threads=1"),
            "spectrum.parts: 7 is not in params.yaml; there are 0",
        ),
        (
            ("train", "sgd", "--task-rows=x", "--proxy=x", "--heldout=x", "--spectrum=x", "--threads=1"),
            "runs: 'sgd' is not in params.yaml; there are lora-3e-3-s0, folora-replay-1e-2-s0",
        ),
        (
            ("evaluate", "sgd", "--tasks=x", "--heldout=x", "--runs=x", "--threads=1"),
            "methods: 'sgd' is not in params.yaml; there are lora, folora-replay",
        ),
    ],
)
def test_unknown_entry_names_the_known_ones(
    arguments: tuple[object, ...], expected: str, pipeline: Pipeline, save_params: SaveParams, refused: Refused
) -> None:
    options = ("--foundation", pipeline.foundation, "--params", save_params(pipeline.values()))
    assert refused(*arguments, *options) == expected


@pytest.mark.parametrize(
    ("stage", "files"),
    [
        ("task", ()),
        ("proxy", ()),
        ("covariance", ("--rows", "x")),
        ("spectrum", ("--proxy-moments", "x", "--task-moments", "x")),
        ("train", ("--task-rows", "x", "--proxy", "x", "--heldout", "x", "--spectrum", "x")),
        ("evaluate-base", ("--tasks", "x", "--heldout", "x")),
        ("evaluate", ("--tasks", "x", "--heldout", "x", "--runs", "x")),
    ],
)
def test_missing_foundation_says_what_to_run(
    stage: str, files: tuple[str, ...], pipeline: Pipeline, save_params: SaveParams, refused: Refused
) -> None:
    name = {
        "task": ["subtraction"],
        "spectrum": ["subtraction", "sampled", "0"],
        "proxy": ["sampled", "0"],
        "train": ["lora-3e-3-s0"],
    }
    name["evaluate"] = ["lora"]
    threads = () if stage == "task" else ("--threads", 1)
    options = (*files, "--foundation", "nowhere", *threads, "--params", save_params(pipeline.values()))
    line = refused(stage, *name.get(stage, []), *options)
    assert line.startswith("nowhere/manifest.json: not found: run the stage that makes it")


@pytest.mark.parametrize("stage", ["task", "proxy", "covariance", "spectrum"])
def test_read_only_results_folder_is_one_line(
    stage: str, pipeline: Pipeline, save_params: SaveParams, read_only_disk: Path, refused: Refused
) -> None:
    arguments = {
        "task": ("subtraction",),
        "proxy": ("sampled", "0", "--threads", 1),
        "covariance": ("--rows", pipeline.task, "--threads", 1),
        "spectrum": (
            "subtraction",
            "sampled",
            "0",
            *("--proxy-moments", pipeline.proxy_moments, "--task-moments", pipeline.task_moments, "--threads", 1),
        ),
    }[stage]
    options = ("--foundation", pipeline.foundation, "--params", save_params(pipeline.values()))
    output = read_only_disk / "new" / "result"
    line = refused(stage, *arguments, *options, output=output)
    assert line.startswith(f"{output}: cannot be written")
    assert line.endswith("free space or make the folder writable")


@pytest.mark.parametrize("stage", ["foundation", "covariance", "spectrum"])
def test_full_disk_is_one_line(
    stage: str, pipeline: Pipeline, save_params: SaveParams, small_disk: Path, refused: Refused
) -> None:
    arguments = {
        "foundation": ("--world", small_disk / "world"),
        "covariance": ("--foundation", pipeline.foundation, "--rows", pipeline.task),
        "spectrum": (
            *("subtraction", "sampled", "0", "--foundation", pipeline.foundation),
            *("--proxy-moments", pipeline.proxy_moments, "--task-moments", pipeline.task_moments),
        ),
    }[stage]
    line = refused(
        stage, *arguments, "--threads", 1, "--params", save_params(pipeline.values()), output=small_disk / "result"
    )
    assert line.startswith(f"{small_disk / 'result'}: cannot be written")
    assert "No space left" in line
    assert not list(small_disk.iterdir())


def test_threads_and_determinism_are_set(pipeline: Pipeline, save_params: SaveParams, refused: Refused) -> None:
    params = save_params(pipeline.values())
    for threads in (3, 1):
        torch.use_deterministic_algorithms(mode=False)
        refused("proxy", "sampled", "0", "--foundation", "nowhere", "--threads", threads, "--params", params)
        assert torch.get_num_threads() == threads
        assert torch.are_deterministic_algorithms_enabled()
