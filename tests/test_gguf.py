"""A GGUF file as the base: written here tensor by tensor, converted once, and equal to the model it came from."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import gguf
import pytest
import torch
from test_families import pin
from transformers import LlamaConfig, LlamaForCausalLM

from folora.errors import FoLoRAError
from folora.storage import digest_of_file, read_json

if TYPE_CHECKING:
    from pathlib import Path

Q4_1 = gguf.GGMLQuantizationType.Q4_1
TOKENS = ["<unk>", "<s>", "</s>", *"abcdefghijkl", "ab"]
NAMES = {  # of a block's tensors in GGUF, and how transformers calls them
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


@pytest.fixture
def original() -> LlamaForCausalLM:
    """One head, so that the file's order of the rotated rows is the model's but for their halves."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def file(original: LlamaForCausalLM, tmp_path: Path) -> Path:
    return write_file(original, tmp_path / "model.gguf")


def write_file(original: LlamaForCausalLM, path: Path, *quantised: str) -> Path:
    """Its tensors in float32, but for those that are quantised to four bits."""
    config = original.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(1)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 3))
    writer.add_token_scores([0.0] * len(TOKENS))
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    weights = {name: tensor.detach() for name, tensor in original.state_dict().items()}
    block = "model.layers.0"
    for rotated in ("q", "k"):  # GGUF keeps the two halves of a head interleaved
        name = f"{block}.self_attn.{rotated}_proj.weight"
        weights[name] = weights[name].reshape(2, 16, 32).swapaxes(0, 1).reshape(32, 32)
    tensors = {f"blk.0.{theirs}.weight": weights[f"{block}.{ours}.weight"] for theirs, ours in NAMES.items()}
    tensors["token_embd.weight"] = weights["model.embed_tokens.weight"]
    tensors["output_norm.weight"] = weights["model.norm.weight"]
    tensors["output.weight"] = weights["lm_head.weight"]
    for name, tensor in tensors.items():
        values = tensor.contiguous().numpy()
        if name in quantised:
            writer.add_tensor(name, gguf.quants.quantize(values, Q4_1), raw_dtype=Q4_1)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_converted_once(file: Path, original: LlamaForCausalLM, tmp_path: Path) -> None:
    base = pin(file, tmp_path / "foundation")
    ids = torch.tensor([[1, 5, 4, 9]])
    with torch.no_grad():
        torch.testing.assert_close(base.load_model()(input_ids=ids).logits, original(input_ids=ids).logits)
    assert base.folder == tmp_path / "foundation"
    assert base.load_tokenizer().bos_token_id == 1
    manifest = read_json(tmp_path / "foundation" / "manifest.json")
    assert manifest["gguf"] == {"file": "model.gguf", "digest": digest_of_file(file)}


def test_a_quantised_tensor_is_read_dequantised(original: LlamaForCausalLM, tmp_path: Path) -> None:
    """A row of 32 weights is one block of Q4_1: 16 values, evenly spaced between its least and its greatest."""
    file = write_file(original, tmp_path / "model.gguf", "blk.0.ffn_gate.weight")
    mlp = pin(file, tmp_path / "foundation").load_model().model.layers[0].mlp
    weights = original.model.layers[0].mlp
    rows = weights.gate_proj.weight
    steps = (rows.amax(1, keepdim=True) - rows.amin(1, keepdim=True)) / 15
    assert mlp.gate_proj.weight.dtype == torch.float32
    assert all(len(row.unique()) <= 16 for row in mlp.gate_proj.weight)
    assert ((mlp.gate_proj.weight - rows).abs() <= 0.52 * steps).all()  # half a step; the rest is its float16
    assert torch.equal(mlp.up_proj.weight, weights.up_proj.weight)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FoLoRAError, match=r"model\.gguf: not found"):
        pin(tmp_path / "model.gguf", tmp_path / "foundation")
    (tmp_path / "model.gguf").write_bytes(b"GGUF, but no more")
    with pytest.raises(FoLoRAError, match=r"model\.gguf: cannot be read as GGUF: "):
        pin(tmp_path / "model.gguf", tmp_path / "foundation")
    assert not (tmp_path / "foundation").exists()


def test_the_extra_is_named(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("transformers.utils.import_utils.is_gguf_available", lambda *_: False)
    with pytest.raises(FoLoRAError, match="pip install 'folora"):
        pin(file, tmp_path / "foundation")
