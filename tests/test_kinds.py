"""Every kind of method through the real stages: it starts at the base model, trains, and exports what it trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from folora.adapter import load_checkpoint
from folora.methods import kinds
from folora.params import Params
from folora.storage import read_table
from folora.tracking import Sender
from folora.train import Training, TrainInputs, train_run

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Pipeline

pytestmark = pytest.mark.usefixtures("in_tmp")

RUN = "lora-3e-3-s0"
VARIANTS = {kind: {"kind": kind} for kind in kinds()} | {
    "corda-instruction": {"kind": "corda", "mode": "instruction"},
    "lora-null-v2": {"kind": "lora-null", "freeze_a": True},
    "distillation": {"kind": "lora", "replay": 4, "replay_loss": "distillation"},
    "distillation on edited weights": {"kind": "pissa", "replay": 4, "replay_loss": "distillation"},
    "mask the target": {"kind": "lora", "mask_target": 1.0},
    "mask the target with folora": {"kind": "folora", "mask_target": 1.0, "replay": 4},
    "kl budget": {"kind": "lora", "kl_budget": 1e-4},
    "equal tokens": {"kind": "lora", "replay": 4, "replay_match": "tokens"},
    "filter": {"kind": "folora", "form": "filter"},
    "gradient": {"kind": "folora", "gate_on": "gradient"},
    "hard": {"kind": "folora", "gate": "hard"},
    "quantile": {"kind": "folora", "tau": {"quantile": 0.5}},
    "budget": {"kind": "folora", "tau": {"budget": 0.1}},
    "oas": {"kind": "folora", "shrinkage": "oas"},
    "ledoit-wolf": {"kind": "folora", "shrinkage": "ledoit-wolf"},
    "unit columns": {"kind": "folora", "columns": "unit"},
    "spectral start": {"kind": "folora", "start": "spectral"},
    "kaiming start": {"kind": "folora", "start": "kaiming"},
    "gate on b, diag": {"kind": "folora", "gate_b": "diag", "refresh_b": 2},
    "gate on b, full": {"kind": "folora", "gate_b": "full", "refresh_b": 2},
    "gate on b only": {"kind": "folora", "gate_a": False, "gate_b": "diag"},
    "frozen a": {"kind": "folora", "freeze_a": True},
    **{
        f"basis {name}": {"kind": "folora", "basis": name}
        for name in ("penalty", "utility", "difference", "random", "identity")
    },
}


@pytest.mark.parametrize("section", VARIANTS.values(), ids=VARIANTS.keys())
def test_starts_at_the_base_and_exports_what_it_trained(
    section: dict[str, Any], pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = pipeline.values()
    values["methods"]["lora"] = section
    values["train"] |= {"steps": 3, "checkpoints": 1}
    params = Params.model_validate(values)
    ids = torch.tensor([row[:6] for row in read_table(pipeline.task)[0]["input_ids"].to_pylist()[:16]])
    with torch.no_grad():
        base = pipeline.base.load_model()(input_ids=ids).logits
    seen: list[Any] = []
    fit = Training.fit

    def spy(training: Training, *arguments: Any) -> None:
        adapted = training.adapted
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            torch.testing.assert_close(adapted.model.eval()(**batch).logits, base, rtol=0, atol=1e-4)
        fit(training, *arguments)
        torch.testing.assert_close(adapted.base_logits(batch), base, rtol=0, atol=1e-4)
        seen.append(adapted)

    monkeypatch.setattr(Training, "fit", spy)
    monkeypatch.setattr(Sender, "do", lambda *_: None)  # MLflow takes as long as such a training
    inputs = TrainInputs(pipeline.task, pipeline.proxy, pipeline.heldout, pipeline.spectra)
    train_run(params, RUN, pipeline.base, inputs, tmp_path / "run")
    with torch.no_grad():
        trained = seen[0].model.eval()(input_ids=ids).logits
        exported = load_checkpoint(pipeline.base.load_model(), tmp_path / "run" / "adapter")
        torch.testing.assert_close(exported(input_ids=ids).logits, trained, rtol=0, atol=1e-4)
    assert (trained - base).abs().max() > 1e-3
