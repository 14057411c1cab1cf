"""Gated Adam: Adam whose update is gated direction by direction, in the coordinates where its moments live.

For a LoRA factor A (r × d) with basis V̂ (d × d) and gates g (d,):

    G̃ = G V̂;   m, v: Adam's moments of G̃;   Ũ = m̂ / (√v̂ + ε);   A ← A (1 - lr·wd) - lr (Ũ ⊙ g) V̂ᵀ

The gate multiplies the update, not the gradient: a constant factor on a gradient coordinate leaves m̂/√v̂ unchanged.
Without a basis and with gate one this is torch's AdamW.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def adam_direction(
    gradient: Tensor, mean: Tensor, square: Tensor, step: int, betas: tuple[float, float], eps: float
) -> Tensor:
    """Advance Adam's moments in place and return the update m̂ / (√v̂ + ε), of the gradient's shape."""
    beta1, beta2 = betas
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = (square.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    return mean / denominator / (1 - beta1**step)


class GatedAdam(torch.optim.Optimizer):
    """AdamW with an optional spectral basis and gate for each parameter group.

    Args:
        params: parameter groups; beside torch's options a group may hold

            - ``basis``: (d, d) V̂, in whose coordinates the group's parameters (each with last dimension d) are
              updated, or None for canonical coordinates;
            - ``gate``: (d,) or a scalar tensor, one factor a coordinate, or None for one.

            Parameters that share a basis belong in one group: they are rotated in one product.
        lr: learning rate.
        betas: decay of Adam's two moments.
        eps: added to √v̂.
        weight_decay: decoupled, as in AdamW.

    Basis and gate are constants of the run, so ``state_dict`` leaves them out. Moments are float32.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]] | Iterable[Tensor],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.spectral: list[tuple[Tensor | None, Tensor | None]] = []
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, keeping its basis and gate apart from what ``state_dict`` holds."""
        self.spectral.append((param_group.pop("basis", None), param_group.pop("gate", None)))
        super().add_param_group(param_group)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the moments in float32, also those of parameters of another type."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state.update({key: state[key].float() for key in ("exp_avg", "exp_avg_sq")})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, (basis, gate) in zip(self.param_groups, self.spectral, strict=True):
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._step_group(parameters, group, basis, gate)
        return loss

    def _step_group(
        self, parameters: list[Tensor], group: dict[str, Any], basis: Tensor | None, gate: Tensor | None
    ) -> None:
        gradients = [parameter.grad.float() for parameter in parameters if parameter.grad is not None]
        if basis is not None:
            rows = [gradient.shape[0] for gradient in gradients]
            gradients = list((torch.cat(gradients) @ basis).split(rows))
        updates = [self._advance(p, g, group) for p, g in zip(parameters, gradients, strict=True)]
        if gate is not None:
            updates = [update * gate for update in updates]
        if basis is not None:
            updates = list((torch.cat(updates) @ basis.mT).split(rows))
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.add_(update.to(parameter.dtype), alpha=-group["lr"])

    def _advance(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(gradient)
            state["exp_avg_sq"] = torch.zeros_like(gradient)
        state["step"] += 1
        return adam_direction(
            gradient, state["exp_avg"], state["exp_avg_sq"], state["step"], group["betas"], group["eps"]
        )
