"""Within which limits moments and spectra are trusted. Stages refuse what lies beyond; the report shows it in red."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from collections.abc import Mapping

# Products of a moment are float32, on some GPUs TF32: entries, traces and Σ ‖x‖⁴ of one text agree no better than this.
PRODUCT_TOLERANCE = 1e-3
# Residual and deviation from orthonormality of a float64 solve are near 1e-12. Beyond this λ has lost the digits that
# a gate shows.
SOLVE_TOLERANCE = 1e-4
# Of directions found by block Lanczos those with the least λ are known less well, and their gates are nearly shut.
LEADING_TOLERANCE = 1e-2
# Basis and moments are stored as float32, so VᵀC_pV read back deviates from I by its rounding times the condition.
STORAGE_TOLERANCE, ROUNDING_TOLERANCE = 1e-3, 1e-6
# A greater count of tokens is a damaged one: float64 sums over so many would have lost single tokens.
MOST_TOKENS = 2**53
# Share of a layer's gates on which two halves of the proxy text may differ; see docs/method.md.
GATE_DIFFERENCE = 0.05

TOP_SHARE = 0.5  # of a penalty's trace that one direction may have
LOOPING = 0.05  # share of the proxy text's sequences that may end in a loop

Size = Annotated[float, Field(ge=0)]
TokenCount = Annotated[int, Field(ge=1, le=MOST_TOKENS)]


class PencilHealth(BaseModel):
    """How far the pencil of one layer input can be trusted; ``pencil.solve`` says what it means."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    width: Annotated[int, Field(ge=1)]
    shrinkage: Annotated[float, Field(ge=0, le=0.5)]
    residual: Size
    orthonormality: Size
    condition: Size
    top_share: Size
    penalty_rank: Size
    utility_rank: Size
    left_out: Size = 0.0


class HealthRecord(PencilHealth):
    """What the manifest of a spectrum says of one layer input: beside its pencil's health that of the moments."""

    proxy_fourth: Size
    tokens_per_width: Size | None = None
    gate_difference: Size | None = None
    tokens_needed: Annotated[int, Field(ge=0)] | None = None


class SpectrumManifest(BaseModel):
    """The fields of a spectrum's manifest that its readers use."""

    model_config = ConfigDict(strict=True, frozen=True)

    groups: Annotated[dict[str, list[str]], Field(min_length=1)]
    parts: Annotated[list[int], Field(min_length=1)]
    part: int
    proxy_tokens: TokenCount
    task_tokens: TokenCount
    health: dict[str, HealthRecord]
    sequences: Annotated[int, Field(ge=1)]
    loops: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _every_input_has_a_record(self) -> SpectrumManifest:
        if self.groups.keys() != self.health.keys():
            raise ValueError("health and groups name other layer inputs")
        return self


def breaches(health: Mapping[str, PencilHealth]) -> list[str]:
    """One line for each figure of a layer input that is beyond its limit, and what to do."""
    found = []
    for name, record in health.items():
        solved = SOLVE_TOLERANCE, "shrinkage"
        residual = (LEADING_TOLERANCE, "directions") if record.left_out else solved
        for figure, (limit, remedy) in {"residual": residual, "orthonormality": solved}.items():
            value = getattr(record, figure)
            if not value <= limit:
                reason = f"the {figure} of its pencil is {value:.0e}, more than {limit:.0e}"
                found.append(f"{name}: {reason}: raise spectrum.{remedy}")
    return found


def too_top_heavy(health: Mapping[str, PencilHealth]) -> str | None:
    """One line where one direction has more of the proxy text's moment than ``TOP_SHARE``; None where none has.

    Scale and ridge follow from the trace: where one direction holds nearly all of it (the first token's, in many
    models) the ridge swamps the others, and λ = 1 is no equal share.
    """
    heavy = [name for name, record in health.items() if record.top_share > TOP_SHARE]
    if not heavy:
        return None
    worst = max(heavy, key=lambda name: health[name].top_share)
    return (
        f"{len(heavy)} of {len(health)} layer inputs have more than {TOP_SHARE:.0%} of the proxy text's moment in one "
        f"direction, most of all {worst} ({health[worst].top_share:.0%}), and ridge and τ say little of the others: "
        "if it is the first token's, set covariance.proxy_positions to without_first"
    )


def too_many_loops(sequences: int, loops: int) -> str | None:
    """One line where more of the proxy text than ``LOOPING`` repeats itself; None where it does not."""
    if loops <= LOOPING * sequences:
        return None
    advice = "sample at a higher temperature, or shorter sequences"
    return f"{loops:,} of {sequences:,} sequences of the proxy text end in a loop: {advice}"


def too_few_tokens(health: Mapping[str, HealthRecord], tokens: int) -> str | None:
    """One line where gates change too much between the halves of the proxy text, of so many tokens; else None."""
    needed = {name: record.tokens_needed or 0 for name, record in health.items()}
    weak = [name for name, count in needed.items() if count > tokens]
    if not weak:
        return None
    worst = max(weak, key=lambda name: needed[name])
    difference = health[worst].gate_difference or 0.0
    return (
        f"{len(weak)} of {len(health)} layer inputs have gates of which two halves of the proxy text differ on more "
        f"than {GATE_DIFFERENCE:.0%}, most of all {worst} ({difference:.0%}): {tokens:,} tokens "
        f"are too few, some {needed[worst]:,} are needed: raise proxy.sequences or add to proxy.shards"
    )
