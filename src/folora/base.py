"""The base model as every stage opens it: the folder of the foundation stage, checked against its manifest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from folora.errors import FoLoRAError
from folora.storage import MANIFEST_FILE, Manifest, check_manifest, digest_of, digest_of_file, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
TOKENIZER_PATTERNS = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "chat_template*", "*.model")


@dataclass(frozen=True)
class Base:
    """A base model on disk.

    Attributes:
        folder: holds the weights and the tokenizer.
        manifest: of the foundation stage; ``model`` and ``tokenizer`` are digests of the files' content.
    """

    folder: Path
    manifest: Manifest

    @property
    def identity(self) -> dict[str, str]:
        """The manifest fields that every artefact made from this base carries."""
        return {"model": self.manifest["model"], "tokenizer": self.manifest["tokenizer"]}

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
        """Load the tokenizer, which must have a BOS and an EOS token.

        Raises:
            FoLoRAError: a special token is missing.
        """
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        for token in ("bos_token", "eos_token"):
            if getattr(tokenizer, f"{token}_id") is None:
                raise FoLoRAError(f"{self.folder}: its tokenizer has no {token}: choose a model that has one")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def load_model(self) -> PreTrainedModel:
        """Load the weights in float32, ready for evaluation."""
        import torch
        from transformers import AutoModelForCausalLM

        # eager attention beats the fused kernel on a CPU at these short lengths
        return AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()


def open_base(path: Path) -> Base:
    """Open the output of the foundation stage and check its files.

    Raises:
        FoLoRAError: it is missing, or a file differs from the manifest.
    """
    manifest = read_json(path / MANIFEST_FILE)
    check_manifest(path, manifest, artefact="foundation")
    folder = pinned_folder(manifest["source"], manifest["commit"]) if manifest["source"] else path
    found = digests(folder)
    for field in ("model", "tokenizer"):
        if found[field] != manifest[field]:
            raise FoLoRAError(
                f"{folder}: the {field} files are not those that were pinned: run the foundation stage again"
            )
    return Base(folder, manifest)


def digests(folder: Path) -> dict[str, Any]:
    """Digests of the weight and tokenizer files of a model folder, and of each file.

    Raises:
        FoLoRAError: there are no safetensors weights or no tokenizer.
    """
    result: dict[str, Any] = {}
    for field, patterns in (("model", WEIGHT_PATTERNS), ("tokenizer", TOKENIZER_PATTERNS)):
        files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
        result[f"{field}_files"] = {file.name: digest_of_file(file) for file in files}
        result[field] = digest_of(result[f"{field}_files"])
    if not any(name.endswith(".safetensors") for name in result["model_files"]):
        raise FoLoRAError(f"{folder}: holds no *.safetensors weights: name a folder or model that does")
    if not result["tokenizer_files"]:
        raise FoLoRAError(f"{folder}: holds no tokenizer: save one beside the weights")
    return result


def pinned_folder(source: str, revision: str | None) -> Path:
    """The local folder of a model: itself, or the hub's snapshot of it.

    Raises:
        FoLoRAError: neither a folder nor a model that the hub serves.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = [*WEIGHT_PATTERNS, *TOKENIZER_PATTERNS]
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FoLoRAError(
            f"foundation.model: {source!r} is neither a folder here nor to be had from the hub: {reason}"
        ) from error
