"""The texts that drift is measured on: held-out text of the base model, and others that the parameters name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folora.divergence import HeldOutText, TokenDivergence
from folora.rows import HELDOUT, PROXY_COLUMNS, encode, read_rows, render
from folora.storage import read_table

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from folora.base import Base
    from folora.divergence import BaseLogits
    from folora.params import Params, Text
    from folora.storage import Record

Readings = dict[str, TokenDivergence]  # by name of the text; ``HELDOUT`` is the base model's own


class Texts:
    """Every text with the base model's predictions.

    Args:
        params: names them.
        base: of the held-out text.
        model: the base model.
        tokenizer: of the base model.
        folder: ``evaluation.tasks``, which holds the data sets.
        heldout: artefact of the heldout stage.

    Raises:
        FoLoRAError: the held-out text is of another model, or a data set is not as declared.
    """

    def __init__(
        self,
        params: Params,
        base: Base,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        heldout: Path,
    ) -> None:
        settings = params.proxy.heldout_sampling()
        table, _ = read_table(heldout, PROXY_COLUMNS, artefact="proxy", **base.identity, shard=HELDOUT, proxy=settings)
        rows = {HELDOUT: table["token_ids"].to_pylist()}
        for name, text in params.evaluation.texts.items():
            base.check_length(text.max_length, f"evaluation.texts.{name}.max_length")
            rows[name] = token_rows(text, name, folder, tokenizer)
        size, padding = params.evaluation.batch_size, tokenizer.pad_token_id
        self._texts = {name: HeldOutText(model, ids, size, padding) for name, ids in rows.items()}

    def read(self, model: PreTrainedModel | PeftModel, base_logits: BaseLogits | None = None) -> Readings:
        """Measure a model on every text; see ``HeldOutText.read``."""
        return {name: text.read(model, base_logits) for name, text in self._texts.items()}


def token_rows(text: Text, name: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the rows of a text, BOS first.

    Raises:
        FoLoRAError: the data set is missing or lacks a column.
    """
    dataset = str(folder / text.dataset)
    rows = read_rows(dataset, f"evaluation.texts.{name}.dataset")
    chosen = rows.select(range(min(text.rows, len(rows))))
    return [encode(one, tokenizer)[: text.max_length] for (one,) in render(chosen, [text.text], dataset)]


def figures(readings: Readings) -> dict[str, float]:
    """``kl`` and ``perplexity`` of the held-out text; of another they end in its name, as in ``kl/NAME``."""
    found: dict[str, float] = {}
    for name, reading in readings.items():
        end = "" if name == HELDOUT else f"/{name}"
        found |= {f"{figure}{end}": value for figure, value in vars(reading.mean()).items()}
    return found


def token_records(readings: Readings) -> list[Record]:
    """A row for each row of each text: ``text``, ``row``, and lists ``kl`` and ``loss`` with a value a token."""
    return [
        {"text": name, "row": row, "kl": kl.tolist(), "loss": loss.tolist()}
        for name, reading in readings.items()
        for row, (kl, loss) in enumerate(zip(reading.kl, reading.loss, strict=True))
    ]
