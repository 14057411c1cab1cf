"""The foundation stage: train the offline model from scratch, or pin a model that exists.

The offline preset trains a small Llama on the synthetic world, hidden matrices with Muon, the rest with AdamW. The
loss covers prompts as well as answers, so that the model can later be sampled from its BOS token.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

from folora.base import check_model, digests, pinned_folder
from folora.errors import FoLoRAError
from folora.hub import check_unmoved, keep_pin
from folora.loading import Loading
from folora.storage import FORMAT, MANIFEST_FILE, Manifest, digest_of_file, made_with, publish, require, write_json
from folora.world import VOCABULARY, Skill, build_skills, pretraining_items

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from torch import Tensor
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from folora.params import OfflineFoundation, PretrainedFoundation, World

GGUF = ".gguf"  # what the name of such a file ends with
PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
WARMUP_STEPS = 50
DECAY_SHARE = 0.6  # the learning rate falls linearly to zero over this last part of the steps
CLIP_NORM = 1.0
LOADING = Loading(device="cpu", dtype="float32", attention="eager", bos_token=None, trust_remote_code=False)


def train_foundation(settings: OfflineFoundation, world: World, output: Path) -> None:
    """Train the offline foundation and write model, tokenizer and manifest to ``output``."""
    skills = build_skills(world)
    tokenizer = character_tokenizer()
    model = pretrain(settings, skills, tokenizer)
    with publish(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(
            folder / MANIFEST_FILE,
            _manifest(folder, LOADING, None, None)
            | {"foundation": settings.model_dump(), "world": world.model_dump()}
            | made_with(),
        )


def pin_foundation(settings: PretrainedFoundation, output: Path) -> str | None:
    """Write a manifest that pins an existing model: its source, commit and the digest of every file.

    A GGUF file is converted to safetensors once, and lies in ``output`` like an offline model.

    Returns:
        The commit; None of files.

    Raises:
        FoLoRAError: there is no such model, it cannot be adapted, or the revision is no longer what it was here.
    """
    if settings.model.endswith(GGUF):
        convert_gguf(Path(settings.model), settings.loading, output)
        return None
    code = settings.loading.trust_remote_code
    folder = pinned_folder(settings.model, settings.revision, code=code, weights=False)
    check_model(folder, settings.loading)
    # the hub keeps a snapshot in a folder named after its commit
    commit = folder.name if folder.parent.name == "snapshots" else settings.revision
    if commit is not None:
        check_unmoved(settings.model, settings.revision, commit)
    folder = pinned_folder(settings.model, commit, code=code)
    with publish(output) as partial:
        partial.mkdir()
        write_json(partial / MANIFEST_FILE, _manifest(folder, settings.loading, settings.model, commit))
    if commit is not None:
        keep_pin(settings.model, settings.revision, commit)
    return commit


def convert_gguf(file: Path, loading: Loading, output: Path) -> None:
    """Write the dequantised weights and the tokenizer of a GGUF file as a model folder.

    Raises:
        FoLoRAError: there is no such file, it is damaged or of an unknown architecture, or the extra is missing.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    require(file)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),  # without it the weights cannot be saved
            dtype=getattr(torch, loading.dtype),
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        raise FoLoRAError(f"{file}: reading GGUF needs another package: pip install 'folora[gguf]'") from error
    except Exception as error:  # the reader of a damaged file may raise anything
        reason = str(error)[:200]
        raise FoLoRAError(f"{file}: cannot be read as GGUF: {reason}") from error
    with publish(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        check_model(folder, loading)
        about = {"gguf": {"file": file.name, "digest": digest_of_file(file)}}
        write_json(folder / MANIFEST_FILE, _manifest(folder, loading, None, None) | about | made_with())


def _manifest(folder: Path, loading: Loading, source: str | None, commit: str | None) -> Manifest:
    about = {"format": FORMAT, "artefact": "foundation", "source": source, "commit": commit}
    return about | {"loading": loading.model_dump()} | digests(folder, code=loading.trust_remote_code)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of the world, and PAD, BOS, EOS and UNKNOWN; encoding a text puts BOS before it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate((PAD, BOS, EOS, UNKNOWN, *VOCABULARY))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def offline_config(settings: OfflineFoundation, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The shape of the offline model."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="eager",  # type: ignore[call-arg]
    )


def pretrain(
    settings: OfflineFoundation, skills: dict[str, Skill], tokenizer: PreTrainedTokenizerFast
) -> LlamaForCausalLM:
    """Train a Llama from scratch on the pretraining mixture of the world."""
    import torch
    from tqdm import tqdm
    from transformers import LlamaForCausalLM

    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(offline_config(settings, tokenizer))
    optimizers = _optimizers(model, settings)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, _schedule(settings.steps)) for o in optimizers]
    batches = _pretraining_batches(settings, skills, tokenizer)
    for _ in tqdm(range(settings.steps), desc="pretraining"):
        input_ids = next(batches)
        labels = input_ids.masked_fill(input_ids == tokenizer.pad_token_id, -100)
        # padding lies on the right, where causal attention never looks back from a real token: no mask is needed
        model(input_ids=input_ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return model.eval()


def _optimizers(model: LlamaForCausalLM, settings: OfflineFoundation) -> list[torch.optim.Optimizer]:
    import torch

    from folora.muon import Muon

    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    chosen = set(map(id, hidden))
    rest = [p for p in model.parameters() if id(p) not in chosen]
    decay = settings.weight_decay
    return [
        Muon(hidden, lr=settings.learning_rate, weight_decay=decay),
        torch.optim.AdamW(rest, lr=settings.embedding_learning_rate, weight_decay=decay),
    ]


def _schedule(steps: int) -> Callable[[int], float]:
    return lambda step: min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (DECAY_SHARE * steps))


def _pretraining_batches(
    settings: OfflineFoundation, skills: dict[str, Skill], tokenizer: PreTrainedTokenizerFast
) -> Iterator[Tensor]:
    """Right-padded batches (batch, length) of token ids, endlessly."""
    import torch

    items = pretraining_items(skills, random.Random(settings.seed))
    ids = tokenizer.get_vocab()
    while True:
        documents = [next(items) for _ in range(settings.batch_size)]
        rows = [[ids[BOS], *(ids[c] for c in item["prompt"] + item["response"]), ids[EOS]] for item in documents]
        length = max(map(len, rows))
        if length > settings.context:
            raise FoLoRAError(f"foundation.context: {settings.context} is shorter than a document of {length} tokens")
        yield torch.tensor([row + [ids[PAD]] * (length - len(row)) for row in rows])
