"""What a method is: what it trains, how the adapter starts, how it is updated, and what enters the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from folora.adapter import AdaptedModel, Context
    from folora.deltas import LayerGroup


class Method(BaseModel):
    """A method with its parameters, as an entry of ``methods:`` gives them.

    A subclass declares ``kind: Literal["..."]``, which registers it, its own parameters, and overrides what differs
    from plain LoRA with AdamW. The options below are off unless asked for, and go with every kind.

    Attributes:
        paper: arXiv id, or what else it stems from.
        trains: what training changes.
        freezes: what of the adapter or the weights stays as it is.
        export: what a checkpoint is.
        shardable: whether W may be sharded over processes: only the forward pass reads it, and nothing changes it.
        weight_decay: decoupled weight decay of everything that is trained.
        replay: proxy sequences that join the task rows in every batch.
        replay_loss: how they are learned: their sampled tokens, or the base model's distribution at each of them
            (self-distillation, KL(base ‖ adapted)).
        replay_match: whether training with replay has as many steps as without, or as many tokens.
        mask_target: weight of KL(base ‖ adapted) over the vocabulary without the right token, at the learned tokens
            of the task ("Mask the Target", arXiv 2605.29498).
        kl_budget: the greatest KL to the base, in nats per token of its own text, that training may reach.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    paper: ClassVar[str]
    trains: ClassVar[str] = "A, B"
    freezes: ClassVar[str] = "W"
    export: ClassVar[str] = "LoRA of rank r"
    shardable: ClassVar[bool] = True

    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    replay: Annotated[int, Field(ge=0, le=100_000)] = 0
    replay_loss: Literal["tokens", "distillation"] = "tokens"
    replay_match: Literal["steps", "tokens"] = "steps"
    mask_target: Annotated[float, Field(ge=0, le=1000)] = 0.0
    kl_budget: Annotated[float, Field(gt=0)] | None = None

    def lora_options(self) -> dict[str, Any]:
        """Fields of PEFT's ``LoraConfig`` beside rank, alpha and target modules."""
        return {}

    def adapt(self, model: PreTrainedModel, context: Context) -> AdaptedModel:
        """Make the model that is trained; at its start it computes what the base model does."""
        from folora.adapter import add_lora

        adapted = add_lora(model, context, **self.lora_options())
        self.initialise(adapted.groups)
        adapted.take_out()
        return adapted

    def initialise(self, groups: list[LayerGroup]) -> None:
        """Set A and B in place; PEFT has already drawn A at random and set B to zero."""

    def update_groups(self, adapted: AdaptedModel) -> list[dict[str, Any]]:
        """Parameter groups of ``optimizer``: here those of torch's AdamW, of gated methods with basis and gate."""
        return [{"params": adapted.trained}]

    def optimizer(self, adapted: AdaptedModel, learning_rate: float) -> torch.optim.Optimizer:
        """The optimizer of everything that is trained: AdamW, unless a method has its own update rule."""
        import torch

        return torch.optim.AdamW(self.update_groups(adapted), lr=learning_rate, weight_decay=self.weight_decay)

    @classmethod
    def has_kind(cls) -> bool:
        """Whether this class is a method of its own, not a base of others."""
        return "kind" in cls.__annotations__

    @classmethod
    def kind_name(cls) -> str:
        """The word that names this method in params.yaml."""
        return get_args(cls.model_fields["kind"].annotation)[0]
