"""A base model of which main memory holds a part only: the CPU's case of several devices."""

from __future__ import annotations

import gc
import shutil
import tempfile
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from folora.adapter import WEIGHTS_FILE, load_checkpoint
from folora.base import Base, digests
from folora.covariance import compute_covariance
from folora.errors import FoLoRAError
from folora.evaluate import evaluate_base, evaluate_method
from folora.proxy import generate_proxy
from folora.spread import MAX_MEMORY, gpu_count, memory_limits
from folora.storage import METRICS_FILE, TOKENS_FILE, write_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Pipeline

pytestmark = pytest.mark.usefixtures("in_tmp")


@pytest.fixture
def half(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> int:
    """Main memory for half of the weights, which the variable asks for; their bytes."""
    size = sum(one.nbytes for one in pipeline.base.load_model().parameters())
    monkeypatch.setenv(MAX_MEMORY, f"cpu={size // 2}")
    return size // 2


def in_memory(model: torch.nn.Module) -> int:
    return sum(one.nbytes for one in model.parameters() if not one.is_meta)


def test_main_memory_holds_no_more_than_it_may(half: int, pipeline: Pipeline) -> None:
    assert 0 < in_memory(pipeline.base.load_for_inference()) <= half
    assert in_memory(pipeline.base.load_model()) > half  # training and export have all of it


def test_no_stage_writes_another_byte(half: int, pipeline: Pipeline, evaluations: Path, tmp_path: Path) -> None:
    """Sampling, moments and evaluation, and nobody writes into the base model's own files."""
    assert half
    before = digests(pipeline.base.folder)
    params, base = pipeline.params, pipeline.base
    generate_proxy(params.proxy, "sampled", "0", base, tmp_path / "0.parquet")
    compute_covariance(params, base, pipeline.task, tmp_path / "moments")
    assert (tmp_path / "0.parquet").read_bytes() == (pipeline.proxy / "0.parquet").read_bytes()
    assert (tmp_path / "moments").read_bytes() == pipeline.task_moments.read_bytes()

    evaluate_base(params, base, pipeline.world, pipeline.heldout, tmp_path / "base")
    for method in params.methods:
        runs = pipeline.folder / "runs" / method
        evaluate_method(params, method, base, pipeline.world, pipeline.heldout, runs, tmp_path / method)
    for name in ("base", *params.methods):
        for file in (METRICS_FILE, TOKENS_FILE):
            assert (tmp_path / name / file).read_bytes() == (evaluations / name / file).read_bytes()
    assert digests(pipeline.base.folder) == before


def test_weights_of_another_dtype_lie_in_a_folder_that_goes_with_the_model(
    half: int, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv(MAX_MEMORY, f"cpu={half // 2}")  # which are half as large
    loading = pipeline.base.loading.model_copy(update={"dtype": "bfloat16"}).model_dump()
    base = Base(pipeline.base.folder, pipeline.base.manifest | {"loading": loading})
    model, ids = base.load_for_inference(), torch.arange(3, 13)[None]
    (folder,) = tmp_path.glob("folora-*")
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, base.load_model()(input_ids=ids).logits)
    del model
    gc.collect()  # its hooks know it
    assert not folder.exists()


def test_checkpoints_that_need_the_weights_are_refused(
    half: int, pipeline: Pipeline, runs: Path, tmp_path: Path
) -> None:
    assert half
    (run,) = (runs / "lora").iterdir()
    checkpoint = shutil.copytree(run / "checkpoints" / "6", tmp_path / "dora")
    config = checkpoint / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))
    with pytest.raises(FoLoRAError, match="FOLORA_MAX_MEMORY: DoRA computes with the weights"):
        load_checkpoint(pipeline.base.load_for_inference(), checkpoint)

    name = "model.layers.1.mlp.down_proj"
    weight = pipeline.base.load_model().get_submodule(name).weight
    write_tensors(tmp_path / "full" / WEIGHTS_FILE, {name: weight}, {"artefact": "weights"})
    with pytest.raises(FoLoRAError, match=r"FOLORA_MAX_MEMORY: .*full holds whole weights: unset it"):
        load_checkpoint(pipeline.base.load_for_inference(), tmp_path / "full")


def test_transposed_weights_and_no_room_at_all_are_refused(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    monkeypatch.setenv(MAX_MEMORY, "cpu=20kB")
    with pytest.raises(FoLoRAError, match="FOLORA_MAX_MEMORY: GPT2LMHeadModel keeps its weights transposed"):
        Base(tmp_path / "gpt2", pipeline.base.manifest).load_for_inference()
    monkeypatch.setenv(MAX_MEMORY, "cpu=10")
    with pytest.raises(FoLoRAError, match="FOLORA_MAX_MEMORY: too little for the embedding"):
        pipeline.base.load_for_inference()


@pytest.mark.parametrize(
    ("said", "device", "limits", "gpus"),
    [
        ("cpu=20GB", "cpu", {"cpu": 20 * 10**9}, 0),
        ("0=1kB, 1=2kB,cpu=3", "cuda", {0: 1000, 1: 2000, "cpu": 3}, 2),
        ("0=1kB", "cuda", {0: 1000}, 1),
        ("", "cuda", None, 1),
    ],
)
def test_the_variable_says_what_each_device_may_hold(
    said: str, device: str, limits: object, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MAX_MEMORY, said)
    assert memory_limits(device) == limits
    assert gpu_count(device) == gpus


@pytest.mark.parametrize(
    ("said", "device", "named"),
    [
        ("20GB", "cpu", "'20GB' cannot be read: write it as cpu=20GB"),
        ("cpu=lots", "cpu", "'cpu=lots' cannot be read: write it as cpu=20GB"),
        ("0=1GB", "cpu", "'0=1GB' does not fit foundation.loading.device cpu: such as cpu=20GB"),
        ("cpu=1GB", "cuda", "'cpu=1GB' does not fit foundation.loading.device cuda: such as 0=70GB,1=70GB,cpu=200GB"),
        ("1=1GB", "cuda", "'1=1GB' does not fit foundation.loading.device cuda: such as 0=70GB"),
        ("gpu=1GB", "cuda", "'gpu=1GB' cannot be read: write it as 0=70GB"),
    ],
)
def test_a_variable_that_says_something_else_is_named(
    said: str, device: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MAX_MEMORY, said)
    with pytest.raises(FoLoRAError) as refused:
        memory_limits(device)
    assert str(refused.value).startswith(f"{MAX_MEMORY}: {named}")
