from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from folora.errors import FoLoRAError
from folora.optimizer import Coordinates, GatedAdam, check_first_step

if TYPE_CHECKING:
    from collections.abc import Callable

    Make = Callable[[list[nn.Parameter]], Any]

WIDTH = 5
STEPS = 6
SHAPES = ((2, WIDTH), (3, WIDTH))


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradient(step: int, number: int, shape: tuple[int, ...]) -> Tensor:
    """Signed, and scaled from 1e-3 to 1e3 over the columns and anew at every step."""
    return (noise(100 * step + number, *shape) - 0.2) * torch.logspace(-3, 3, shape[-1]) * (1 + step % 3)


def fresh(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(noise(number, *shape).to(dtype)) for number, shape in enumerate(SHAPES)]


def descend(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range = range(STEPS), scale: Any = 1.0
) -> None:
    for step in steps:
        for number, parameter in enumerate(parameters):
            parameter.grad = (scale * gradient(step, number, tuple(parameter.shape))).to(parameter.dtype)
        optimizer.step()


def train(make: Make, scale: Any = 1.0) -> list[Tensor]:
    """Parameters after all steps; ``scale`` multiplies the gradients."""
    parameters = fresh()
    descend(make(parameters), parameters, scale=scale)
    return [parameter.detach() for parameter in parameters]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def gated(**group: Any) -> Make:
    return lambda parameters: GatedAdam([{"params": parameters} | group], lr=0.03)


def adamw(**options: Any) -> Make:
    return lambda parameters: torch.optim.AdamW(parameters, **{"lr": 0.03, "weight_decay": 0.0} | options)


@pytest.fixture
def basis() -> Tensor:
    """Neither orthogonal nor normalised, condition above 100."""
    return noise(50, WIDTH, WIDTH) * torch.logspace(-1, 1, WIDTH)


@pytest.fixture
def gate() -> Tensor:
    return torch.tensor([0.0, 0.03, 0.4, 0.8, 1.0])


@pytest.mark.parametrize("decay", [0.0, 0.7])
@pytest.mark.parametrize(
    "group", [{}, {"gate": torch.ones(WIDTH)}, {"basis": torch.eye(WIDTH), "gate": torch.ones(WIDTH)}]
)
def test_without_basis_and_gate_it_is_adamw(decay: float, group: dict[str, Any]) -> None:
    options = {"weight_decay": decay, "betas": (0.8, 0.95), "eps": 1e-3}
    assert_same(train(gated(**options, **group)), train(adamw(**options)))


@pytest.mark.parametrize("decay", [0.0, 0.7])
@pytest.mark.parametrize("share", [0.05, 0.6])
@pytest.mark.parametrize("scalar", [True, False])
def test_constant_gate_is_a_smaller_rate_and_a_greater_decay(decay: float, share: float, scalar: bool) -> None:
    gate = torch.tensor(share) if scalar else torch.full((WIDTH,), share)
    expected = train(adamw(lr=0.03 * share, weight_decay=decay / share))
    assert_same(train(gated(gate=gate, basis=torch.eye(WIDTH), weight_decay=decay)), expected)
    assert_same(train(gated(gate=gate, weight_decay=decay)), expected)


@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_follows_the_formula_in_float64(basis: Tensor, gate: Tensor, decay: float) -> None:
    lr, beta1, beta2, eps = 0.02, 0.85, 0.97, 1e-4
    found = train(gated(basis=basis, gate=gate, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay))
    V, g = basis.double(), gate.double()
    for number, shape in enumerate(SHAPES):
        A = noise(number, *shape).double()
        m, v = torch.zeros_like(A), torch.zeros_like(A)
        for step in range(STEPS):
            G = gradient(step, number, shape).double() @ V
            m = beta1 * m + (1 - beta1) * G
            v = beta2 * v + (1 - beta2) * G**2
            U = m / (1 - beta1 ** (step + 1)) / ((v / (1 - beta2 ** (step + 1))).sqrt() + eps)
            A = A * (1 - lr * decay) - lr * (U * g) @ V.T
        assert_same([found[number].double()], [A], 1e-5)


def test_gating_the_gradient_instead_does_nothing(basis: Tensor, gate: Tensor) -> None:
    group = {"basis": basis, "gate": gate.clamp_min(0.01), "eps": 1e-16}
    assert_same(train(gated(**group, gate_gradient=True)), train(gated(basis=basis, eps=1e-16)), 1e-5)
    update, gradient = train(gated(**group)), train(gated(**group, gate_gradient=True))
    assert not torch.allclose(update[0], gradient[0], atol=1e-2)


def test_a_gate_without_a_basis_scales_adam_s_update(gate: Tensor) -> None:
    for start, end, gated_end in zip(fresh(), train(adamw()), train(gated(gate=gate)), strict=True):
        assert_same([gated_end - start.detach()], [(end - start.detach()) * gate], 1e-5)


def test_filter_multiplies_canonical_adam_s_update_on_the_right(basis: Tensor) -> None:
    """Without decay the updates add up, and so do the filtered ones."""
    for start, end, filtered in zip(fresh(), train(adamw()), train(gated(filter=basis)), strict=True):
        assert_same([filtered - start.detach()], [(end - start.detach()) @ basis], 1e-5)


def test_filter_leaves_weight_decay_alone() -> None:
    open_, closed = torch.eye(WIDTH), torch.zeros(WIDTH, WIDTH)
    assert_same(train(gated(filter=open_, weight_decay=0.7)), train(adamw(weight_decay=0.7)))
    found = train(gated(filter=closed, lr=0.1, weight_decay=0.5))
    assert_same(found, [0.95**STEPS * start.detach() for start in fresh()])


def test_closed_directions_do_not_move(basis: Tensor, gate: Tensor) -> None:
    dual = torch.linalg.inv(basis.double()).T
    closed = gate == 0
    for start, one, other in zip(fresh(), train(gated(basis=basis)), train(gated(basis=basis, gate=gate)), strict=True):
        free, held = ((after - start.detach()).double() @ dual for after in (one, other))
        assert held[:, closed].abs().max() < 1e-3 * free[:, closed].abs().min()


def test_scale_of_the_basis_acts_as_a_learning_rate(basis: Tensor, gate: Tensor) -> None:
    one, other = gated(basis=basis, gate=gate, eps=1e-16), gated(basis=4 * basis, gate=gate, lr=0.03 / 4, eps=1e-16)
    assert_same(train(one), train(other), 1e-5)


def test_weight_decay_is_not_gated(basis: Tensor) -> None:
    found = train(gated(basis=basis, gate=torch.zeros(WIDTH), lr=0.1, weight_decay=0.5))
    assert_same(found, [0.95**STEPS * start.detach() for start in fresh()])


def test_one_shared_group_equals_separate_groups(basis: Tensor, gate: Tensor) -> None:
    def separate(parameters: list[nn.Parameter]) -> GatedAdam:
        return GatedAdam([{"params": [p], "basis": basis, "gate": gate} for p in parameters], lr=0.03)

    assert_same(train(gated(basis=basis, gate=gate)), train(separate))


def test_groups_keep_their_own_basis_gate_and_rate(basis: Tensor, gate: Tensor) -> None:
    def mixed(parameters: list[nn.Parameter]) -> GatedAdam:
        spectral = {"params": parameters[:1], "basis": basis, "gate": gate, "lr": 0.01}
        return GatedAdam([spectral, {"params": parameters[1:]}], lr=0.03)

    assert_same(train(mixed), [train(gated(basis=basis, gate=gate, lr=0.01))[0], train(adamw())[1]])


def test_obeys_a_changing_learning_rate() -> None:
    ends = []
    for make in (gated(weight_decay=0.1), adamw(weight_decay=0.1)):
        parameters = fresh()
        optimizer = make(parameters)
        for step, rate in enumerate((0.1, 0.02, 0.0)):
            optimizer.param_groups[0]["lr"] = rate
            descend(optimizer, parameters, range(step, step + 1))
        ends.append([parameter.detach() for parameter in parameters])
    assert_same(*ends)


def test_resumed_equals_uninterrupted(basis: Tensor, gate: Tensor) -> None:
    make = gated(basis=basis, gate=gate, filter=basis, weight_decay=0.1)
    parameters = fresh()
    first, second = make(parameters), make(parameters)
    descend(first, parameters, range(3))
    second.load_state_dict(first.state_dict())
    descend(second, parameters, range(3, STEPS))
    assert [p.detach().tolist() for p in parameters] == [p.tolist() for p in train(make)]
    assert not {"basis", "gate", "gate_gradient", "filter"} & set(first.state_dict()["param_groups"][0])


@pytest.mark.parametrize("turned", [{"filter"}, {"basis", "gate"}, {"gate", "gate_gradient"}])
def test_turned_coordinates_are_resumed_whole(basis: Tensor, gate: Tensor, turned: set[str]) -> None:
    """What a group had before belongs to its run, and what replaced it to its state."""
    new = {"basis": basis, "gate": gate, "gate_gradient": True, "filter": basis}
    coordinates = Coordinates(**{name: new[name] for name in turned})
    before = {"basis": torch.eye(WIDTH), "gate": torch.ones(WIDTH), "filter": torch.eye(WIDTH)}
    first, second = (gated(**before)(fresh()) for _ in range(2))
    first.turn(0, coordinates)
    second.load_state_dict(first.state_dict())
    assert vars(second.coordinates[0]).keys() == new.keys()
    for name, value in vars(second.coordinates[0]).items():
        assert value is getattr(coordinates, name), name


def test_a_state_is_loaded_onto_the_device_of_the_parameters(basis: Tensor, gate: Tensor) -> None:
    """The Trainer reads it to main memory; ``meta`` stands in for a GPU."""
    parameters = fresh()
    first = GatedAdam([{"params": [one]} for one in parameters], lr=0.1)
    descend(first, parameters, range(2))
    first.turn(0, Coordinates(basis=basis, gate=gate))
    second = GatedAdam([{"params": [nn.Parameter(one.detach().to("meta"))]} for one in parameters], lr=0.1)
    second.load_state_dict(first.state_dict())
    assert second.steps == 2
    tensors = [*(value for state in second.state.values() for value in state.values())]
    tensors += [value for value in vars(second.coordinates[0]).values() if isinstance(value, Tensor)]
    assert [value.device.type for value in tensors] == ["meta"] * (3 * len(parameters) + 2)


def test_parameters_without_a_gradient_stay(basis: Tensor) -> None:
    idle, busy = fresh()
    optimizer = GatedAdam([{"params": [idle, busy], "basis": basis}], lr=0.1, weight_decay=0.5)
    busy.grad = gradient(0, 1, SHAPES[1])
    optimizer.step()
    assert [torch.equal(*pair) for pair in zip((idle, busy), fresh(), strict=True)] == [True, False]
    assert idle not in optimizer.state


def test_closure_runs_with_gradients_and_returns_the_loss() -> None:
    parameter = nn.Parameter(torch.tensor([[3.0, -2.0]]))
    optimizer = GatedAdam([parameter], lr=0.5)

    def closure() -> Tensor:
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 13
    torch.testing.assert_close(parameter.detach(), torch.tensor([[2.5, -1.5]]))


def test_moments_of_bfloat16_parameters_are_float32(basis: Tensor, gate: Tensor) -> None:
    parameters = fresh(torch.bfloat16)
    optimizer = GatedAdam([{"params": parameters, "basis": basis, "gate": gate}], lr=0.03)
    descend(optimizer, parameters)
    assert {optimizer.state[p][key].dtype for p in parameters for key in ("exp_avg", "exp_avg_sq")} == {torch.float32}


def test_bfloat16_parameters_resume_with_the_same_float32_moments() -> None:
    parameters = fresh(torch.bfloat16)
    first, second = (GatedAdam(parameters, lr=0.1) for _ in range(2))
    descend(first, parameters)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for parameter in parameters:
        for key in ("exp_avg", "exp_avg_sq"):
            assert second.state[parameter][key].dtype == torch.float32
            assert torch.equal(second.state[parameter][key], first.state[parameter][key])
    descend(second, parameters)


def reference(
    starts: list[Tensor], gradients: list[list[Tensor]], group: dict[str, Any], lr: float, decay: float
) -> list[Tensor]:
    """The same in float64, a parameter and a step at a time; ``gradients`` holds a list a step."""
    beta1, beta2 = group.get("betas", (0.9, 0.999))
    eye = torch.eye(starts[0].shape[1], dtype=torch.float64)
    V, F = (eye if group.get(name) is None else group[name].double() for name in ("basis", "filter"))
    g = torch.ones(()) if group.get("gate") is None else group["gate"].double()
    before, after = (g, 1) if group.get("gate_gradient") else (1, g)
    ends = []
    for number, start in enumerate(starts):
        A = start.double()
        m, v = torch.zeros_like(A), torch.zeros_like(A)
        for step, now in enumerate(gradients, 1):
            G = now[number].double() @ V * before
            m = beta1 * m + (1 - beta1) * G
            v = beta2 * v + (1 - beta2) * G**2
            U = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + group.get("eps", 1e-8))
            A = A * (1 - lr * decay) - lr * (U * after) @ V.T @ F
        ends.append(A)
    return ends


def optimised(
    starts: list[Tensor], gradients: list[list[Tensor]], group: dict[str, Any], lr: float, decay: float
) -> list[Tensor]:
    parameters = [nn.Parameter(start.clone()) for start in starts]
    optimizer = GatedAdam([{"params": parameters} | group], lr=lr, weight_decay=decay)
    for now in gradients:
        for parameter, gradient in zip(parameters, now, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [parameter.detach().double() for parameter in parameters]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    width=st.integers(1, 7),
    rows=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    steps=st.integers(1, 8),
    scale=st.floats(-4, 4),
    lr=st.floats(1e-4, 0.3),
    decay=st.sampled_from([0.0, 0.1, 1.0]),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.5, 0.5)]),
    parts=st.sets(st.sampled_from(["basis", "gate", "scalar", "gate_gradient", "filter"])),
)
def test_any_problem_follows_the_float64_reference(
    seed: int,
    width: int,
    rows: list[int],
    steps: int,
    scale: float,
    lr: float,
    decay: float,
    betas: tuple[float, float],
    parts: set[str],
) -> None:
    gate = noise(seed, width).abs().clamp_max(1)
    made = {
        "basis": noise(seed + 1, width, width),
        "gate": gate.mean() if "scalar" in parts else gate,
        "filter": noise(seed + 2, width, width),
        "gate_gradient": True,
    }
    group = {"betas": betas, "eps": 1e-4, **{name: made[name] for name in parts & made.keys()}}
    starts = [noise(seed + 3 + number, count, width) for number, count in enumerate(rows)]
    gradients = [
        [10**scale * noise(seed + 100 * step + number, count, width) for number, count in enumerate(rows)]
        for step in range(1, steps + 1)
    ]
    found = optimised(starts, gradients, group, lr, decay)
    for one, expected in zip(found, reference(starts, gradients, group, lr, decay), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(("decay", "tolerance"), [(0.0, 5e-5), (0.01, 1e-3)])
def test_ten_thousand_steps_do_not_drift(basis: Tensor, gate: Tensor, decay: float, tolerance: float) -> None:
    """With decay the factor 1 - lr·wd is rounded to float32 at every step, as in torch's AdamW."""
    starts = [noise(number, *shape) for number, shape in enumerate(SHAPES)]
    gradients = [[gradient(step, n, shape) for n, shape in enumerate(SHAPES)] for step in range(10_000)]
    problem = (starts, gradients, {"basis": basis / basis.norm(), "gate": gate}, 1e-3, decay)
    for found, expected, start in zip(optimised(*problem), reference(*problem), starts, strict=True):
        assert (expected - start).abs().max() > 0.3
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("gradient", [None, torch.zeros(2, WIDTH)])
@pytest.mark.parametrize("make", [GatedAdam, torch.optim.AdamW])
def test_a_first_step_that_moves_nothing_is_an_error(make: Any, gradient: Tensor | None) -> None:
    parameter = nn.Parameter(noise(0, 2, WIDTH))
    parameter.grad = gradient
    optimizer = make([parameter], lr=0.0, weight_decay=0.0)
    check_first_step(optimizer, partial(differs, parameter, parameter.detach().clone()))
    optimizer.step()  # a warm-up
    optimizer.param_groups[0]["lr"] = 1e-2
    with pytest.raises(FoLoRAError, match="the first step changed no weight"):
        optimizer.step()


def test_only_the_first_step_has_to_move_something() -> None:
    parameter = nn.Parameter(noise(0, 2, WIDTH))
    start = parameter.detach().clone()
    optimizer = GatedAdam([parameter], lr=1e-2)
    check_first_step(optimizer, partial(differs, parameter, start))
    descend(optimizer, [parameter], range(1))
    with torch.no_grad():
        parameter.copy_(start)
    parameter.grad = None
    optimizer.step()


def differs(one: Tensor, other: Tensor) -> bool:
    return not torch.equal(one, other)
