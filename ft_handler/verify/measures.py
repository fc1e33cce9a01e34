"""How answers are measured: one file a family, named by the tasks whose answers it understands."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ft_handler.errors import DataError, ModelError
from ft_handler.model.info import ModelInfo
from ft_handler.tasks.base import AnyTask
from ft_handler.types import Prediction
from ft_handler.verify.data import Example

#: What a task's `measured_as` may be -> the module whose `Measure` it is.
_HOMES = {
    "labels": "ft_handler.verify.labels",
    "spans": "ft_handler.verify.spans",
    "entities": "ft_handler.verify.entities",
    "candidates": "ft_handler.verify.candidates",
    "orders": "ft_handler.verify.orders",
    "vectors": "ft_handler.verify.vectors",
}


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured.

    info      of the traced file
    examples  of the data file
    labels    names that the user gave, in their order; None: none were given
    defaults  the task's parameters of a request that gives none
    """

    info: ModelInfo
    examples: Sequence[Example]
    labels: Sequence[str] | None = None
    defaults: Any = None

    def outputs(self) -> Sequence[str]:
        """What the file calls the model's outputs; raises DataError for another number of names."""
        own = [self.info.labels[i] for i in range(len(self.info.labels))]
        if self.labels is not None and len(self.labels) != len(own):
            raise DataError(f"--labels names {len(self.labels)} labels, the model has {len(own)}")
        return self.labels or own


class Measure(ABC):
    """One way to measure answers; metrics are in points, 100 is perfect.

    parameters  of the requests, beside the input
    examples    of the file, as they are asked
    """

    parameters: Mapping[str, object]

    def __init__(self, subject: Subject) -> None:
        """For a model and a data file; raises DataError for a file that is of no use."""
        self.examples = subject.examples

    def requests(self, example: Example) -> list[Mapping[str, object]]:
        """What is asked about an example, one input each; several are answered by a list."""
        return [{**example.texts, **self.parameters}]

    @abstractmethod
    def gold(self, example: Example) -> Any:
        """An example's right answer; raises DataError for one that the model cannot give."""

    @abstractmethod
    def metrics(self, golds: Sequence[Any], predictions: Sequence[Prediction]) -> dict[str, float]:
        """Name -> points, of at least one example."""

    @abstractmethod
    def answer(self, prediction: Prediction) -> object:
        """What has to be equal for two answers to be the same."""

    def same(self, one: Prediction, other: Prediction) -> bool:
        """Whether two answers say the same."""
        return self.answer(one) == self.answer(other)

    def agreement(
        self, ours: Sequence[Prediction], theirs: Sequence[Prediction]
    ) -> dict[str, float]:
        """Name -> figure of how near the two sides' answers are, beside how many differ."""
        return {}


def measure_of(task: AnyTask) -> type[Measure]:
    """How a task's answers are measured; raises ModelError for a task that does not say it."""
    if task.measured_as is None:
        raise ModelError(f"answers of {task.name} cannot be verified: the task has no measure")
    found: type[Measure] = importlib.import_module(_HOMES[task.measured_as]).MEASURE
    return found


def points(share: float) -> float:
    """A share as points."""
    return 100.0 * float(share)


class Counts:
    """What F1 is made of: how many were right, how many were given, how many there were."""

    __slots__ = ("given", "right", "there")
    names: ClassVar[tuple[str, ...]] = ("precision", "recall", "f1")

    def __init__(self, right: int = 0, given: int = 0, there: int = 0) -> None:
        self.right, self.given, self.there = right, given, there

    def add(self, right: int, given: int, there: int) -> None:
        """Count some more."""
        self.right += right
        self.given += given
        self.there += there

    @property
    def precision(self) -> float:
        """Share of what was given that is right; 0 of nothing."""
        return self.right / self.given if self.given else 0.0

    @property
    def recall(self) -> float:
        """Share of what there was that was given; 0 of nothing."""
        return self.right / self.there if self.there else 0.0

    @property
    def f1(self) -> float:
        """The harmonic mean of both; 0 of nothing."""
        both = self.given + self.there
        return 2 * self.right / both if both else 0.0
