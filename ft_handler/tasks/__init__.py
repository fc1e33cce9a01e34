"""The tasks: one file each, asked by everything else, named here alone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ft_handler.errors import ModelError

if TYPE_CHECKING:
    from ft_handler.tasks.base import AnyTask

#: Name -> the module whose `TASK` it is; imported when it is asked for.
_HOMES = {
    "sequence_classification": "ft_handler.tasks.sequence_classification",
    "question_answering": "ft_handler.tasks.question_answering",
    "token_classification": "ft_handler.tasks.token_classification",
    "reranking": "ft_handler.tasks.reranking",
    "zero_shot_classification": "ft_handler.tasks.zero_shot_classification",
    "embeddings": "ft_handler.tasks.embeddings",
}
_registered: dict[str, AnyTask] = {}


def names() -> list[str]:
    """The names of all tasks."""
    return [*_HOMES, *(name for name in _registered if name not in _HOMES)]


def get(name: str) -> AnyTask:
    """The task of a name; raises ModelError in words for a name that is none."""
    if name not in _registered:
        if name not in _HOMES:
            raise ModelError(f"mode {name!r} is not one of {', '.join(names())}")
        _registered[name] = importlib.import_module(_HOMES[name]).TASK
    return _registered[name]


def register(task: AnyTask) -> None:
    """Make a task known under its name."""
    _registered[task.name] = task


def unregister(name: str) -> None:
    """Forget a task that was registered."""
    _registered.pop(name, None)
