"""How to use what the subject of a study trained: commands and code to copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folora.storage import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from folora.report.study import Study

VLLM_RANK = 16  # what vLLM allows unless told otherwise
VLLM_RANKS = (32, 64, 128, 256, 320, 512)


def snippets(study: Study, runs: Path) -> list[dict[str, str]]:
    """``title`` and ``code`` of each way to use the subject's result of the first seed, at its best rate."""
    name = study.subject
    final = next(iter(study.comparison.arms[name].finals.values()))
    record = study.record(final)
    folder = runs / name / final[0] / "adapter"
    if record["export"] == "weights":
        return [{"title": f"{name} changed the weights of the base model; in Python:", "code": _weights(folder)}]
    base = read_json(folder / "adapter_config.json")["base_model_name_or_path"]
    peft = {"title": f"The {record['export']} adapter of {name}, in Python:", "code": _peft(base, folder)}
    if record["export"] != "LoRA":
        return [peft]  # vLLM serves plain LoRA only
    return [
        peft,
        {"title": "Served by vLLM, on a machine that has it:", "code": _vllm(name, base, folder, record["rank"])},
    ]


def _peft(base: str, folder: Path) -> str:
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base}")\n'
        f'model = PeftModel.from_pretrained(base, "{folder}")'
    )


def _vllm(name: str, base: str, folder: Path, rank: int) -> str:
    limit = next((f" --max-lora-rank {most}" for most in VLLM_RANKS if rank <= most), "") if rank > VLLM_RANK else ""
    return f"vllm serve {base} --enable-lora{limit} \\\n  --lora-modules {name}={folder}"


def _weights(folder: Path) -> str:
    return (
        "from pathlib import Path\n\n"
        "from folora.adapter import load_checkpoint\n"
        "from folora.base import open_base\n\n"
        'base = open_base(Path("artifacts/foundation")).load_model()\n'
        f'model = load_checkpoint(base, Path("{folder}"))'
    )
