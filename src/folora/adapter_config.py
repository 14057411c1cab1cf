"""PEFT's configuration of a saved adapter, as far as it is read here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from folora.storage import PEFT_CONFIG, fields_of, read_json

if TYPE_CHECKING:
    from pathlib import Path


class AdapterConfig(BaseModel):
    """The fields of PEFT's configuration of an adapter that are used here."""

    model_config = ConfigDict(strict=True, frozen=True)

    r: Annotated[int, Field(ge=1)]
    use_dora: bool = False
    base_model_name_or_path: str | None = None


def read_adapter_config(adapter: Path) -> AdapterConfig:
    """Read the configuration of a LoRA adapter.

    Raises:
        FoLoRAError: it is missing or damaged.
    """
    path = adapter / PEFT_CONFIG
    return fields_of(path, AdapterConfig, read_json(path))
