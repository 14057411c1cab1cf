from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import DataCollatorForSeq2Seq

from folora.base import digests, open_base
from folora.errors import FoLoRAError
from folora.foundation import character_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from folora.base import Base


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def repin(folder: Path) -> Base:
    """Open a changed folder as if it had been made that way."""
    edit(folder / "manifest.json", **digests(folder))
    return open_base(folder)


def test_model_is_ready_to_use(tiny_base: Base) -> None:
    model = tiny_base.load_model()
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_identity_is_the_content_not_the_place(tiny_base: Base, tiny: Path) -> None:
    moved = open_base((tiny / "foundation").rename(tiny / "moved"))
    assert moved.identity == tiny_base.identity
    assert moved.folder == tiny / "moved"


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_changed_or_missing_files_are_named(file: str, tiny: Path) -> None:
    path = tiny / "foundation" / file
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(FoLoRAError, match=f"the {file.split('.')[0]} files are not those"):
        open_base(tiny / "foundation")
    path.unlink()
    with pytest.raises(FoLoRAError, match=r"no \*\.safetensors weights|the tokenizer files are not those"):
        open_base(tiny / "foundation")


def test_missing_foundation_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(FoLoRAError, match=r"manifest\.json: not found: run the stage"):
        open_base(tmp_path)


def test_another_artefact_is_refused(tiny: Path) -> None:
    edit(tiny / "foundation" / "manifest.json", artefact="run")
    with pytest.raises(FoLoRAError, match="made with artefact run, but foundation is expected"):
        open_base(tiny / "foundation")


def test_model_without_tokenizer_is_refused(tiny: Path) -> None:
    for path in (tiny / "foundation").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(FoLoRAError, match="holds no tokenizer"):
        digests(tiny / "foundation")


@pytest.mark.parametrize("token", ["bos_token", "eos_token"])
def test_tokenizer_needs_bos_and_eos(token: str, tiny: Path) -> None:
    edit(tiny / "foundation" / "tokenizer_config.json", **{token: None})
    with pytest.raises(FoLoRAError, match=f"has no {token}"):
        repin(tiny / "foundation").load_tokenizer()


def test_eos_pads_where_there_is_no_pad(tiny: Path) -> None:
    edit(tiny / "foundation" / "tokenizer_config.json", pad_token=None)
    tokenizer = repin(tiny / "foundation").load_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_padding_lies_on_the_right_whatever_the_tokenizer_says(tiny: Path) -> None:
    """Micro-batches are cut to the length of their rows, from the left."""
    edit(tiny / "foundation" / "tokenizer_config.json", padding_side="left")
    collate = DataCollatorForSeq2Seq(repin(tiny / "foundation").load_tokenizer())
    batch = collate([{"input_ids": [1, 5, 6, 2], "labels": [-100, 5, 6, 2]}, {"input_ids": [1, 7], "labels": [1, 7]}])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"][1].tolist() == [1, 7, -100, -100]


@pytest.mark.parametrize("single", ["<s> $A </s>", "$A </s>"])
def test_a_tokenizer_ends_no_text_by_itself(single: str, tiny: Path) -> None:
    """What the harness asks is a prompt, which goes on."""
    tokenizer = character_tokenizer()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    tokenizer.save_pretrained(tiny / "foundation")
    loaded = repin(tiny / "foundation").load_tokenizer()
    assert tokenizer("1+2")["input_ids"][-1] == loaded.eos_token_id
    assert loaded.convert_ids_to_tokens(loaded("1+2")["input_ids"]) == ["<s>", "1", "+", "2"]


def test_a_tokenizer_that_cannot_be_kept_from_it_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("folora.base._ends_texts", lambda _: True)
    with pytest.raises(FoLoRAError, match="puts EOS after every text: set add_eos_token: false"):
        repin(tiny / "foundation").load_tokenizer()
