"""Proxy text drawn by vLLM, which takes up a waiting sequence as soon as another one ends.

As in ``sampling.sample`` a sequence starts from BOS, is drawn from the full distribution at the stated temperature, and
ends with the tokenizer's EOS. The random numbers are vLLM's, so it is another text than transformers gives. vLLM draws
those of a request from that request's own seed, so here too a sequence depends on (seed, shard, index) and on the model
alone, but for the rounding of its logits, which changes with what else is at work. That holds for one version of vLLM
on one kind of device: others may draw other numbers, and the manifest names the version.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from folora.errors import FoLoRAError
from folora.sampling import Sample
from folora.storage import MADE_WITH, made_with

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from folora.base import Base
    from folora.sampling import Draw
    from folora.storage import Manifest

KEY = "proxy.sources.*.backend"
ENVIRONMENT = {  # of vLLM; what the user has set is left
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: it ends with the stage, and has its threads
    "VLLM_NO_USAGE_STATS": "1",  # nothing is sent anywhere
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB, of its CPU build, which else takes nearly all memory
}


def vllm_draw(base: Base, temperature: float, steps: int) -> Draw:
    """Load the base model into vLLM.

    Args:
        base: the model.
        temperature: divides the logits.
        steps: bounds the sampled tokens of a sequence.

    Returns:
        A function from 64-bit seeds to a sequence for each.

    Raises:
        FoLoRAError: vLLM is not installed, not made for the model's device, or cannot run the model, here or in the
            function.
    """
    vllm = _vllm()
    loading, tokenizer = base.loading, base.load_tokenizer()
    _check_device(loading.device)
    # as stages set it, it would raise at what vLLM may do on a GPU, and fill the memory that vLLM asks for with NaN
    torch.set_deterministic_debug_mode("default")
    with _one_line(base.folder):
        engine = vllm.LLM(
            str(base.folder),
            dtype=loading.dtype,
            trust_remote_code=loading.trust_remote_code,
            load_format="safetensors",  # the files that are pinned; a folder may hold the model in other forms too
            config_format="hf",
            max_model_len=steps + 1,
            skip_tokenizer_init=True,  # tokens in, tokens out
            generation_config="vllm",  # not the model's own, which may cut the distribution
            logprobs_mode="processed_logprobs",  # of the logits over the temperature
            enable_prefix_caching=False,  # sequences share BOS alone
            enforce_eager=True,  # compiling takes longer than a shard
        )
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def draw(seeds: list[int]) -> list[Sample]:
        """A sequence for each seed."""
        asked = [
            vllm.SamplingParams(
                seed=seed >> 1,  # vLLM's are signed
                temperature=temperature,
                max_tokens=steps,
                logprobs=0,  # of the token that was drawn alone
                detokenize=False,
                ignore_eos=True,  # the model's configuration may name more tokens that end a text than the tokenizer's
                stop_token_ids=[eos],
            )
            for seed in seeds
        ]
        prompts = [{"prompt_token_ids": [bos]} for _ in seeds]
        with _one_line(base.folder):
            outputs = engine.generate(prompts, asked, use_tqdm=False)
        return [_sample(bos, eos, one.outputs[0]) for one in outputs]

    return draw


def made_with_vllm() -> Manifest:
    """The manifest field of ``storage.made_with``, with the version of vLLM."""
    return {MADE_WITH: made_with()[MADE_WITH] | {"vllm": _vllm().__version__.partition("+")[0]}}


def _sample(bos: int, eos: int, output: Any) -> Sample:
    ids = list(output.token_ids)
    logprobs = [of[token].logprob for token, of in zip(ids, output.logprobs, strict=True)]
    return Sample([bos, *ids], logprobs, finished=ids[-1] == eos)


@contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    """Say in one line what vLLM cannot do; some of it shows only when it draws."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise FoLoRAError(f"{KEY}: vLLM cannot run {folder}: {reason}: take transformers") from error


def _vllm() -> Any:
    """The package, told to keep to this process and this machine."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
    except ImportError as error:
        advice = "run this stage where it is (docs/guide.md says how), or take transformers"
        raise FoLoRAError(f"{KEY}: vLLM is not installed here ({error}): {advice}") from error
    return vllm


def _check_device(device: str) -> None:
    """See that this build of vLLM runs on a device and finds one.

    Raises:
        FoLoRAError: it does not.
    """
    from vllm.platforms import current_platform

    if current_platform.device_type != device:
        found = current_platform.device_type or "no device"
        advice = "install the build for it, or take transformers"
        raise FoLoRAError(f"{KEY}: vLLM runs on {found} here, the model is loaded on {device}: {advice}")
