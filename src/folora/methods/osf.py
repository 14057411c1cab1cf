"""OSF, orthogonal subspace fine-tuning (Nayak et al., arXiv 2504.07097): only the minor singular triplets of W train.

    W = U_h S_h V_hᵀ + U_l S_l V_lᵀ;   the r minor triplets U_l, S_l, V_l train

Their gradients are projected off U_h and V_h, by PEFT. Adam then divides them entry by entry, which turns them: the
leading subspaces are kept nearly, not exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from folora.methods.base import Method

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from folora.adapter import AdaptedModel, Context


class OSF(Method):
    """Trains r singular triplets in full: the change has no low-rank form apart from W."""

    kind: Literal["osf"]
    paper: ClassVar[str] = "2504.07097"
    trains: ClassVar[str] = "U_l, S_l, V_l"
    freezes: ClassVar[str] = "U_h, S_h, V_h"
    export: ClassVar[str] = "weights of the adapted layers"
    shardable: ClassVar[bool] = False

    def adapt(self, model: PreTrainedModel, context: Context) -> AdaptedModel:
        """PEFT's OSF: the r trailing singular triplets of W train, the others are frozen."""
        from peft import OSFConfig, get_peft_model

        from folora.adapter import NAME, DenseModel, check_rank, weights_of
        from folora.deltas import DenseLayer, grouped

        check_rank(model, context, spare=1)  # PEFT freezes one triplet at least
        frozen: dict[str, int | float] = {
            name: min(weight.shape) - context.rank for name, weight in weights_of(model, context).items()
        }
        config = OSFConfig(target_modules=list(frozen), effective_rank=1, rank_pattern=frozen)
        adapted = get_peft_model(model, config)
        wrapped: dict[str, Any] = dict(adapted.get_base_model().named_modules())

        def layer(name: str) -> DenseLayer:
            module = wrapped[name]
            weight = module.get_base_layer().weight
            return DenseLayer(name, weight, lambda: weight + module.get_delta_weight(NAME))

        return DenseModel(adapted, grouped(context.spectrum, layer))
