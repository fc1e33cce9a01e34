"""The forms of an answer: one class for each way in which a request can be asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ft_handler.tasks.base import Column
from ft_handler.types import Prediction


class Form(Protocol):
    """How one request's predictions become a document."""

    @property
    def many(self) -> bool:
        """Whether the request is a list, so that messages name the input they mean."""

    def document(self, predictions: Sequence[Prediction]) -> object:
        """The answer's body, ready for JSON."""


class Single:
    """One input, one answer."""

    many = False

    def document(self, predictions: Sequence[Prediction]) -> object:
        """The prediction itself."""
        return predictions[0]


class Listed:
    """A list of inputs, a list of answers."""

    many = True

    def document(self, predictions: Sequence[Prediction]) -> object:
        """The predictions in the order of the inputs."""
        return list(predictions)


class Nested:
    """One text asked about as Hugging Face's clients do: its answers as a list, in a list."""

    many = False

    def document(self, predictions: Sequence[Prediction]) -> object:
        """The list of answers, in a list of one."""
        (prediction,) = predictions
        return [prediction if isinstance(prediction, list) else [prediction]]


@dataclass(frozen=True, slots=True)
class Instances:
    """KServe v1: `instances` in, `predictions` or what else the answers are called out."""

    answers_as: str = "predictions"
    many = True

    def document(self, predictions: Sequence[Prediction]) -> object:
        """The predictions under their key."""
        return {self.answers_as: list(predictions)}


SINGLE, LISTED, NESTED = Single(), Listed(), Nested()

#: An output that every task has: whether the input was cut.
TRUNCATED = "truncated"


@dataclass(frozen=True, slots=True)
class OpenInference:
    """KServe v2: one tensor a field, one row an input.

    model    what stands beside the outputs: `model_name`, `model_version`, the request's `id`
    columns  the task's fields as tensors
    wanted   names of the outputs asked for; None is all of them
    """

    model: Mapping[str, str]
    columns: Mapping[str, Column]
    wanted: tuple[str, ...] | None = None
    many = True

    def document(self, predictions: Sequence[Prediction]) -> object:
        """Tensors `[inputs]`, or `[inputs, answers]` where an input has a list of answers."""
        rows = [p if isinstance(p, list) else [p] for p in predictions]
        width = max(len(row) for row in rows)
        shape = [len(rows)] + [width] * any(isinstance(p, list) for p in predictions)
        outputs = []
        for name, column in {**self.columns, TRUNCATED: Column("BOOL", False)}.items():
            if self.wanted is not None and name not in self.wanted:
                continue
            data = [
                row[i].get(name, column.absent) if i < len(row) else column.absent
                for row in rows
                for i in range(width)
            ]
            if name == TRUNCATED and self.wanted is None and not any(data):
                continue
            outputs.append(
                {"name": name, "shape": shape, "datatype": column.datatype, "data": data}
            )
        return {**self.model, "outputs": outputs}
