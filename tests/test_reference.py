"""The reference of params.yaml says what its types do."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import ROOT
from typer.testing import CliRunner

from folora.cli import app
from folora.commands.params import markdown, reference
from folora.errors import FoLoRAError
from folora.methods import Method, kinds


def entry(key: str) -> tuple[str, str]:
    (found,) = [one for one in reference() if one.key == key]
    return found.allowed, found.meaning


def test_the_page_is_as_generated() -> None:
    assert (ROOT / "docs" / "params.md").read_text() == markdown(reference()), (
        "folora params --markdown > docs/params.md"
    )


def paths(values: Any, prefix: str) -> set[str]:
    if not isinstance(values, dict):
        return {prefix}
    return {path for key, value in values.items() for path in paths(value, f"{prefix}.{key}" if prefix else key)}


def test_every_key_of_a_parameter_file_is_there(tiny_values: dict[str, Any]) -> None:
    known = {one.key.replace(" (offline)", "").replace(" (sampled)", "") for one in reference()}
    named = {"tasks": "subtraction", "proxy.sources": "sampled"}
    plain = {key: value for key, value in tiny_values.items() if key not in ("methods", "runs")}
    found = paths(plain, "")
    for section, name in named.items():
        found = {path.replace(f"{section}.{name}.", f"{section}.NAME.") for path in found}
    assert found <= known
    assert {f"runs.NAME.{key}" for run in tiny_values["runs"].values() for key in run} <= known


def test_every_option_of_every_kind_is_there() -> None:
    keys = {one.key for one in reference("methods")}
    for kind, cls in kinds().items():
        own = {name for name in cls.model_fields if name not in Method.model_fields and name != "kind"}
        assert {f"methods.NAME ({kind}).{name}" for name in own} <= keys
    assert {f"methods.NAME.{name}" for name in Method.model_fields} <= keys


def test_bounds_defaults_and_meanings() -> None:
    assert entry("train.steps") == ("integer, at least 1, at most 10,000,000", "optimizer steps")
    assert entry("spectrum.shrinkage")[0] == "number, greater than 0, at most 0.5; or ledoit-wolf, oas"
    assert entry("methods.NAME (folora).gate") == (
        "soft, hard; default soft",
        "soft, or hard: open for the directions with the greatest λ, shut for the others",
    )
    assert entry("methods.NAME (lora-null).freeze_a")[0] == "true or false; default false"
    assert entry("methods.NAME.kl_budget")[0] == "number, greater than 0; or null; default null"
    assert entry("world.separator")[0] == "-, ''"


@pytest.mark.parametrize(
    ("prefix", "first", "last"),
    [
        ("proxy", "proxy.seed", "proxy.batch_size"),
        ("runs.NAME", "runs.NAME.task", "runs.NAME.seed"),
        ("foundation", "foundation.source", "foundation (pretrained).loading.trust_remote_code"),
        ("train.steps", "train.steps", "train.steps"),
    ],
)
def test_a_prefix_is_whole_words(prefix: str, first: str, last: str) -> None:
    keys = [one.key for one in reference(prefix)]
    assert (keys[0], keys[-1]) == (first, last)


def test_an_unknown_key_is_named() -> None:
    with pytest.raises(FoLoRAError, match=r"prox: params\.yaml has no such key"):
        reference("prox")


def test_on_the_command_line() -> None:
    result = CliRunner().invoke(app, ["params", "adapter", "--json"])
    assert result.exit_code == 0
    assert '"adapter.rank"' in result.output
    assert '"train' not in result.output
