"""Sampling with vLLM: what a double is asked, and what vLLM answers where it is installed (docs/guide.md says how)."""

from __future__ import annotations

import random
import sys
from dataclasses import KW_ONLY, dataclass
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from test_families import SHAPE, pin, save
from test_proxy import BOS, EOS, check_follows, columns, next_token
from test_resume import Killed, killed_after
from transformers import LlamaConfig, LlamaForCausalLM

from folora.commands.doctor import OK, WARNING, vllm_backend
from folora.params import Params, Proxy
from folora.proxy import generate_proxy
from folora.sampling import sequence_seed
from folora.scratch import SCRATCH
from folora.storage import read_table

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import Pipeline, Refused, SaveParams

    from folora.base import Base
    from folora.sampling import Draw

VOCABULARY = SHAPE["vocab_size"]
TEMPERATURE, STEPS = 0.5, 24
INSTALLED = find_spec("vllm") is not None
real = pytest.mark.skipif(not INSTALLED, reason="no vLLM: docs/guide.md, Sampling with vLLM, says how to install it")


def with_backend(pipeline: Pipeline, **source: Any) -> dict[str, Any]:
    """Parameters with the source drawn by vLLM."""
    values = pipeline.values()
    values["proxy"]["sources"]["sampled"] |= {"backend": "vllm", **source}
    return values


# by a double, whose names are those of vLLM 0.32; what else it is asked is a TypeError
@dataclass(kw_only=True)
class SamplingParams:
    seed: int
    temperature: float
    max_tokens: int
    logprobs: int
    detokenize: bool
    ignore_eos: bool
    stop_token_ids: list[int]


@dataclass
class LLM:
    """Tokens drawn uniformly, with a seed of their own."""

    model: str
    _: KW_ONLY
    dtype: str
    trust_remote_code: bool
    load_format: str
    config_format: str
    max_model_len: int
    skip_tokenizer_init: bool
    generation_config: str
    logprobs_mode: str
    enable_prefix_caching: bool
    enforce_eager: bool

    def generate(self, prompts: list[dict], sampling_params: list[SamplingParams], *, use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        assert all(prompt == {"prompt_token_ids": [BOS]} for prompt in prompts)
        outputs = [self._output(one) for one in sampling_params]
        return [SimpleNamespace(outputs=[output]) for output in outputs]

    def _output(self, asked: SamplingParams) -> Any:
        assert 0 <= asked.seed < 2**63
        assert asked.max_tokens == self.max_model_len - 1
        numbers, ids = random.Random(asked.seed), []
        while len(ids) < asked.max_tokens and not set(ids) & set(asked.stop_token_ids):
            ids.append(numbers.randrange(VOCABULARY))
        return SimpleNamespace(token_ids=ids, logprobs=[{one: SimpleNamespace(logprob=-one / 8)} for one in ids])


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> list[LLM]:
    """Put the double in the place of vLLM; the engines that were made."""
    made: list[LLM] = []

    def engine(*arguments: Any, **options: Any) -> LLM:
        made.append(LLM(*arguments, **options))
        return made[-1]

    vllm, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
    vllm.__dict__.update(LLM=engine, SamplingParams=SamplingParams, __version__="0.32.0+cpu", platforms=platforms)
    platforms.__dict__.update(current_platform=SimpleNamespace(device_type="cpu"))
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    return made


@pytest.fixture
def settings(pipeline: Pipeline) -> Proxy:
    return Params.model_validate(with_backend(pipeline, temperature=0.7)).proxy


def test_rows_are_those_of_the_backend(double: list[LLM], settings: Proxy, pipeline: Pipeline, tmp_path: Path) -> None:
    generate_proxy(settings, "sampled", "0", pipeline.base, tmp_path / "0.parquet")
    table, manifest = read_table(tmp_path / "0.parquet", **pipeline.base.identity, proxy=settings.sampling("sampled"))
    seeds = [sequence_seed(0, "0", index) for index in range(settings.sequences)]
    (engine,) = double
    asked = [_asked(seed, settings) for seed in seeds]
    for row, seed, one in zip(table.to_pylist(), seeds, asked, strict=True):
        expected = engine._output(one).token_ids
        assert row["seed"] == seed
        assert row["token_ids"] == [BOS, *expected]
        assert row["logprobs"] == [-token / 8 for token in expected]
        assert row["finish_reason"] == ("stop" if expected[-1] == EOS else "length")
    assert {row["finish_reason"] for row in table.to_pylist()} == {"stop", "length"}
    assert manifest["proxy"]["source"] == {"kind": "sampled", "temperature": 0.7, "backend": "vllm"}
    assert manifest["made_with"]["vllm"] == "0.32.0"
    assert manifest["made_with"]["threads"] == 1


def _asked(seed: int, settings: Proxy) -> SamplingParams:
    return SamplingParams(
        seed=seed // 2,
        temperature=0.7,
        max_tokens=settings.max_length - 1,
        logprobs=0,
        detokenize=False,
        ignore_eos=True,
        stop_token_ids=[EOS],
    )


def test_the_engine_has_the_pinned_model(
    double: list[LLM], settings: Proxy, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[SamplingParams] = []
    generate = LLM.generate

    def seen(self: LLM, prompts: Any, params: list[SamplingParams], **options: Any) -> Any:
        asked.extend(params)
        return generate(self, prompts, params, **options)

    monkeypatch.setattr(LLM, "generate", seen)
    generate_proxy(settings, "sampled", "0", pipeline.base, tmp_path / "0.parquet")
    (engine,) = double
    assert engine == LLM(
        str(pipeline.base.folder),
        dtype="float32",
        trust_remote_code=False,
        load_format="safetensors",
        config_format="hf",
        max_model_len=settings.max_length,
        skip_tokenizer_init=True,
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        enable_prefix_caching=False,
        enforce_eager=True,
    )
    seeds = [sequence_seed(0, "0", index) for index in range(settings.sequences)]
    assert asked == [_asked(seed, settings) for seed in seeds]


def test_batch_size_does_not_matter(double: list[LLM], settings: Proxy, pipeline: Pipeline, tmp_path: Path) -> None:
    for batch_size in (7, 500):
        settings = settings.model_copy(update={"batch_size": batch_size})
        generate_proxy(settings, "sampled", "0", pipeline.base, tmp_path / f"{batch_size}.parquet")
    assert len(double) == 2
    assert columns(tmp_path / "7.parquet") == columns(tmp_path / "500.parquet")


@pytest.mark.usefixtures("in_tmp")
def test_a_killed_stage_goes_on_with_the_same_version_alone(
    double: list[LLM], settings: Proxy, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings.model_copy(update={"batch_size": 10})
    for version, calls, expected in (("0.32.0", 2, 3), ("0.31.0", 0, 1), ("0.32.0", 100, 8)):
        monkeypatch.setattr(sys.modules["vllm"], "__version__", version)
        with monkeypatch.context() as patched:
            count = killed_after(patched, LLM, "generate", calls)
            if calls < 100:
                with pytest.raises(Killed):
                    generate_proxy(settings, "sampled", "0", pipeline.base, tmp_path / "0.parquet")
            else:
                generate_proxy(settings, "sampled", "0", pipeline.base, tmp_path / "0.parquet")
        assert count == [expected]
    assert len(double) == 3
    assert len(list(SCRATCH.iterdir())) == 1  # of the other version, which has drawn nothing


def test_the_backend_is_a_part_of_what_later_stages_compare(settings: Proxy, pipeline: Pipeline) -> None:
    assert settings.sampling("sampled") != pipeline.params.proxy.sampling("sampled")
    said = pipeline.values()
    said["proxy"]["sources"]["sampled"]["backend"] = "transformers"
    made = pipeline.params.proxy.sampling("sampled")
    assert Params.model_validate(said).proxy.sampling("sampled") == made
    assert made["source"] == {"kind": "sampled", "temperature": 1.0}  # as in artefacts of before


# refusals
@pytest.fixture
def refusal(pipeline: Pipeline, save_params: SaveParams, refused: Refused) -> Callable[..., str]:
    """The line in which the stage refuses, with changes of the source."""

    def run(**source: Any) -> str:
        arguments = ("--foundation", pipeline.foundation, "--threads", 1)
        return refused("proxy", "sampled", 0, *arguments, "--params", save_params(with_backend(pipeline, **source)))

    return run


def test_without_vllm_it_says_where_to_run(refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    line = refusal()
    assert line.startswith("proxy.sources.*.backend: vLLM is not installed here")
    assert line.endswith("run this stage where it is (docs/guide.md says how), or take transformers")


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("found", "said"), [("cuda", "cuda"), ("", "no device")])
def test_a_build_for_another_device_is_refused(
    found: str, said: str, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["vllm.platforms"].current_platform, "device_type", found)
    assert f"vLLM runs on {said} here, the model is loaded on cpu" in refusal()


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("where", ["__init__", "generate"])
def test_what_vllm_cannot_run_is_one_line(
    where: str, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: Any, **__: Any) -> None:
        raise RuntimeError("Unsupported attention configuration:\n  head_dim=16")

    monkeypatch.setattr(LLM, where, cannot)
    line = refusal()
    assert "vLLM cannot run" in line
    assert line.endswith("Unsupported attention configuration: head_dim=16: take transformers")


@pytest.mark.parametrize(("temperature", "ok"), [(0.009, False), (0.01, True), (2, True), (2.1, False)])
def test_temperatures_that_vllm_changes_or_refuses(temperature: float, ok: bool, pipeline: Pipeline) -> None:
    values = with_backend(pipeline, temperature=temperature)
    if ok:
        Params.model_validate(values)
    else:
        with pytest.raises(ValueError, match=r"vllm samples at temperatures of 0\.01 to 2"):
            Params.model_validate(values)
        values["proxy"]["sources"]["sampled"]["backend"] = "transformers"
        Params.model_validate(values)


def test_the_doctor_looks_where_it_is_asked_for(
    pipeline: Pipeline, save_params: SaveParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert vllm_backend(save_params(pipeline.values())) == []
    path = save_params(with_backend(pipeline))
    for found, level in ((object(), OK), (None, WARNING)):
        monkeypatch.setattr("folora.commands.doctor.find_spec", lambda _, found=found: found)
        (finding,) = vllm_backend(path)
        assert finding.level == level


# by vLLM itself, on a model that its CPU kernels take
@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """Random weights, large enough that the next token depends on the ones before; no EOS of its configuration's."""
    torch.manual_seed(0)
    shape = SHAPE | {"hidden_size": 64, "intermediate_size": 96, "eos_token_id": 5, "initializer_range": 0.2}
    folder = tmp_path_factory.mktemp("vllm")
    model = LlamaForCausalLM(LlamaConfig(**shape))
    model.generation_config.update(do_sample=True, top_k=2, temperature=0.1, eos_token_id=[5, 6])
    return pin(save(model, folder / "source"), folder / "foundation")


@pytest.fixture(scope="module")
def draw(base: Base) -> Draw:
    from folora.vllm_sampling import vllm_draw

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        return vllm_draw(base, TEMPERATURE, STEPS)


def seeds(count: int) -> list[int]:
    return [sequence_seed(0, "test", index) for index in range(count)]


@real
@pytest.mark.slow
def test_a_sequence_depends_on_its_seed_alone(draw: Draw) -> None:
    found = draw(seeds(100))
    assert len({tuple(one.token_ids) for one in found}) > 95
    again = [one for start in range(0, 100, 7) for one in draw(seeds(100)[start : start + 7])]
    turned = draw(seeds(100)[::-1])[::-1]
    for others in (again, turned):
        assert [one.token_ids for one in others] == [one.token_ids for one in found]
        for one, other in zip(found, others, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@real
@pytest.mark.slow
def test_sequences_end_as_those_of_transformers(draw: Draw, base: Base) -> None:
    """With the tokenizer's EOS, which is kept, or at their length; log-probabilities are those of a full pass."""
    model, found = base.load_model(), draw(seeds(60))
    for one in found:
        ids = one.token_ids
        assert ids[0] == BOS
        assert EOS not in ids[:-1]
        assert one.finished == (ids[-1] == EOS)
        assert one.finished or len(ids) == STEPS + 1
        full = [float(next_token(model, ids[:i], TEMPERATURE)[ids[i]]) for i in range(1, len(ids))]
        assert one.logprobs == pytest.approx(full, abs=1e-4)
    assert {one.finished for one in found} == {True, False}
    assert {5, 6} & {token for one in found for token in one.token_ids[:-1]}  # the configuration's end nothing


@real
@pytest.mark.slow
def test_samples_follow_the_model(draw: Draw, base: Base) -> None:
    samples = [one.token_ids for one in draw(seeds(4000))]
    check_follows(samples, base.load_model(), TEMPERATURE, 1.3 * TEMPERATURE)
