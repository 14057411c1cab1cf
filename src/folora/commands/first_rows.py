"""The first rows of every task, looked at before anything long begins: the stage that reads all of them may come later.

It is no stage that others wait for: a task that changed would make them stale, though they read nothing of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from folora.errors import FoLoRAError
from folora.rows import read_rows
from folora.task import texts, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from folora.params import Params, Task

FIRST = 1000  # rows: what is wrong with a column is so from the first one on
MADE = "artifacts"  # where stages write: what is not there yet may come


def check_tasks(params: Params, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    """See that the first rows of every task can be made into text, as the task stage will make all of them.

    Args:
        params: the parameter file.
        tokenizer: of the base model; None: of chats no more is seen than that their column is there.

    Returns:
        Names of the tasks whose data are here; those of the others come with a stage.

    Raises:
        FoLoRAError: a data set is missing, or a row is not as declared.
    """
    here = {name: task for name, task in params.tasks.items() if not _comes_later(Path(task.dataset))}
    for name, task in here.items():
        try:
            _check(task, tokenizer)
        except FoLoRAError as error:
            reason = str(error).replace("tasks.*", f"tasks.{name}")
            raise FoLoRAError(reason if reason.startswith("tasks.") else f"tasks.{name}: {reason}") from error
    return list(here)


def _comes_later(dataset: Path) -> bool:
    return not dataset.exists() and dataset.parts[:1] == (MADE,)


def _check(task: Task, tokenizer: PreTrainedTokenizerBase | None) -> None:
    rows = read_rows(task.dataset, "tasks.*.dataset")
    first = rows.select(range(min(FIRST, task.rows or FIRST, len(rows))))
    if tokenizer is not None:
        for number, segments in enumerate(texts(first, task, tokenizer)):
            tokenise(number, segments, task, tokenizer)
        return
    # without a chat template prompt and response are still text, and of chats there is the column
    plain, some = task.model_copy(update={"chat": False}), first.select([]) if task.messages else first
    for _ in texts(some, plain, tokenizer):  # type: ignore[arg-type]  # which is not asked then
        pass
