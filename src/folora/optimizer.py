"""Gated Adam: Adam whose update is gated direction by direction, in the coordinates where its moments live.

For a LoRA factor A (r × d) with basis V̂ (d × q) and gates g (q,), where q = d unless ``spectrum.directions`` is less:

    G̃ = G V̂;   m, v: Adam's moments of G̃;   Ũ = m̂ / (√v̂ + ε);   A ← A (1 - lr·wd) - lr (Ũ ⊙ g) V̂ᵀ

The gate multiplies the update, not the gradient: a constant factor on a gradient coordinate leaves m̂/√v̂ unchanged.
Without a basis and with gate one this is torch's AdamW.

Two variants, for comparison: the gate may multiply the gradient instead, which Adam's division undoes; and a filter
F (d × d) may multiply canonical Adam's update on the right, A ← A (1 - lr·wd) - lr U F.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from folora.errors import FoLoRAError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

CACHE = 2**21  # bytes of bases that stay in a processor's cache beside the rest


def adam_directions(
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
    betas: tuple[float, float],
    eps: float,
) -> list[Tensor]:
    """Advance Adam's moments and steps in place and return the updates m̂ / (√v̂ + ε), of the gradients' shapes."""
    updates = [torch.zeros_like(gradient) for gradient in gradients]
    adam(
        updates,
        gradients,
        means,
        squares,
        max_exp_avg_sqs=[],
        state_steps=steps,
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        lr=-1.0,  # so that what is added to zero is the update
        weight_decay=0.0,
        amsgrad=False,
        maximize=False,
        fused=True,
    )
    return updates


@dataclass
class Coordinates:
    """Where Adam works for one parameter group, and what it keeps of its update there.

    Attributes:
        basis: (d, q) V̂, or None for canonical coordinates.
        gate: (q,) or a scalar, or None for one.
        gate_gradient: whether the gate multiplies the gradient instead of the update.
        filter: (d, d) F on the right of the update, or None.
    """

    basis: Tensor | None = None
    gate: Tensor | None = None
    gate_gradient: bool = False
    filter: Tensor | None = None

    def to(self, device: torch.device) -> Coordinates:
        """The same on a device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def enter(self, gradients: list[Tensor]) -> list[Tensor]:
        """Gradients, (rows, d) each, in these coordinates."""
        if self.basis is None and not self.gate_gradient:
            return gradients
        joined = _joined(gradients)
        rotated = joined if self.basis is None else joined @ self.basis
        if self.gate is not None and self.gate_gradient:
            rotated = rotated * self.gate
        return list(rotated.split([len(gradient) for gradient in gradients]))

    def leave(self, updates: list[Tensor]) -> list[Tensor]:
        """Updates, (rows, d) each, gated and back in the parameters' coordinates; they may be changed in place."""
        gate = None if self.gate_gradient else self.gate
        if self.basis is None and gate is None and self.filter is None:
            return updates
        joined = _joined(updates)
        gated = joined if gate is None else joined.mul_(gate)
        back = gated if self.basis is None else gated @ self.basis.mT
        filtered = back if self.filter is None else back @ self.filter
        return list(filtered.split([len(update) for update in updates]))


def _joined(matrices: list[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


class GatedAdam(torch.optim.Optimizer):
    """AdamW with an optional spectral basis and gate for each parameter group.

    Args:
        params: parameter groups; beside torch's options a group may hold the fields of ``Coordinates``. Its parameters
            have d as their last dimension. Those that share a basis belong in one group: they are rotated in one
            product.
        lr: learning rate.
        betas: decay of Adam's two moments.
        eps: added to √v̂.
        weight_decay: decoupled, as in AdamW.

    Coordinates follow from the run's inputs, so ``state_dict`` leaves them out, but for those that ``turn`` has
    replaced since. Moments are float32.

    Attributes:
        coordinates: of each parameter group; ``turn`` replaces them.
        steps: taken so far.
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
        self.coordinates: list[Coordinates] = []
        self.steps = 0
        self._turned: set[int] = set()
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, keeping its coordinates apart from what ``state_dict`` holds."""
        own = {name: param_group.pop(name) for name in Coordinates.__dataclass_fields__ if name in param_group}
        self.coordinates.append(Coordinates(**own))
        super().add_param_group(param_group)

    def turn(self, position: int, coordinates: Coordinates) -> None:
        """Give the parameter group at ``position`` other coordinates from the next step on."""
        self.coordinates[position] = coordinates
        self._turned.add(position)

    def state_dict(self) -> dict[str, Any]:
        """Moments and options, and the coordinates of the groups that were turned."""
        turned = {position: dict(vars(self.coordinates[position])) for position in sorted(self._turned)}
        return super().state_dict() | {"turned": turned}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` has, on the devices of the parameters.

        Moments are restored in float32, also those of parameters of another type.
        """
        super().load_state_dict(state_dict)
        for (parameter, state), saved in zip(self.state.items(), state_dict["state"].values(), strict=True):
            for key in ("exp_avg", "exp_avg_sq"):  # torch has rounded them to the parameter's type
                state[key] = saved[key].to(parameter.device, torch.float32)
            state["step"] = saved["step"].to(parameter.device)  # which torch leaves where it was
        self.steps = max((int(saved["step"]) for saved in state_dict["state"].values()), default=0)
        for position, coordinates in state_dict.get("turned", {}).items():
            self.turn(position, Coordinates(**coordinates))
        self._follow_parameters()

    def _follow_parameters(self) -> None:
        """Bring the coordinates to the parameters' devices: a Trainer moves a model after its optimizer was made."""
        devices = (group["params"][0].device for group in self.param_groups)
        self.coordinates = [one.to(device) for one, device in zip(self.coordinates, devices, strict=True)]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.steps:
            self._follow_parameters()
        # groups with the same options move together: a call a group would cost more than its sums
        alike: dict[tuple[Any, ...], list[tuple[list[Tensor], Coordinates]]] = {}
        for group, coordinates in zip(self.param_groups, self.coordinates, strict=True):
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                options = tuple(group[name] for name in ("lr", "betas", "eps", "weight_decay"))
                alike.setdefault(options, []).append((parameters, coordinates))
        for options, groups in alike.items():
            for some in _in_cache(groups):
                self._step_groups(some, *options)
        self.steps += 1
        return loss

    def _step_groups(
        self,
        groups: list[tuple[list[Tensor], Coordinates]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        parameters = [parameter for members, _ in groups for parameter in members]
        gradients: list[Tensor] = []
        for members, coordinates in groups:
            own = [member.grad for member in members if member.grad is not None]
            gradients += coordinates.enter([gradient.float().contiguous() for gradient in own])
        directions = self._advance(parameters, gradients, betas, eps)
        updates: list[Tensor] = []
        for members, coordinates in groups:
            updates += coordinates.leave(directions[len(updates) : len(updates) + len(members)])
        if weight_decay:
            torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        updates = [update.to(parameter.dtype) for parameter, update in zip(parameters, updates, strict=True)]
        torch._foreach_add_(parameters, updates, alpha=-lr)

    def _advance(
        self, parameters: list[Tensor], gradients: list[Tensor], betas: tuple[float, float], eps: float
    ) -> list[Tensor]:
        states = [self.state[parameter] for parameter in parameters]
        for state, gradient in zip(states, gradients, strict=True):
            if not state:
                state["step"] = torch.zeros((), device=gradient.device)
                state["exp_avg"] = torch.zeros_like(gradient)
                state["exp_avg_sq"] = torch.zeros_like(gradient)
        means, squares, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
        return adam_directions(gradients, means, squares, steps, betas, eps)


def _in_cache(groups: list[tuple[list[Tensor], Coordinates]]) -> Iterator[list[tuple[list[Tensor], Coordinates]]]:
    """Groups a few at a time, so that a basis that the gradients were turned by is still there for their updates."""
    some: list[tuple[list[Tensor], Coordinates]] = []
    size = 0
    for group in groups:
        basis = group[1].basis
        needed = 0 if basis is None else basis.nbytes
        if some and size + needed > CACHE:
            yield some
            some, size = [], 0
        some.append(group)
        size += needed
    yield some


def check_first_step(optimizer: torch.optim.Optimizer, moved: Callable[[], bool]) -> None:
    """Have an optimizer raise after its first step if that left the model as it was; a rate of zero does not count.

    A wrapper that shards a model may replace its parameters, and the optimizer goes on with those that nothing reads.

    Args:
        optimizer: of any kind; it raises a ``FoLoRAError`` out of its ``step``.
        moved: says whether the model in training differs from what it was before.
    """
    waiting = True

    def check(*_: Any) -> None:
        nonlocal waiting
        if waiting and any(group["lr"] for group in optimizer.param_groups):
            waiting = False
            if not moved():
                raise FoLoRAError(
                    "the first step changed no weight: raise the learning rate; see that the loss depends on the "
                    "parameters that the optimizer holds, which FSDP and DeepSpeed replace, and that a gate is open"
                )

    optimizer.register_step_post_hook(check)
