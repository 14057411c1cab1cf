from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

import pytest
from conftest import ROOT

from folora.errors import FoLoRAError
from folora.foundation import LOADING
from folora.methods import kinds
from folora.params import Params, PretrainedFoundation, Section, load_params

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Refused, SaveParams
    from pydantic import BaseModel

LORA_RUN = "runs.lora-3e-3-s0"
REMOVED = object()


def changed(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of ``values`` with one entry set, or removed."""
    values = copy.deepcopy(values)
    table = values
    *parents, last = path.split(".")
    for key in parents:
        table = table[key]
    if value is REMOVED:
        del table[last]
    else:
        table[last] = value
    return values


@pytest.mark.parametrize("path", [ROOT / "params.yaml", *sorted((ROOT / "workflow" / "presets").glob("*.yaml"))])
def test_shipped_files_are_valid(path: Path) -> None:
    params = load_params(path)
    assert sorted(name for method in params.methods for name in params.runs_of(method)) == sorted(params.runs)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("spectrum.shrinkage", 0.6, "less than or equal to 0.5 (got 0.6)"),
        ("spectrum.shrinkage", 0, "greater than 0 (got 0)"),
        ("spectrum.shrinkage", REMOVED, "Field required"),
        ("spectrum.shrinkage", float("nan"), "finite number"),
        ("spectrum.shrinkag", 0.1, "not permitted"),
        ("spectrums", {}, "not permitted"),
        ("foundation.width", 4, "greater than or equal to 8 (got 4)"),
        ("foundation.stepss", 4, "not permitted"),
        ("proxy.sources.sampled.temperature", 0, "greater than 0 (got 0)"),
        ("proxy.sources.sampled.temperature", 10.5, "less than or equal to 10 (got 10.5)"),
        ("proxy.sources.sampled.backend", "llama.cpp", "'transformers' or 'vllm' (got 'llama.cpp')"),
        ("proxy.max_length", 1, "greater than or equal to 2 (got 1)"),
        ("proxy.sources.sampled", {"kind": "guessed"}, "'sampled', 'corpus', 'random'"),
        ("proxy.sources", {}, "at least 1 item"),
        (f"{LORA_RUN}.proxy", "poetry", "'poetry' is not one of proxy.sources: sampled"),
        ("proxy.shards", [], "at least 1 item"),
        ("proxy.shards", [0, 1, 0], "listed twice"),
        ("covariance.proxy_positions", "response", "'all' or 'without_first' (got 'response')"),
        ("covariance.memory_budget", "plenty", "could not parse value and unit from byte string (got 'plenty')"),
        ("covariance.memory_budget", 0, "greater than 0 (got 0)"),
        ("tasks.subtraction.max_length", 3, "greater than or equal to 4 (got 3)"),
        ("train.steps", 1.5, "valid integer"),
        (f"{LORA_RUN}.learning_rate", "fast", "valid number"),
        (f"{LORA_RUN}.learning_rate", 2, "less than or equal to 1 (got 2)"),
        (f"{LORA_RUN}.seed", -1, "greater than or equal to 0 (got -1)"),
        (f"{LORA_RUN}.method", "sgd", "'sgd' is not one of methods: "),
        (f"{LORA_RUN}.task", "poetry", "'poetry' is not one of tasks: subtraction"),
        ("methods.base", {"kind": "lora"}, "stands for the base model in results"),
        ("methods.lora.replay", -1, "greater than or equal to 0 (got -1)"),
        ("methods.lora.tau", 1.0, "not permitted"),
        ("methods.lora.kind", "sgd", f"'sgd' is not one of {', '.join(kinds())}"),
        ("methods.folora-replay.floor", 1, "less than 1 (got 1)"),
        ("methods.folora-replay.replay_loss", "sum", "'tokens' or 'distillation' (got 'sum')"),
        ("methods.folora-replay.basis", "fourier", "'random' or 'identity' (got 'fourier')"),
        ("methods.folora-replay.tau", float("inf"), "finite number"),
        ("methods.unused", {"kind": "lora"}, "no entry of runs uses it"),
        ("report.reference", "sgd", "'sgd' is not one of methods"),
        ("threads.train", 0, "greater than or equal to 1 (got 0)"),
        ("evaluation.kept", [], "at least 1 item"),
    ],
)
def test_bad_value_is_one_line_with_key_and_range(
    path: str, value: Any, expected: str, tiny_values: dict[str, Any], save_params: SaveParams, refused: Refused
) -> None:
    file = save_params(changed(tiny_values, path, value))
    line = refused("report", "--evaluations", "none", "--params", file)
    assert line.startswith(f"{file}: ")
    assert f"{path}: " in line
    assert expected in line


def test_stages_have_names_of_their_own(tiny_values: dict[str, Any]) -> None:
    """Snakemake writes _ for -, and DVC joins the names of a task and a source with one."""
    run = tiny_values["runs"]["lora-3e-3-s0"]
    expected = "runs: 'lora-3e-3-s0' and 'lora_3e-3_s0' name one Snakemake rule, lora_3e_3_s0: rename one"
    with pytest.raises(ValueError, match=expected):
        Params.model_validate(changed(tiny_values, "runs.lora_3e-3_s0", run))
    task, source = tiny_values["tasks"]["subtraction"], tiny_values["proxy"]["sources"]["sampled"]
    values = changed(tiny_values, "tasks.subtraction-a", task)
    Params.model_validate(values)
    with pytest.raises(ValueError, match=r"tasks, proxy\.sources: '(.*)' and '\1' name one Snakemake rule"):
        Params.model_validate(changed(values, "proxy.sources.a-sampled", source))


def test_heads_must_divide_the_width(tiny_values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="width 32 must be a multiple of twice the heads"):
        Params.model_validate(changed(tiny_values, "foundation.heads", 3))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        *(("a: [1", "not valid YAML"), ("a: 1\na: 2", "not valid YAML"), ("", "a table"), ("- 1", "a table")),
        *((f"a: {'[' * 60}{']' * 60}", "nests more than 50 brackets"), ("a: 2024-99-99", "not valid YAML")),
        ("methods: {a: {kind: {b: 1}}}", "methods"),
    ],
)
def test_what_is_no_table_is_one_line(content: str, expected: str, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "p.yaml").write_text(content)
    line = refused("report", "--evaluations", "none", "--params", tmp_path / "p.yaml")
    assert line.startswith(f"{tmp_path / 'p.yaml'}: ")
    assert expected in line


def test_missing_file_says_where_to_run(refused: Refused) -> None:
    assert refused("report", "--evaluations", "none").startswith("params.yaml: not found: run in the folder")


def test_numbers_are_read_as_yaml_1_2(tmp_path: Path) -> None:
    text = (ROOT / "workflow" / "presets" / "tiny.yaml").read_text()
    (tmp_path / "p.yaml").write_text(text.replace("shrinkage: 0.01", "shrinkage: 1e-3"))
    assert load_params(tmp_path / "p.yaml").spectrum.shrinkage == 1e-3


def test_pretrained_foundation(tiny_values: dict[str, Any]) -> None:
    section = {"source": "pretrained", "model": "somewhere", "revision": None, "loading": LOADING.model_dump()}
    foundation = Params.model_validate(changed(tiny_values, "foundation", section)).foundation
    assert foundation == PretrainedFoundation(source="pretrained", model="somewhere", revision=None, loading=LOADING)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"device": "mps"}, "foundation.loading.device: mps has no float64, .* take cpu"),
        (
            {"device": "cuda", "attention": "flash_attention_2"},
            "foundation.loading: attention: flash_attention_2 needs device cuda and dtype bfloat16: take sdpa",
        ),
    ],
)
def test_what_a_model_cannot_be_loaded_with_is_refused_with_the_reason(
    changes: dict[str, str], expected: str, tiny_values: dict[str, Any], save_params: SaveParams, refused: Refused
) -> None:
    section = {
        "source": "pretrained",
        "model": "somewhere",
        "revision": None,
        "loading": LOADING.model_dump() | changes,
    }
    line = refused(
        "report", "--evaluations", "none", "--params", save_params(changed(tiny_values, "foundation", section))
    )
    assert re.search(expected, line)


def test_params_cannot_be_changed(tiny_params: Params) -> None:
    with pytest.raises(ValueError, match="frozen"):
        tiny_params.train.steps = 3  # type: ignore[misc]


def test_the_file_says_everything_but_the_options_of_tasks_and_methods() -> None:
    sections, methods = Section.__subclasses__(), list(kinds().values())

    def fields(classes: list[type[BaseModel]], *, required: bool) -> list[str]:
        items = [(one.__name__, *item) for one in classes for item in one.model_fields.items()]
        return [f"{owner}.{name}" for owner, name, info in items if info.is_required() is required]

    options = ("prompt", "response", "messages", "chat", "learn", "rows", "too_long", "packing")
    expected = [*(f"Task.{name}" for name in options), "SampledSource.backend"]
    expected += ["Covariance.memory_budget", "SpectrumSection.directions"]
    expected += ["Train.micro_batch", "Train.gradient_checkpointing"]
    expected += [f"Evaluation.{name}" for name in ("at_best", "texts", "limit", "chat", "run_generated_code")]
    assert fields(sections, required=False) == expected
    assert fields(methods, required=True) == [f"{method.__name__}.kind" for method in methods]
    assert all(one.model_config["extra"] == "forbid" for one in [*sections, *methods])


def test_runs_of_a_method(tiny_params: Params) -> None:
    assert list(tiny_params.runs_of("lora")) == ["lora-3e-3-s0"]
    with pytest.raises(FoLoRAError, match="not found"):
        load_params(ROOT / "nowhere.yaml")
