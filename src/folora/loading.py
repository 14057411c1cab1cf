"""How the base model is loaded: a part of ``params.yaml``, and of the manifest that every stage reads."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

HALF_ONLY = "flash_attention_2"  # the implementation of attention that has no float32


class Loading(BaseModel):
    """How every stage loads the base model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: Annotated[Literal["cpu", "cuda"], Field(description="where it runs")]
    dtype: Annotated[Literal["float32", "bfloat16"], Field(description="of the frozen weights; the adapter is float32")]
    attention: Annotated[
        Literal["eager", "sdpa", "flash_attention_2"],
        Field(description="implementation; eager is fastest for short rows on a CPU"),
    ]
    bos_token: Annotated[
        str | None, Field(description="what every text begins with, for a tokenizer without a BOS token of its own")
    ]
    trust_remote_code: Annotated[bool, Field(description="whether code from the model's repository may run here")]

    @field_validator("device", mode="before")
    @classmethod
    def _not_mps(cls, device: Any) -> Any:
        if device == "mps":
            raise ValueError("mps has no float64, which sampling and the sums of moments need: take cpu")
        return device

    @model_validator(mode="after")
    def _attention_is_to_be_had(self) -> Loading:
        if self.attention == HALF_ONLY and (self.device, self.dtype) != ("cuda", "bfloat16"):
            raise ValueError(f"attention: {HALF_ONLY} needs device cuda and dtype bfloat16: take sdpa")
        return self
