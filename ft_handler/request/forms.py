"""The forms of an answer: one class for each way in which a request can be asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import numpy as np

from ft_handler.tasks.base import Column
from ft_handler.types import Prediction


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
        flag = Column("BOOL", False, optional=True)
        for name, column in {**self.columns, TRUNCATED: flag}.items():
            if self.wanted is not None and name not in self.wanted:
                continue
            if (
                self.wanted is None
                and column.optional
                and not any(name in a for r in rows for a in r)
            ):
                continue
            data = [
                row[i].get(name, column.absent) if i < len(row) else column.absent
                for row in rows
                for i in range(width)
            ]
            sizes = shape
            flat: object = data
            if column.vector:
                vectors = cast("list[Any]", data)
                sizes = [*shape, len(vectors[0])]
                arrays = isinstance(vectors[0], np.ndarray)
                flat = np.concatenate(vectors) if arrays else list(chain.from_iterable(vectors))
            outputs.append(
                {"name": name, "shape": sizes, "datatype": column.datatype, "data": flat}
            )
        return {**self.model, "outputs": outputs}
