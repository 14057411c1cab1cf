"""The base model as every stage opens it: the folder of the foundation stage, checked against its manifest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from folora import processes
from folora.errors import FoLoRAError
from folora.hub import from_hub
from folora.loading import Loading
from folora.storage import MANIFEST_FILE, Manifest, check_manifest, digest_of, digest_of_file, fields_of, read_json

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = "*.safetensors"
WEIGHT_PATTERNS = (WEIGHTS, "*.safetensors.index.json", "config.json", "generation_config.json")
TOKENIZER_PATTERNS = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "chat_template*", "*.model")


class FoundationManifest(BaseModel):
    """The fields of the foundation stage's manifest that its readers use."""

    model_config = ConfigDict(strict=True, frozen=True)

    model: str
    tokenizer: str
    loading: Loading
    source: str | None
    commit: str | None


@dataclass(frozen=True)
class Base:
    """A base model on disk.

    Attributes:
        folder: holds the weights and the tokenizer.
        manifest: of the foundation stage; ``model`` and ``tokenizer`` are digests of the files' content, ``loading``
            says how they are loaded.
    """

    folder: Path
    manifest: Manifest

    @property
    def identity(self) -> dict[str, Any]:
        """The manifest fields that every artefact made from this base carries."""
        return {name: self.manifest[name] for name in ("model", "tokenizer", "loading")}

    @property
    def loading(self) -> Loading:
        """How the model is loaded."""
        return Loading.model_validate(self.manifest["loading"])

    @property
    def context(self) -> int | None:
        """Positions the model has, or None where its configuration does not say."""
        return read_json(self.folder / "config.json").get("max_position_embeddings")

    def check_length(self, length: int, key: str) -> None:
        """Raise if rows of ``length`` tokens, asked for by the parameter ``key``, do not fit the model's context.

        Raises:
            FoLoRAError: they do not.
        """
        if self.context is not None and length > self.context:
            raise FoLoRAError(f"{key}: {length} is more than the model's context of {self.context} tokens: lower it")

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer, with a BOS, an EOS and a padding token.

        Raises:
            FoLoRAError: BOS or EOS is missing.
        """
        return load_tokenizer(self.folder, self.loading)

    def load_for_inference(self) -> PreTrainedModel:
        """As ``load_model``, spread over devices where the environment says so; weights may then not be in memory.

        Raises:
            FoLoRAError: the device is not to be had, or the model cannot be spread.
        """
        from folora.spread import load_spread, memory_limits

        limits = memory_limits(self.loading.device)
        if limits is None:
            return self.load_model()
        check_device(self.loading.device)
        return load_spread(self.folder, self.loading, limits)

    def load_model(self, *, sharded: bool = False) -> PreTrainedModel:
        """Load the weights, ready for evaluation, every linear layer as ``torch.nn.Linear``.

        Args:
            sharded: whether this process keeps its part of them only.

        Raises:
            FoLoRAError: the device is not to be had, or the model cannot be sharded.
        """
        import torch
        from transformers import AutoModelForCausalLM

        loading = self.loading
        check_device(loading.device)
        model: Any = AutoModelForCausalLM.from_pretrained(
            self.folder,
            dtype=getattr(torch, loading.dtype),
            attn_implementation=loading.attention,
            trust_remote_code=loading.trust_remote_code,
        )
        with_plain_layers(model)
        if sharded:
            processes.shard(model, loading.device)
        return model.to(loading.device).eval()


def open_base(path: Path) -> Base:
    """Open the output of the foundation stage and check its files.

    Raises:
        FoLoRAError: it is missing, or a file differs from the manifest.
    """
    manifest = read_json(path / MANIFEST_FILE)
    check_manifest(path, manifest, artefact="foundation")
    fields_of(path / MANIFEST_FILE, FoundationManifest, manifest)
    code = manifest["loading"]["trust_remote_code"]
    folder = pinned_folder(manifest["source"], manifest["commit"], code=code) if manifest["source"] else path
    found = digests(folder, code=code)
    for field in ("model", "tokenizer"):
        if found[field] != manifest[field]:
            raise FoLoRAError(
                f"{folder}: the {field} files are not those that were pinned: run the foundation stage again"
            )
    return Base(folder, manifest)


def digests(folder: Path, *, code: bool = False) -> dict[str, Any]:
    """Digests of the weight and tokenizer files of a model folder, and of each file.

    Args:
        folder: of the model.
        code: whether Python files belong to the model.

    Raises:
        FoLoRAError: there are no safetensors weights or no tokenizer.
    """
    result: dict[str, Any] = {}
    for field, patterns in (("model", model_patterns(code=code)), ("tokenizer", TOKENIZER_PATTERNS)):
        files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
        result[f"{field}_files"] = {file.name: digest_of_file(file) for file in files}
        result[field] = digest_of(result[f"{field}_files"])
    if not any(name.endswith(".safetensors") for name in result["model_files"]):
        raise FoLoRAError(f"{folder}: holds no *.safetensors weights: name a folder or model that does")
    if not result["tokenizer_files"]:
        raise FoLoRAError(f"{folder}: holds no tokenizer: save one beside the weights")
    return result


def model_patterns(*, code: bool) -> tuple[str, ...]:
    """The files that a model consists of, with or without Python code of its own."""
    return (*WEIGHT_PATTERNS, "*.py") if code else WEIGHT_PATTERNS


def pinned_folder(source: str, revision: str | None, *, code: bool = False, weights: bool = True) -> Path:
    """The local folder of a model: itself, or the hub's snapshot of it.

    Args:
        source: local folder or hub id.
        revision: on the hub.
        code: whether Python files belong to the model.
        weights: whether these are fetched, beside configuration and tokenizer.

    Raises:
        FoLoRAError: neither a folder nor a model that the hub serves.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    patterns = [*model_patterns(code=code), *TOKENIZER_PATTERNS]
    without = None if weights else WEIGHTS
    fetch = partial(snapshot_download, source, revision=revision, allow_patterns=patterns, ignore_patterns=without)
    return Path(from_hub("foundation.model", source, revision, fetch))


def check_model(folder: Path, loading: Loading) -> None:
    """See that a folder holds a causal language model that can be adapted, without reading its weights.

    Raises:
        FoLoRAError: it is a model of another kind, quantised, of unknown or untrusted code, or the device or a special
            token is missing.
    """
    from transformers import AutoConfig

    check_device(loading.device)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=loading.trust_remote_code)
        named = [str(name) for name in config.architectures or []]
    except configuration_errors() as error:
        reason = str(error)[:200]
        raise FoLoRAError(f"{folder}: its configuration cannot be read: {reason}") from error
    check_kind(str(folder), config, named)
    load_tokenizer(folder, loading)


def check_kind(source: str, config: PretrainedConfig, named: list[str]) -> None:
    """See that a configuration is that of a causal language model whose weights are numbers.

    Args:
        source: of the model, for the message.
        config: of the model.
        named: the classes that it names.

    Raises:
        FoLoRAError: it is not.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:  # on CUDA too: starts, DoRA and merging compute with W, which packed integers are not
        how = quantised.get("quant_method") if isinstance(quantised, dict) else None
        advice = "name the model that they were made from; loading.dtype: bfloat16 halves its memory"
        raise FoLoRAError(f"{source}: its weights are quantised ({how or 'in a way that is not named'}): {advice}")
    if not hasattr(config, "auto_map"):  # code of its own says itself what it is
        made: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if made is None or config.is_encoder_decoder or (named and made.__name__ not in named):
            what = ", ".join(named) or type(config).__name__
            raise FoLoRAError(f"{source}: is a {what}, not a causal language model: name one that is")


def configuration_errors() -> tuple[type[Exception], ...]:
    """What transformers raises of a configuration that is damaged."""
    from huggingface_hub.errors import StrictDataclassError

    return OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, StrictDataclassError


def check_device(device: str) -> None:
    """See that a device is there.

    Raises:
        FoLoRAError: it is not.
    """
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise FoLoRAError("foundation.loading.device: torch finds no CUDA device here: take cpu, or a GPU machine")


def load_tokenizer(folder: Path, loading: Loading) -> PreTrainedTokenizerBase:
    """Load a tokenizer that pads on the right, with EOS where it has no padding token, and ends no text by itself.

    Raises:
        FoLoRAError: it cannot be read, has no EOS, no BOS and none is named, does not know the one that is, or cannot
            be kept from ending every text.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=loading.trust_remote_code)
        tokenizer("")  # what is damaged may be found in use
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, configuration_errors()):
            raise
        reason = str(error)[:200]  # the tokenizers library raises the bare class
        raise FoLoRAError(f"{folder}: its tokenizer cannot be read: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise FoLoRAError(f"{folder}: its tokenizer has no eos_token: choose a model that has one")
    if loading.bos_token is not None:
        if loading.bos_token not in tokenizer.get_vocab():
            raise FoLoRAError(f"foundation.loading.bos_token: {loading.bos_token!r} is no token of {folder}")
        tokenizer.bos_token = loading.bos_token
    if tokenizer.bos_token_id is None:
        advice = "name a token that every text may begin with, such as its <|endoftext|>"
        raise FoLoRAError(f"foundation.loading.bos_token: the tokenizer of {folder} has no bos_token: {advice}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if _ends_texts(tokenizer):  # the harness would ask what follows the end of a text
        tokenizer.add_bos_token, tokenizer.add_eos_token = True, False
        if _ends_texts(tokenizer):
            advice = "set add_eos_token: false in its tokenizer_config.json"
            raise FoLoRAError(f"{folder}: its tokenizer puts EOS after every text: {advice}")
    tokenizer.padding_side = "right"  # as the objective cuts micro-batches; Llama's and Gemma's own default is left
    return tokenizer


def _ends_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts EOS after a text, even an empty one."""
    ids = tokenizer("")["input_ids"]
    return bool(ids[-1:] == [tokenizer.eos_token_id] and ids != [tokenizer.bos_token_id])  # one token may be both


def with_plain_layers(model: PreTrainedModel) -> None:
    """Turn every ``Conv1D`` of GPT-2 and its kin into the ``torch.nn.Linear`` that computes the same, in place.

    Adapters made on it fit the original: LoRA's factors do not depend on how W is stored.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            linear = torch.nn.Linear(inputs, outputs, device="meta")
            linear.weight = torch.nn.Parameter(module.weight.detach().mT.contiguous())
            linear.bias = module.bias
            model.set_submodule(name, linear)


def with_own_layers(model: PreTrainedModel) -> None:
    """Undo ``with_plain_layers``, in place: a saved model is then read as others of its class are."""
    import torch
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        original: nn.Module = type(model)(model.config)
    for name, module in original.named_modules():
        if isinstance(module, Conv1D):
            linear: Any = model.get_submodule(name)
            stored = Conv1D(linear.out_features, linear.in_features)
            stored.weight = torch.nn.Parameter(linear.weight.detach().mT.contiguous())
            stored.bias = linear.bias
            model.set_submodule(name, stored)
