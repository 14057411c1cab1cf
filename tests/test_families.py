"""Model families through the whole pipeline: tiny models with random weights, pinned, sampled, adapted and loaded."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import Pipeline, SaveParams
from fake_hub import hub
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from small import BATCH, base_model, context
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from folora.adapter import NOTABLE_ROUNDING, WEIGHTS_FILE, load_checkpoint
from folora.base import open_base
from folora.commands.export import Places, export_run, write_merged
from folora.commands.plan import head_line
from folora.covariance import compute_covariance
from folora.errors import FoLoRAError
from folora.evaluate import evaluate_base, evaluate_method
from folora.foundation import LOADING, character_tokenizer, pin_foundation
from folora.layers import adapted_layers
from folora.loading import Loading
from folora.methods import kinds, method_from
from folora.methods.factors import SplitMethod
from folora.params import Params, PretrainedFoundation
from folora.proxy import generate_heldout, generate_proxy
from folora.spectrum import compute_spectrum
from folora.storage import read_json, read_table, read_tensors, write_tensors
from folora.task import prepare_task
from folora.train import TrainInputs, train_run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel

    from folora.base import Base

METHOD = "folora-replay"
RUN = "folora-replay-1e-2-s0"
VOCABULARY = len(character_tokenizer())
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ATTENTION = {f"self_attn.{name}_proj": 2 for name in "qkvo"}
MLP = {f"mlp.{name}_proj": 2 for name in ("gate", "up", "down")}
SEPARATE = ATTENTION | MLP
SHARED_EXPERT = {f"mlp.shared_expert{name}": 2 for name in ("_gate", ".gate_proj", ".up_proj", ".down_proj")}

# a family: its configuration, its model, the adapted modules of its two blocks, and layer inputs a block
FAMILIES: dict[str, tuple[Any, Any, dict[str, int], int]] = {
    "mistral": (MistralConfig(**SHAPE, sliding_window=8), MistralForCausalLM, SEPARATE, 4),
    "qwen2": (Qwen2Config(**SHAPE), Qwen2ForCausalLM, SEPARATE, 4),
    "qwen3": (Qwen3Config(**SHAPE, head_dim=8), Qwen3ForCausalLM, SEPARATE, 4),
    "gemma3": (Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=8), Gemma3ForCausalLM, SEPARATE, 4),
    "olmo2": (Olmo2Config(**SHAPE), Olmo2ForCausalLM, SEPARATE, 4),
    "phi3": (
        Phi3Config(**SHAPE),
        Phi3ForCausalLM,
        {"self_attn.qkv_proj": 2, "self_attn.o_proj": 2, "mlp.gate_up_proj": 2, "mlp.down_proj": 2},
        4,
    ),
    "gpt2": (
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64),
        GPT2LMHeadModel,
        {"attn.c_attn": 2, "attn.c_proj": 2, "mlp.c_fc": 2, "mlp.c_proj": 2},
        4,
    ),
    "gpt-neox": (
        GPTNeoXConfig(**{name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}),
        GPTNeoXForCausalLM,
        {"attention.query_key_value": 2, "attention.dense": 2, "mlp.dense_h_to_4h": 2, "mlp.dense_4h_to_h": 2},
        4,
    ),
    "mixtral": (MixtralConfig(**SHAPE, num_local_experts=3), MixtralForCausalLM, ATTENTION, 2),
    "qwen2-moe": (
        Qwen2MoeConfig(
            **SHAPE, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8
        ),
        Qwen2MoeForCausalLM,
        ATTENTION | SHARED_EXPERT,
        4,
    ),
}


def save(model: PreTrainedModel, folder: Path, **tokens: str | None) -> Path:
    """A model folder as the hub has them, with the world's tokenizer."""
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | tokens))
    return folder


def pin(source: Path, output: Path, **loading: Any) -> Base:
    settings = Loading.model_validate(LOADING.model_dump() | loading)
    pin_foundation(
        PretrainedFoundation(source="pretrained", model=str(source), revision=None, loading=settings), output
    )
    return open_base(output)


def run_stages(pipeline: Pipeline, base: Base, folder: Path) -> Path:
    """Every stage from the task to a trained run; returns the run's folder."""
    own = shutil.copy(pipeline.folder / "mlflow.db", folder)  # the session's runs are looked at by other tests
    tracking = pipeline.params.tracking.model_copy(update={"uri": f"sqlite:///{own}"})
    params = pipeline.params.model_copy(update={"tracking": tracking})
    made = Pipeline(folder, params, base)
    prepare_task(params.tasks["subtraction"], base, made.task)
    for shard in params.proxy.shards:
        rows = made.proxy / f"{shard}.parquet"
        generate_proxy(params.proxy, "sampled", str(shard), base, rows)
        compute_covariance(params, base, rows, made.proxy_moments / f"{shard}.safetensors")
    generate_heldout(params.proxy, base, made.heldout)
    compute_covariance(params, base, made.task, made.task_moments)
    compute_spectrum(params, "subtraction", "sampled", 0, base, made.proxy_moments, made.task_moments, made.spectrum)
    inputs = TrainInputs(made.task, made.proxy, made.heldout, made.spectra)
    with contextlib.chdir(folder):  # MLflow keeps artefacts below the working folder
        train_run(params, RUN, base, inputs, folder / "runs" / RUN)
        evaluate_method(params, METHOD, base, pipeline.world, made.heldout, folder / "runs", folder / "evaluation")
    return folder / "runs" / RUN


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_through_the_pipeline(family: str, pipeline: Pipeline, tmp_path: Path) -> None:
    """Its layers are adapted as declared, and PEFT loads the adapter on the model as it was saved."""
    from peft import PeftModel

    config, model_class, expected, inputs = FAMILIES[family]
    torch.manual_seed(0)
    source = save(model_class(config), tmp_path / "source")
    base = pin(source, tmp_path / "foundation")
    run = run_stages(pipeline, base, tmp_path)

    covered = read_json(run / "coverage.json")
    adapted = {one["module"].rpartition(".*.")[2]: one["count"] for one in covered if one["adapted"]}
    assert adapted == expected
    assert all(one["why"] for one in covered if not one["adapted"])
    _, spectrum = read_tensors(tmp_path / "spectrum" / "subtraction" / "sampled" / "0.safetensors")
    assert len(spectrum["groups"]) == 2 * inputs

    ids = torch.tensor([[1, 5, 9, 7, 4]])
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
        before = plain(input_ids=ids).logits
        own = load_checkpoint(base.load_model(), run / "adapter")(input_ids=ids).logits
        peft = PeftModel.from_pretrained(plain, run / "adapter").eval()(input_ids=ids).logits
    assert not torch.allclose(own, before, atol=1e-4)
    torch.testing.assert_close(own, peft, atol=1e-5, rtol=0)
    metrics = read_table(tmp_path / "evaluation" / "metrics.parquet")[0].to_pylist()
    assert all(row["kl"] > 0 for row in metrics)


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.logits = output.logits / 2{extra}
        return output
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a model folder with code of its own, which halves the logits of a Llama."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", sys.path.copy())

    def make(extra: str = "") -> Path:
        source = save(tiny_llama(), tmp_path / "source")
        (source / "own.py").write_text(OWN_CODE.format(extra=extra))
        config = json.loads((source / "config.json").read_text())
        config |= {"model_type": "own", "architectures": ["OwnModel"]}
        config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
        (source / "config.json").write_text(json.dumps(config))
        return source

    return make


@pytest.mark.slow
def test_a_model_with_code_of_its_own_goes_through_the_pipeline(
    own_code: Callable[..., Path], pipeline: Pipeline, tmp_path: Path
) -> None:
    """Each stage says what it takes, and the exported model is loaded as its card says."""
    source = own_code()
    base = pin(source, tmp_path / "foundation", trust_remote_code=True)
    section = {"source": "pretrained", "model": str(source), "revision": None, "loading": base.loading.model_dump()}
    params = Params.model_validate(pipeline.values() | {"foundation": section})
    for stage in ("proxy", "heldout", "covariance", "spectrum", "train"):
        assert head_line(params, base.folder, stage).startswith(f"{stage}, ")
    run_stages(pipeline, base, tmp_path)

    ids = torch.tensor([[1, 5, 9, 7, 4]])
    with torch.no_grad():
        logits = base.load_model()(input_ids=ids).logits
        torch.testing.assert_close(logits, tiny_llama().eval()(input_ids=ids).logits / 2, atol=1e-5, rtol=0)
    shutil.move(tmp_path / "runs" / RUN, tmp_path / "runs" / METHOD / RUN)
    shutil.move(tmp_path / "evaluation", tmp_path / "evaluations" / METHOD)
    evaluate_base(params, base, pipeline.world, tmp_path / "heldout.parquet", tmp_path / "evaluations" / "base")
    adapted = load_checkpoint(base.load_model(), tmp_path / "runs" / METHOD / RUN / "adapter")(input_ids=ids).logits
    assert not torch.allclose(adapted, logits, atol=1e-4)
    parts = ("runs", "evaluations", "foundation", "heldout.parquet", "task")
    places = Places(*(tmp_path / part for part in parts))
    for merge in (False, True):
        export_run(params, RUN, places, tmp_path / f"out-{merge}", merge=merge)
        (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / f"out-{merge}" / "README.md").read_text(), re.DOTALL)
        names: dict[str, Any] = {}
        exec(code, names)
        found = names["model"].eval()(input_ids=ids).logits
        torch.testing.assert_close(found, adapted, atol=1e-4, rtol=0)


def test_a_stage_runs_where_its_model_cannot_be_planned(
    own_code: Callable[..., Path], pipeline: Pipeline, tmp_path: Path
) -> None:
    """Such as one whose code looks at what it computes, which is nothing without weights."""
    source = own_code(extra="\n        assert float(output.logits.abs().max()) < 1e9")
    base = pin(source, tmp_path / "foundation", trust_remote_code=True)
    section = {"source": "pretrained", "model": str(source), "revision": None, "loading": base.loading.model_dump()}
    params = Params.model_validate(pipeline.values() | {"foundation": section})
    assert head_line(params, base.folder, "heldout").startswith("heldout: what it takes is not known, ")
    generate_heldout(params.proxy, base, tmp_path / "heldout.parquet")
    wrong = params.adapter.model_copy(update={"target_modules": ["nobody"]})
    with pytest.raises(FoLoRAError, match=r"adapter\.target_modules: 'nobody' matches no linear layer"):
        head_line(params.model_copy(update={"adapter": wrong}), base.folder, "heldout")


@pytest.mark.parametrize("whole", [False, True])
def test_a_changed_gpt2_is_stored_transposed_as_others_are(whole: bool, pipeline: Pipeline, tmp_path: Path) -> None:
    """Merged, or whole weights loaded on the model as transformers opens it; some of these are square."""
    torch.manual_seed(0)
    config, model_class, *_ = FAMILIES["gpt2"]
    source = save(model_class(config), tmp_path / "source", padding_side="left")
    base = pin(source, tmp_path / "foundation")
    generate_heldout(pipeline.params.proxy, base, tmp_path / "heldout.parquet")
    adapted: Any = base.load_model()
    if whole:
        layers = adapted_layers(adapted, "all-linear")
        for layer in layers.values():
            layer.weight.data += 0.1 * torch.randn_like(layer.weight)
        weights = {name: layer.weight for name, layer in layers.items()}
        write_tensors(tmp_path / "adapter" / WEIGHTS_FILE, weights, {"artefact": "weights"})
    else:
        adapted = get_peft_model(adapted, LoraConfig(init_lora_weights=False, target_modules=["c_attn", "attn.c_proj"]))
        adapted.save_pretrained(tmp_path / "adapter")
    assert write_merged(base, tmp_path / "adapter", tmp_path / "heldout.parquet", tmp_path / "out") < 1e-4
    ids = torch.tensor([[1, 5, 9, 7, 4]])
    with torch.no_grad():
        expected = adapted.eval()(input_ids=ids).logits
        merged, bare = (AutoModelForCausalLM.from_pretrained(place).eval() for place in (tmp_path / "out", source))
        assert not torch.allclose(bare(input_ids=ids).logits, expected, atol=1e-2)
        loaded = load_checkpoint(bare, tmp_path / "adapter")
        for model in (merged, loaded):
            torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-4, rtol=0)
    assert read_json(tmp_path / "out" / "tokenizer_config.json")["padding_side"] == "left"


def tiny_llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **options))


@pytest.mark.slow
def test_a_bfloat16_base_gets_a_float32_adapter(pipeline: Pipeline, tmp_path: Path) -> None:
    base = pin(save(tiny_llama(), tmp_path / "source"), tmp_path / "foundation", dtype="bfloat16", attention="sdpa")
    assert {parameter.dtype for parameter in base.load_model().parameters()} == {torch.bfloat16}
    run = run_stages(pipeline, base, tmp_path)
    assert {tensor.dtype for tensor in load_file(run / "adapter" / "adapter_model.safetensors").values()} == {
        torch.float32
    }


@pytest.mark.parametrize("kind", ["full", "osf"])
def test_weights_are_not_trained_in_bfloat16(kind: str) -> None:
    with pytest.raises(FoLoRAError, match="too coarse"):
        method_from(kind, {"kind": kind}).adapt(base_model().bfloat16(), context())


@pytest.mark.parametrize("kind", sorted(set(kinds()) - {"full", "osf"}))
def test_every_adapter_starts_on_a_bfloat16_base(kind: str) -> None:
    """It computes what the base does; where a part of W is taken out, up to the rounding of the rest."""
    model, method = base_model().bfloat16(), method_from(kind, {"kind": kind})
    before = model(**BATCH).logits
    adapted = method.adapt(model, context()).model(**BATCH).logits
    rounding = 0.3 * float(before.detach().abs().max()) if isinstance(method, SplitMethod) or kind == "dora" else 0.0
    torch.testing.assert_close(adapted, before, atol=rounding, rtol=0)


@pytest.mark.parametrize("kind", ["pissa", "olora", "milora", "corda", "lora-null", "sc-lora"])
def test_the_rounding_of_what_is_left_of_w_is_measured(kind: str) -> None:
    """What is exported is B A - B₀A₀ on W, and what was trained the rounded rest of W and B A."""
    worst = {}
    for dtype in (torch.float32, torch.bfloat16):
        adapted = method_from(kind, {"kind": kind}).adapt(base_model().to(dtype), context())
        off = []
        for layer in adapted.layers:
            A, B = (factor.double() for factor in layer.taken or (layer.A * 0, layer.B * 0))
            trained, exported = adapted.linear(layer).weight.double() + layer.scaling * B @ A, layer.weight.double()
            off.append(float((trained - exported).norm() / exported.norm()))
        assert adapted.rounding == pytest.approx(max(off), rel=1e-3)
        worst[dtype] = adapted.rounding
    assert worst[torch.float32] < NOTABLE_ROUNDING / 10 < 1e-4 < worst[torch.bfloat16]


def test_tied_embeddings_are_not_adapted(tmp_path: Path) -> None:
    model = pin(save(tiny_llama(tie_word_embeddings=True), tmp_path / "source"), tmp_path / "pinned").load_model()
    assert not {"lm_head", "model.embed_tokens"} & adapted_layers(model, "all-linear").keys()


def test_a_tokenizer_without_bos_needs_one_named(tmp_path: Path) -> None:
    source = save(tiny_llama(), tmp_path / "source", bos_token=None)
    with pytest.raises(FoLoRAError, match=r"loading\.bos_token: .* has no bos_token: name a token"):
        pin(source, tmp_path / "pinned")
    with pytest.raises(FoLoRAError, match=r"loading\.bos_token: '<nobody>' is no token"):
        pin(source, tmp_path / "pinned", bos_token="<nobody>")
    tokenizer = pin(source, tmp_path / "pinned", bos_token="</s>").load_tokenizer()
    assert tokenizer.bos_token_id == tokenizer.eos_token_id is not None


@pytest.mark.parametrize(
    "model",
    [
        BertForMaskedLM(
            BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        ),
        T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
    ],
    ids=["bert", "t5"],
)
def test_other_kinds_of_model_are_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(FoLoRAError, match=f"is a {type(model).__name__}, not a causal language model"):
        pin(save(model, tmp_path / "source"), tmp_path / "pinned")
    assert not (tmp_path / "pinned").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        *(
            ({"quantization_config": {"quant_method": name, "bits": 4}}, rf"weights are quantised \({name}\): name the")
            for name in ("bitsandbytes", "gptq", "awq")
        ),
        ({"model_type": "nobody"}, "configuration cannot be read"),
        ({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "nobody"}, "configuration cannot be read"),
    ],
    ids=["bitsandbytes", "gptq", "awq", "unknown", "untrusted"],
)
def test_a_configuration_that_will_not_do_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    source = save(tiny_llama(), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))
    (source / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(FoLoRAError, match=reason):
        pin(source, tmp_path / "pinned")


def quantised(source: Path) -> Path:
    """A model folder that says that its weights have four bits."""
    save(tiny_llama(), source)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (source / "config.json").write_text(json.dumps(config))
    return source


@pytest.mark.slow
def test_a_quantised_model_of_a_hub_is_refused_before_its_weights_are_fetched(
    tiny_values: dict[str, Any], save_params: SaveParams, tmp_path: Path
) -> None:
    """By the stage, and by the plan that a careful user asks for first."""
    quantised(tmp_path / "hub" / "models" / "someone" / "packed")
    section = {"source": "pretrained", "model": "someone/packed", "revision": None, "loading": LOADING.model_dump()}
    file = save_params(tiny_values | {"foundation": section})
    outputs = ["--output", tmp_path / "pinned", "--world", tmp_path / "world", "--threads", 1]
    with hub(tmp_path / "hub") as address:
        environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache")}
        for command in (["plan"], ["foundation", *outputs]):
            arguments = [sys.executable, "-c", "from folora.cli import main; main()", *command, "--params", file]
            done = subprocess.run(
                [*map(str, arguments)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 1
            (line,) = (line for line in done.stderr.splitlines() if "folora: " in line)
            assert "its weights are quantised (bitsandbytes): name the model that they were made from" in line
    assert not (tmp_path / "pinned").exists()
    assert list(tmp_path.glob("cache/**/config.json"))
    assert not list(tmp_path.glob("cache/**/*.safetensors"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is for machines without CUDA")
def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FoLoRAError, match=r"loading\.device: torch finds no CUDA device here"):
        pin(save(tiny_llama(), tmp_path / "source"), tmp_path / "pinned", device="cuda")


def test_trusted_code_is_pinned_with_the_model(tmp_path: Path) -> None:
    source = save(tiny_llama(), tmp_path / "source")
    (source / "modeling.py").write_text("VALUE = 1")
    pin(source, tmp_path / "pinned", trust_remote_code=True)
    (source / "modeling.py").write_text("VALUE = 2")
    with pytest.raises(FoLoRAError, match="the model files are not those that were pinned"):
        open_base(tmp_path / "pinned")
