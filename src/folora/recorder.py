"""What is kept of a training while it runs: checkpoints, and the history of losses and of the forgetting meter."""

from __future__ import annotations

import math
import time
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from folora.budget import keep_inside
from folora.errors import diverged
from folora.meter import ForgettingMeter
from folora.processes import from_first

if TYPE_CHECKING:
    from pathlib import Path

    from folora.adapter import AdaptedModel
    from folora.divergence import HeldOutText
    from folora.tracking import RunLog


READING = "reading"  # within what the Trainer logs, and saves with its state
DRAWN_BACK = "drawn_back"  # within a reading
COLUMNS = ("step", "loss", "learning_rate", "grad_norm", "penalty", "utility", "kl")  # of the history


class Recorder(TrainerCallback):
    """Writes checkpoints along the way, keeps the history of losses and of the meter, and holds the KL budget.

    Of several processes each has one, since they measure together where the base is sharded; the first one's writes.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        text: HeldOutText,
        budget: float | None,
        due: set[int],
        folder: Path | None = None,
        log: RunLog | None = None,
    ) -> None:
        """Prepare to record.

        Args:
            adapted: the model in training.
            text: measures its KL.
            budget: the greatest KL allowed, or None.
            due: steps after which a checkpoint is saved.
            folder: for the checkpoints; None: no checkpoint is written.
            log: of the run; None: nothing is logged.
        """
        self._adapted, self._text, self._folder, self._log = adapted, text, folder, log
        self._meter = ForgettingMeter(adapted.groups)
        self._budget = budget
        self._inside: tuple[int, float] | None = None  # the step that the budget was held at last, and its KL
        self.drawn_back = 0  # how often the change was scaled to hold it
        self._due = due
        self._tokens, self._since = 0, time.perf_counter()
        self._begun, self._steps = 0.0, list[float]()
        self._logged: list[dict[str, Any]] = []
        self.gates: dict[str, float] = {}

    def record_gates(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep and log the mean gate of each layer input, where the optimizer gates the updates of A."""
        of_parameter = {
            id(parameter): coordinates.gate
            for group, coordinates in zip(optimizer.param_groups, getattr(optimizer, "coordinates", []), strict=False)
            for parameter in group["params"]
        }
        for group in self._adapted.groups:
            layer = group.layers[0]
            gate = of_parameter.get(id(getattr(layer, "A", None)))
            if gate is not None:
                self.gates[layer.name] = float(torch.as_tensor(gate).mean())
        if self._log:
            self._log.constants({f"gate/{name}": gate for name, gate in self.gates.items()})

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock; a training that goes on brings along what it has logged."""
        del args, control
        self._logged = state.log_history
        self.drawn_back = self._readings[-1].get(DRAWN_BACK, 0) if self._readings else 0  # an older state has none
        self._tokens, self._since = state.num_input_tokens_seen, time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock of a step."""
        del args, state, control
        self._begun = time.perf_counter()

    @property
    def step_seconds(self) -> float | None:
        """Median time of a step: forward, backward and update, without checkpoints and readings; None without any."""
        return median(self._steps) if self._steps else None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save a checkpoint where one is due, and have the last step logged."""
        del args
        control.should_log |= state.global_step == state.max_steps
        self._steps.append(time.perf_counter() - self._begun)
        if state.global_step in self._due:
            if self._budget is not None:
                self._inside = state.global_step, self._kl()
            if self._folder:
                self._adapted.save(self._folder / str(state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Read the meter whenever the Trainer logs a loss.

        Raises:
            FoLoRAError: the training diverged.
        """
        del args, control
        if "loss" not in logs:
            return
        step, tokens = state.global_step, state.num_input_tokens_seen
        speed = (tokens - self._tokens) / (time.perf_counter() - self._since)
        loss = _finite("loss", float(logs["loss"]), step)
        kl = self._inside[1] if self._inside and self._inside[0] == step else _finite("KL", self._kl(), step)
        reading = {
            "loss": loss,
            "learning_rate": float(logs["learning_rate"]),
            "grad_norm": float(logs["grad_norm"]),
            **self._meter.read(),
            "kl": kl,
        }
        state.log_history[-1][READING] = {"step": step, **reading, DRAWN_BACK: self.drawn_back}
        # speed differs from one training to the next and stays out of the history, whose bytes do not
        logged = {**reading, "tokens_per_second": speed}
        if self._log:
            self._log.metrics({f"train/{key}": value for key, value in logged.items()}, step)
        self._tokens, self._since = tokens, time.perf_counter()

    def _kl(self) -> float:
        """KL to the base on the held-out text, after drawing the model back inside its budget."""
        model = self._adapted.model
        model.eval()
        measured = 0

        def measure() -> float:
            nonlocal measured
            measured += 1
            return from_first(self._text.measure(model, self._adapted.base_logits).kl)  # so that all draw back alike

        kl = measure() if self._budget is None else keep_inside(self._adapted, measure, self._budget)
        self.drawn_back += measured - 1
        model.train()
        return kl

    def table(self) -> Any:
        """The history as an Arrow table, one row a reading."""
        import pyarrow as pa

        return pa.table({name: [reading[name] for reading in self._readings] for name in COLUMNS})

    @property
    def last_kl(self) -> float:
        """KL to the base at the last reading: of a finished training, at its end."""
        return float(self._readings[-1]["kl"])

    @property
    def _readings(self) -> list[dict[str, Any]]:
        return [logged[READING] for logged in self._logged if READING in logged]


def _finite(figure: str, value: float, step: int) -> float:
    if not math.isfinite(value):
        raise diverged(f"at step {step} the {figure} is {value}")
    return value
