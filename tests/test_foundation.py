from __future__ import annotations

import math
import os
import random
import shutil
import subprocess
import sys
from itertools import islice
from typing import TYPE_CHECKING

import pytest
import torch
from fake_hub import COMMIT, hub
from hypothesis import given
from hypothesis import strategies as st

from folora.base import open_base
from folora.errors import FoLoRAError
from folora.foundation import LOADING, character_tokenizer, pin_foundation, train_foundation
from folora.hub import PINS, check_unmoved, keep_pin
from folora.params import OfflineFoundation, Params, PretrainedFoundation
from folora.proxy import generate_proxy
from folora.storage import read_json, read_table
from folora.world import VOCABULARY, build_skills, pretraining_items

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Pipeline, Refused, SaveParams

    from folora.base import Base

TOKENIZER = character_tokenizer()


@pytest.fixture
def settings(tiny_params: Params) -> OfflineFoundation:
    assert isinstance(tiny_params.foundation, OfflineFoundation)
    return tiny_params.foundation


@given(st.text(VOCABULARY, max_size=40))
def test_tokenizer_round_trip(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert ids[0] == TOKENIZER.bos_token_id
    assert len(ids) == 1 + len(text)
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text
    assert TOKENIZER(text, add_special_tokens=False)["input_ids"] == ids[1:]


def test_special_tokens_are_distinct(pipeline: Pipeline) -> None:
    saved = pipeline.base.load_tokenizer()
    special = [saved.pad_token_id, saved.bos_token_id, saved.eos_token_id]
    assert special == [TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id]
    assert len(set(special)) == 3
    assert len(saved) == 4 + len(VOCABULARY)
    assert not set(special) & set(saved(VOCABULARY, add_special_tokens=False)["input_ids"])
    config = pipeline.base.load_model().config
    assert special == [config.pad_token_id, config.bos_token_id, config.eos_token_id]


def test_the_seed_fixes_every_byte(pipeline: Pipeline, settings: OfflineFoundation, tmp_path: Path) -> None:
    other = settings.model_copy(update={"seed": 1})
    train_foundation(settings, pipeline.params.world, tmp_path / "again")
    train_foundation(other, pipeline.params.world, tmp_path / "other")
    made = {path.name: path.read_bytes() for path in pipeline.foundation.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == made
    found = {path.name for path in (tmp_path / "other").iterdir() if path.read_bytes() != made[path.name]}
    assert found == {"model.safetensors", "manifest.json"}


def test_training_learns_whole_documents(pipeline: Pipeline) -> None:
    """Prompts are learned as well as responses, else the model could not be sampled from BOS."""
    items = list(islice(pretraining_items(build_skills(pipeline.params.world), random.Random(9)), 50))
    model = pipeline.base.load_model()
    losses = []
    for item in items:
        ids = torch.tensor([TOKENIZER(item["prompt"])["input_ids"]])
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=ids).loss))
    assert sum(losses) / len(losses) < math.log(len(TOKENIZER)) - 0.2


def test_context_shorter_than_a_document_is_refused(
    settings: OfflineFoundation, tiny_params: Params, tmp_path: Path
) -> None:
    short = settings.model_copy(update={"context": 16})
    with pytest.raises(FoLoRAError, match=r"foundation\.context: 16 is shorter than a document of 1\d tokens"):
        train_foundation(short, tiny_params.world, tmp_path / "foundation")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def elsewhere(pipeline: Pipeline, tmp_path: Path) -> Path:
    """A model of another size, saved by its own means."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "elsewhere")
    pipeline.base.load_tokenizer().save_pretrained(tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def pin(source: Path, output: Path) -> Base:
    section = PretrainedFoundation(source="pretrained", model=str(source), revision=None, loading=LOADING)
    pin_foundation(section, output)
    return open_base(output)


def test_pinning_copies_no_weights(elsewhere: Path, tmp_path: Path) -> None:
    base = pin(elsewhere, tmp_path / "pinned")
    assert [path.name for path in (tmp_path / "pinned").iterdir()] == ["manifest.json"]
    assert base.folder == elsewhere
    manifest = read_json(tmp_path / "pinned" / "manifest.json")
    assert manifest["source"] == str(elsewhere)
    assert {"model.safetensors", "config.json"} <= manifest["model_files"].keys()
    assert "tokenizer.json" in manifest["tokenizer_files"]


def test_a_pinned_model_is_sampled_from(elsewhere: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    base = pin(elsewhere, tmp_path / "pinned")
    assert base.load_model().config.hidden_size == 16
    assert base.identity["model"] != pipeline.base.identity["model"]
    generate_proxy(pipeline.params.proxy, "sampled", "0", base, tmp_path / "0.parquet")
    assert read_table(tmp_path / "0.parquet", **base.identity)[0].num_rows == pipeline.params.proxy.sequences


@pytest.mark.parametrize(
    ("file", "field"), [("model.safetensors", "model"), ("config.json", "model"), ("tokenizer.json", "tokenizer")]
)
def test_a_changed_file_is_noticed(file: str, field: str, elsewhere: Path, tmp_path: Path) -> None:
    pin(elsewhere, tmp_path / "pinned")
    content = bytearray((elsewhere / file).read_bytes())
    content[-2] ^= 1
    (elsewhere / file).write_bytes(content)
    with pytest.raises(FoLoRAError, match=f"the {field} files are not those that were pinned"):
        open_base(tmp_path / "pinned")


def test_pinning_nothing_is_one_line(pipeline: Pipeline, save_params: SaveParams, refused: Refused) -> None:
    section = {"source": "pretrained", "model": "no/where", "revision": None, "loading": LOADING.model_dump()}
    params = save_params(pipeline.values() | {"foundation": section})
    line = refused("foundation", "--world", "world", "--threads", 1, "--params", params)
    assert line.startswith("foundation.model: 'no/where' is neither a folder here nor")


def pinned_by(address: str, params: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """The foundation stage of a folder, in a process that takes the address for the hub."""
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(folder / "home")}
    environment.pop("HF_HUB_OFFLINE", None)
    stage = ["foundation", "--world", "world", "--output", "foundation", "--threads", "1", "--params", str(params)]
    command = [sys.executable, "-c", "from folora.cli import main; main()", *stage]
    shutil.rmtree(folder / "foundation", ignore_errors=True)  # as a runner does
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_revision_that_moved_is_an_error(pipeline: Pipeline, save_params: SaveParams, tmp_path: Path) -> None:
    shutil.copytree(pipeline.foundation, tmp_path / "hub" / "models" / "me" / "tiny")
    (tmp_path / "hub" / "models" / "me" / "tiny" / "manifest.json").unlink()

    def params(revision: str | None) -> Path:
        section = {"source": "pretrained", "model": "me/tiny", "revision": revision, "loading": LOADING.model_dump()}
        return save_params(pipeline.values() | {"foundation": section})

    for _ in range(2):  # the second time nothing has moved
        with hub(tmp_path / "hub") as address:
            done = pinned_by(address, params(None), tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"foundation: me/tiny at commit {COMMIT}\n"
    later = "beef" * 10
    with hub(tmp_path / "hub", later) as address:
        moved = pinned_by(address, params(None), tmp_path)
        assert moved.returncode == 1
        assert moved.stderr.strip() == (
            f"folora: foundation.revision: me/tiny@main moved from {COMMIT} to {later}: name the first to go on with "
            "the model that was pinned here, or the second to begin anew"
        )
        assert not (tmp_path / "foundation").exists()
        assert not list((tmp_path / "home").rglob(f"{later}/*.safetensors"))
        assert pinned_by(address, params(later), tmp_path).returncode == 0
    assert read_json(tmp_path / "foundation" / "manifest.json")["commit"] == later


def test_damaged_notes_of_pins_are_passed_over(in_tmp: Path) -> None:
    keep_pin("me/tiny", "main", "a")
    with (in_tmp / PINS).open("a") as file:
        file.write('[1]\n{"model": "me/tiny"}\n{"mod')
    check_unmoved("me/tiny", "main", "a")
    check_unmoved("me/tiny", "v2", "b")
    with pytest.raises(FoLoRAError, match="me/tiny@main moved from a to b"):
        check_unmoved("me/tiny", "main", "b")
