"""Vectors of texts: cosines of pairs against how alike people find them, as STS is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ft_handler.errors import DataError
from ft_handler.types import Prediction
from ft_handler.verify.data import Example
from ft_handler.verify.labels import correlations, number
from ft_handler.verify.measures import Measure, Subject

#: Vectors of which the cosine is at least this are the same answer.
ALIKE = 0.999


class VectorMeasure(Measure):
    """Answers are vectors: of one text, or of each of a pair."""

    parameters: Mapping[str, object] = {}

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        subject.outputs()

    def requests(self, example: Example) -> list[Mapping[str, object]]:
        """A request a text."""
        pair = example.texts.get("text_pair")
        if pair is None:
            return super().requests(example)
        alone = {key: text for key, text in example.texts.items() if key != "text_pair"}
        return [{**alone, **self.parameters}, {"text": pair, **self.parameters}]

    def gold(self, example: Example) -> Any:
        """How alike the two texts are."""
        if "text_pair" not in example.texts:
            raise DataError(f"{example.place}: has one text, and a label needs two to be alike")
        return number(example.gold, f"{example.place}: how alike the texts are")

    def metrics(self, golds: Sequence[Any], predictions: Sequence[Prediction]) -> dict[str, float]:
        """Pearson's and Spearman's correlation of the pairs' cosines."""
        pairs = [_vectors(prediction) for prediction in predictions]
        return correlations(golds, [cosine(*pair) for pair in pairs])

    def answer(self, prediction: Prediction) -> object:
        """The vectors."""
        return _vectors(prediction)

    def same(self, one: Prediction, other: Prediction) -> bool:
        """Whether each vector is as good as parallel to the other side's."""
        return min(_cosines(one, other)) >= ALIKE

    def agreement(
        self, ours: Sequence[Prediction], theirs: Sequence[Prediction]
    ) -> dict[str, float]:
        """Cosines of the two sides' vectors of the same text."""
        found = [c for pair in zip(ours, theirs, strict=True) for c in _cosines(*pair)]
        return {"least_cosine": min(found), "mean_cosine": float(np.mean(found))}


def cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Of the angle between two vectors; 0 where one has no length."""
    first, second = one.astype(np.float64), other.astype(np.float64)
    below = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / below if below else 0.0


def _cosines(one: Prediction, other: Prediction) -> list[float]:
    return [cosine(a, b) for a, b in zip(_vectors(one), _vectors(other), strict=True)]


def _vectors(prediction: Prediction) -> list[NDArray[np.float32]]:
    found = prediction if isinstance(prediction, list) else [prediction]
    return [cast(Any, one["embedding"]) for one in found]


MEASURE = VectorMeasure
