"""How to use what a run trained: Python and shell commands to copy."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import indent
from typing import TYPE_CHECKING

from folora.adapter_config import read_adapter_config
from folora.storage import PEFT_CONFIG, require

if TYPE_CHECKING:
    from pathlib import Path

TRANSFORMERS = "from transformers import AutoModelForCausalLM"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank


@dataclass(frozen=True)
class Usage:
    """How to use an adapter.

    Attributes:
        load: Python that leaves the adapted model in ``model``.
        serve: shell commands.
    """

    load: str
    serve: str

    def text(self) -> str:
        """For people."""
        return f"load it:\n\n{indent(self.load, '    ')}\n\nserve it:\n\n{indent(self.serve, '    ')}"


def usage_of(name: str, adapter: Path, model: str, *, code: bool = False) -> Usage:
    """How to load an adapter, and how to serve it.

    Args:
        name: what the server calls it.
        adapter: its folder.
        model: hub id or folder of the base model.
        code: whether it comes with Python code of its own, which is trusted.

    Raises:
        FoLoRAError: the adapter is not there.
    """
    base = from_pretrained(model, code=code)
    trust = " --trust-remote-code" if code else ""
    whole = f"# first, in Python: model.save_pretrained({name!r})\nvllm serve {name} --tokenizer {model}{trust}"
    if not (require(adapter) / PEFT_CONFIG).exists():
        lines = ["from pathlib import Path", "from folora.adapter import load_checkpoint"]
        load = f"model = load_checkpoint({base}, Path({str(adapter)!r}))"
        return Usage("\n".join([*lines, TRANSFORMERS, load]), whole)
    config = read_adapter_config(adapter)
    load = f"model = PeftModel.from_pretrained({base}, {str(adapter)!r})"
    lines = ["from peft import PeftModel", TRANSFORMERS, load]
    rank = next((allowed for allowed in VLLM_RANKS if allowed >= config.r), None)
    if config.use_dora or rank is None:  # vLLM refuses DoRA, and an adapter of more than its largest rank
        return Usage("\n".join([*lines, "model = model.merge_and_unload()"]), whole)
    modules = f"--enable-lora --max-lora-rank {rank} --lora-modules {name}={adapter}"
    return Usage("\n".join(lines), f"vllm serve {model}{trust} {modules}")


def from_pretrained(place: str, *, code: bool) -> str:
    """Python that loads a model, from a hub or a folder, with or without trusted code of its own."""
    trust = ", trust_remote_code=True" if code else ""
    return f"AutoModelForCausalLM.from_pretrained({place!r}{trust})"
