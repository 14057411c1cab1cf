"""One graph, two runners: the stages of dvc.yaml and the rules of the Snakefile."""

from __future__ import annotations

import ast
import contextlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML
from workspace import change, make_workspace, run

from folora.dag import Stage, _overlaps, below, resolve_stages
from folora.devices import main_memory
from folora.params import load_params
from folora.spread import MAX_MEMORY

ROOT = Path(__file__).parent.parent
PRESETS = sorted((ROOT / "workflow" / "presets").glob("*.yaml"))


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    return resolve_stages(ROOT)


def edges(stages: dict[str, Stage]) -> set[tuple[str, str]]:
    maker = {output: stage.rule for stage in stages.values() for output in stage.outputs}
    return {(maker[path], stage.rule) for stage in stages.values() for path in stage.inputs}


def snakemake(*arguments: str, cwd: Path = ROOT) -> str:
    command = [sys.executable, "-m", "snakemake", *arguments]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def test_both_runners_have_the_same_stages_and_edges(stages: dict[str, Stage]) -> None:
    same_graph(snakemake("--dag", "dot", "--forceall", "--cores", "1"), stages)


@pytest.mark.slow
def test_a_large_preset_is_one_graph_under_both_runners(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")
    shutil.copy(ROOT / "workflow" / "presets" / "ablations.yaml", workspace / "params.yaml")
    with contextlib.chdir(workspace):
        stages = resolve_stages(Path())
    same_graph(run(workspace, "snakemake", "--dag", "dot", "--forceall", "--cores", "1"), stages)


def same_graph(dot: str, stages: dict[str, Stage]) -> None:
    """Assert that Snakemake's graph has the stages of DVC's, and their edges."""
    rules = dict(re.findall(r'(\d+)\[label = "([^"\\]+)', dot))
    found = {(rules[a], rules[b]) for a, b in re.findall(r"(\d+) -> (\d+)", dot)}
    assert set(rules.values()) - {"all"} == {stage.rule for stage in stages.values()}
    assert {edge for edge in found if edge[1] != "all"} == edges(stages)


def test_a_stage_has_the_threads_of_its_command(stages: dict[str, Stage]) -> None:
    for stage in stages.values():
        said = re.search(r"--threads (\d+)", stage.command)
        assert stage.threads == (int(said.group(1)) if said else 1), stage.name


def test_a_stage_asks_for_the_gpus_that_the_model_is_loaded_on(
    stages: dict[str, Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not any(stage.gpus for stage in stages.values())
    for name in ("dvc.yaml", "workflow/presets/llama-3-8b.yaml"):
        shutil.copy(ROOT / name, tmp_path / name.rpartition("/")[2].replace("llama-3-8b", "params"))
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], cwd=tmp_path, check=True)
    with contextlib.chdir(tmp_path):
        asking = {name.partition("@")[0]: stage.gpus for name, stage in resolve_stages(Path()).items()}
        monkeypatch.setenv(MAX_MEMORY, "0=70GB,1=70GB,cpu=200GB")
        spread = {name.partition("@")[0]: stage.gpus for name, stage in resolve_stages(Path()).items()}
    running = {name.partition("@")[0] for name, stage in stages.items() if "--foundation" in stage.command}
    running = running - {"task", "spectrum"} | {"foundation"}  # a foundation is pinned where its device is
    assert asking == {name: int(name in running) for name in asking}
    assert spread == asking | dict.fromkeys(running - {"foundation", "train"}, 2)


def test_jobs_fit_this_machine_and_a_cluster_gives_what_they_ask_for(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")
    change(workspace, "memory.foundation", 900_000_000)
    here = snakemake("--dry-run", "--cores", "2", cwd=workspace)
    there = snakemake("--dry-run", "--profile", "profiles/kubernetes", cwd=workspace)
    asked = [max(map(int, re.findall(r"mem_mb=(\d+)", printed))) for printed in (here, there)]
    assert asked == [main_memory() // 10**6, 900_000_000]


def test_rule_names_are_distinct_identifiers(stages: dict[str, Stage]) -> None:
    rules = [stage.rule for stage in stages.values()]
    assert len(set(rules)) == len(rules)
    assert all(rule.isidentifier() for rule in rules)


# what only starts, stores, tracks or wires: an edit to it makes no stage stale
WIRING = {
    *(
        "__init__",
        "base",
        "cli",
        "console",
        "costs",
        "dag",
        "devices",
        "energy",
        "errors",
        "finished",
        "git",
        "hold",
        "hub",
    ),
    *("library", "loading", "params", "presets", "processes", "records", "scratch", "spread", "storage", "tracking"),
}
SOURCES = "src/folora"


def test_every_source_file_is_a_dependency_of_a_stage() -> None:
    listed = set(re.findall(rf"{SOURCES}/\S+", (ROOT / "dvc.yaml").read_text()))
    modules = {f"{SOURCES}/{path.name}" for path in (ROOT / SOURCES).glob("*.py") if path.stem not in WIRING}
    assert modules <= listed
    assert all((ROOT / path).exists() for path in listed)


def imported(module: Path) -> set[Path]:
    """The modules and packages of ours that a module imports when it runs, wherever in it."""
    tree = ast.parse(module.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    parts = [name.split(".")[1:] for name in names if name and name.startswith("folora.")]
    return {path if (path := (ROOT / SOURCES).joinpath(*part)).is_dir() else path.with_suffix(".py") for part in parts}


def test_a_stage_depends_on_all_the_code_that_it_runs(stages: dict[str, Stage]) -> None:
    seen: dict[Path, set[Path]] = {}
    for stage in stages.values():
        listed = {ROOT / source for source in stage.sources if source.startswith(SOURCES)}
        for source in listed:
            for module in [source] if source.is_file() else source.rglob("*.py"):
                for other in seen.setdefault(module, imported(module)):
                    within = {other, *other.parents}
                    # the report draws the gates of FoLoRA's parameters, and trains nothing
                    drawn = stage.name == "report" and "methods" in other.parts
                    assert drawn or other.stem in WIRING or listed & within, (
                        f"{stage.name} lists {module.name}, which imports {other.name}"
                    )


def test_both_evaluations_depend_on_what_asks_and_on_its_tasks(stages: dict[str, Stage]) -> None:
    evaluations = [stage for name, stage in stages.items() if name.startswith("evaluate")]
    assert len(evaluations) > 1
    for stage in evaluations:
        assert "src/folora/harness.py" in stage.sources
        assert re.search(r"--tasks (\S+)", stage.command).group(1) in (*stage.inputs, *stage.sources)  # type: ignore[union-attr]


def test_a_stage_depends_on_its_own_method_only(stages: dict[str, Stage]) -> None:
    document = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")
    assert "methods" not in document["stages"]["train"]["do"]["params"]
    assert "methods.${item.method}" in document["stages"]["train"]["do"]["params"]
    assert stages  # the document resolves


def test_below_follows_the_edges(stages: dict[str, Stage]) -> None:
    assert below(stages, {"report"}) == {"report"}
    assert below(stages, {"foundation"}) == set(stages)


@pytest.mark.parametrize("preset", [ROOT / "params.yaml", *PRESETS], ids=lambda path: path.stem)
def test_presets_are_valid(preset: Path) -> None:
    assert load_params(preset).runs


def test_snakemake_lint_is_clean() -> None:
    assert "Congratulations" in snakemake("--lint")


def test_dvc_draws_the_graph() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "dvc", "dag", "--dot"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "report" in result.stdout


PATHS = st.lists(st.sampled_from("ab"), min_size=1, max_size=3).map("/".join)


@given(outputs=st.lists(PATHS, unique=True), path=PATHS)
def test_overlaps_are_those_of_a_comparison_one_by_one(outputs: list[str], path: str) -> None:
    def inside(one: str, other: str) -> bool:
        return f"{one}/".startswith(f"{other}/")

    expected = [output for output in outputs if inside(path, output) or inside(output, path)]
    assert sorted(_overlaps(outputs)(path)) == sorted(expected)
