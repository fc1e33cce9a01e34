"""Labels that the request brings: measured as other labels are, once the candidates are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from ft_handler.errors import DataError
from ft_handler.types import Prediction
from ft_handler.verify.labels import LabelMeasure, several_each
from ft_handler.verify.measures import Subject


class CandidateMeasure(LabelMeasure):
    """Answers have all candidates with their scores, sorted; the first is the answer.

    The candidates are those that the user names, else the settings', else every label of the file.
    A text with several labels has each judged by itself.
    """

    parameters: Mapping[str, object]

    def __init__(self, subject: Subject) -> None:
        self.examples = subject.examples
        self._own = list(subject.labels or subject.defaults.candidate_labels or _of_file(subject))
        if len(self._own) < 2:
            raise DataError("there are fewer than two labels to choose from: --labels names them")
        self._labels = [name.lower() for name in self._own]
        self._one, self._several = False, several_each(subject.examples)
        multi_label = self._several or subject.defaults.multi_label
        self.parameters = {"candidate_labels": self._own, "multi_label": multi_label}

    def ranked(self, prediction: Prediction) -> list[dict[str, Any]]:
        """The candidates with their scores."""
        found = cast("dict[str, Any]", prediction)
        return [
            {"label": label, "score": score}
            for label, score in zip(found["labels"], found["scores"], strict=True)
        ]


def _of_file(subject: Subject) -> list[str]:
    """The labels of all examples, each once, without regard to case."""
    labels = {name.lower(): name for example in subject.examples for name in _names(example.gold)}
    if any(name.isdecimal() for name in labels):
        raise DataError("the labels are numbers: --labels says in their order what they mean")
    return [*labels.values()]


def _names(gold: object) -> Iterator[str]:
    for name in gold if isinstance(gold, list) else [] if gold is None else [gold]:
        yield str(name).strip()


MEASURE = CandidateMeasure
