"""Passwords and tokens reach no output, and no file of others is unpickled."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import ROOT
from test_resume import LORA, METHODS, interrupted, train

from folora.commands.forget import Yardsticks, measure_forgetting
from folora.errors import FoLoRAError, redacted
from folora.resume import SEAL_FILE, seal

if TYPE_CHECKING:
    from conftest import Pipeline, SaveParams

pytestmark = pytest.mark.usefixtures("in_tmp")

PASSWORD, TOKEN = "hunter2-and-more", "hf_0123456789abcdef"


class Harm:
    """Unpickled, it makes a file."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("harm",)


# secrets
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"http://me:{PASSWORD}@host:5000/x failed", "http://me:***@host:5000/x failed"),
        (f"postgresql://me:{PASSWORD}@host/db", "postgresql://me:***@host/db"),
        (f"two https://a:{PASSWORD}@h and https://b:x@h", "two https://a:***@h and https://b:***@h"),
        (f"401 for {TOKEN}", "401 for ***"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("mail me@host: at 10:30", "mail me@host: at 10:30"),
    ],
)
def test_secrets_are_taken_out(text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("SHORT_KEY", "a")
    assert redacted(text) == expected


def test_a_run_against_a_server_with_a_password_keeps_it_to_itself(
    pipeline: Pipeline, runs: Path, save_params: SaveParams, tmp_path: Path
) -> None:
    """The server does not answer, so the run warns, and says where the runs are."""
    del runs  # which train first, into a store of their own
    values = pipeline.values()
    values["tracking"] = {"experiment": "e", "uri": f"http://me:{PASSWORD}@127.0.0.1:9"}
    arguments = [
        *("--debug", "train", LORA, "--params", save_params(values), "--output", tmp_path / "run", "--threads", 1),
        *("--foundation", pipeline.folder / "foundation", "--task-rows", pipeline.task, "--proxy", pipeline.proxy),
        *("--heldout", pipeline.heldout, "--spectrum", pipeline.spectra),
    ]
    command = [sys.executable, "-c", "from folora.cli import main; main()", *map(str, arguments)]
    environment = os.environ | {"HF_TOKEN": TOKEN, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "the run goes on" in done.stderr
    said = (done.stdout + done.stderr).encode()
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "params.yaml"]
    assert len(written) > 10
    for secret in (PASSWORD, TOKEN):
        assert not any(secret.encode() in content for content in (said, *written))


# pickles
def test_nothing_in_the_project_unpickles() -> None:
    code = [*(ROOT / "src").rglob("*.py"), *(ROOT / "workflow").rglob("*.smk"), ROOT / "Snakefile"]
    unsafe = re.compile(r"\bpickle\b|\bjoblib\b|torch\.load\(|allow_pickle|unsafe_load|yaml\.load\(|\beval\(|\bexec\(")
    found = [f"{path.name}: {line}" for path in code for line in path.read_text().splitlines() if unsafe.search(line)]
    runs_a_program = [line for line in found if line.startswith("sandboxed.py: ")]  # which is what it is for
    assert len(runs_a_program) == 1
    assert "    exec(" in runs_a_program[0]
    assert [line for line in found if ".eval()" not in line and line not in runs_a_program] == []


def test_a_pickled_adapter_is_refused(pipeline: Pipeline, runs: Path, tmp_path: Path) -> None:
    adapter = runs / "lora" / LORA / "adapter"
    strange = tmp_path / "adapter"
    strange.mkdir()
    (strange / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    (strange / "adapter_model.bin").write_bytes(pickle.dumps(Harm()))
    yardsticks = Yardsticks(pipeline.heldout, pipeline.spectra, pipeline.world)
    with pytest.raises(FoLoRAError, match=r"adapter_model\.safetensors: not found"):
        measure_forgetting(pipeline.params, strange, pipeline.base, yardsticks)
    assert not Path("harm").exists()


def test_a_pickle_in_the_place_of_a_state_does_no_harm(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOLORA_SAVE_SECONDS", "0")
    folder = interrupted(pipeline, tmp_path / "run", monkeypatch)
    (folder / "checkpoint-6" / "optimizer.pt").write_bytes(pickle.dumps(Harm()))
    (folder / "checkpoint-6" / SEAL_FILE).unlink()
    seal(folder, folder / "checkpoint-6")
    with pytest.raises(pickle.UnpicklingError):
        train(pipeline, METHODS["lora"], tmp_path / "run")
    assert not Path("harm").exists()
