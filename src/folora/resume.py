"""The state of a training on disk: a training that was killed goes on from it and ends with the same bytes.

A state is one of the Trainer's checkpoints (optimizer, schedule, random numbers, what was logged) with the trained
parameters as they are, not as the method exports them. It is sealed by the digests of its files and of the adapters
saved before it, so that one which a kill or a power cut left incomplete is passed over. States are saved where the
Trainer has just logged: in between it holds a sum of losses that it does not save.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from folora.errors import FoLoRAError
from folora.processes import from_first, meet, rank
from folora.scratch import save_seconds
from folora.storage import CHECKPOINTS, digest_of_file, publish, read_json, read_tensors, write_json, write_tensors

if TYPE_CHECKING:
    from torch import nn

STATES_KEPT = 2  # the last, and the one before it in case the last is damaged
PARAMETERS_FILE = "parameters.safetensors"
SEAL_FILE = "seal.json"


class ResumableTrainer(Trainer):
    """transformers' Trainer with every trained parameter in its checkpoints, whatever the method exports."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        del state_dict
        assert output_dir is not None, "states are saved as checkpoints only"
        write_tensors(Path(output_dir) / PARAMETERS_FILE, _trained(self.model), {"artefact": "state"})

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        held = _trained(model or self.model)
        saved, _ = read_tensors(Path(resume_from_checkpoint) / PARAMETERS_FILE, artefact="state")
        for name, parameter in held.items():
            parameter.copy_(saved[name])


class StateSaver(TrainerCallback):
    """Has the Trainer save its state every few minutes, all its processes at once, and seals what they saved.

    Args:
        folder: scratch folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._saved = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Ask for a state when the last one is old."""
        del args, state
        if "loss" in logs and from_first(time.monotonic() - self._saved >= save_seconds()):
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seal the state."""
        del args, control
        meet()
        if rank() == 0:
            seal(self._folder, self._folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        self._saved = time.monotonic()


def seal(folder: Path, state: Path) -> None:
    """Write down the digests of a state's files and of the adapters in the scratch folder."""
    found = [path for part in (state, folder / CHECKPOINTS) for path in sorted(part.rglob("*")) if path.is_file()]
    files = [path for path in found if path.name != SEAL_FILE]
    with publish(state / SEAL_FILE) as partial:
        write_json(partial, {str(path.relative_to(folder)): digest_of_file(path) for path in files})


def last_state(folder: Path) -> Path | None:
    """The newest state of a scratch folder that is whole; what is not, and what came after it, is removed."""
    for state in sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=step_of, reverse=True):
        if _whole(folder, state):
            return state
        shutil.rmtree(state)
    return None


def step_of(state: Path) -> int:
    """The optimizer step after which a state was saved."""
    return int(state.name.rpartition("-")[2])


def _whole(folder: Path, state: Path) -> bool:
    try:
        files = read_json(state / SEAL_FILE)
        return isinstance(files, dict) and all(digest_of_file(folder / name) == files[name] for name in files)
    except FoLoRAError:  # a file is missing, or the seal is
        return False


def _trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
