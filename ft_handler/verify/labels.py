"""Labels of texts: accuracy, F1, Matthews' correlation; of one number its correlation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ft_handler.errors import DataError
from ft_handler.types import Prediction
from ft_handler.verify.data import Example
from ft_handler.verify.measures import Counts, Measure, Subject, points

#: Of a multi-label head, from which score on a label is given.
THRESHOLD = 0.5
#: Numbers that are so far apart are the same answer.
CLOSE = 0.01


class LabelMeasure(Measure):
    """Answers are lists of labels with scores, sorted; the first is the answer.

    With one label its score is the answer, and of a multi-label head every label of at least
    `THRESHOLD`.
    """

    parameters: Mapping[str, object] = {"top_k": None}

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        info = subject.info
        self._labels = [name.lower() for name in subject.outputs()]
        self._own = [info.labels[i] for i in range(len(info.labels))]
        self._one = len(self._own) == 1
        self._several = info.problem_type == "multi_label_classification" or several_each(
            subject.examples
        )

    def gold(self, example: Example) -> Any:
        """A label's number, or several; of one label the number that it stands for."""
        gold = example.gold
        if self._several:
            if isinstance(gold, str):
                gold = [name for name in gold.split(",") if name.strip()]
            if not isinstance(gold, list):
                raise DataError(f"{example.place}: needs a list of labels")
            return frozenset(self._number(value, example.place) for value in gold)
        if self._one:
            return number(gold, f"{example.place}: the model gives one number, so the label")
        return self._number(gold, example.place)

    def _number(self, value: object, place: str) -> int:
        """The number of a label, which is given by name or by number."""
        text = str(value).strip()
        if text.lower() in self._labels:
            return self._labels.index(text.lower())
        if text.isascii() and text.isdigit() and int(text) < len(self._labels):
            return int(text)
        raise DataError(
            f"{place}: its label is none of the model's, {', '.join(self._labels)}; --labels names "
            "them in the model's order as the file does"
        )

    def ranked(self, prediction: Prediction) -> list[dict[str, Any]]:
        """Labels with scores, the best first."""
        return cast("list[dict[str, Any]]", prediction)

    def metrics(self, golds: Sequence[Any], predictions: Sequence[Prediction]) -> dict[str, float]:
        """By what the labels are: several, a number, or one of two and more."""
        answers = [self.answer(prediction) for prediction in predictions]
        if self._several:
            given = [{self._own.index(str(name)) for name in cast(Any, a)} for a in answers]
            return _of_sets(golds, given, len(self._own))
        if self._one:
            return correlations(golds, cast(Any, answers))
        return _of_one(golds, [self._own.index(str(a)) for a in answers], len(self._own))

    def answer(self, prediction: Prediction) -> object:
        """The best label, every label that is given, or the score of the only one."""
        ranked = self.ranked(prediction)
        if self._several:
            return frozenset(one["label"] for one in ranked if one["score"] >= THRESHOLD)
        return float(ranked[0]["score"]) if self._one else ranked[0]["label"]

    def same(self, one: Prediction, other: Prediction) -> bool:
        """Whether the labels are equal, or the numbers at most `CLOSE` apart."""
        answers = self.answer(one), self.answer(other)
        if self._one and not self._several:
            first, second = cast("tuple[float, float]", answers)
            return abs(first - second) <= CLOSE
        return answers[0] == answers[1]


def several_each(examples: Sequence[Example]) -> bool:
    """Whether a text may have several labels."""
    return any(isinstance(example.gold, list) for example in examples)


def number(gold: object, what: str) -> float:
    """A right answer that is a finite number; raises DataError saying that `what` must be one."""
    try:
        found = float(cast(Any, gold))
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise DataError(f"{what} must be one") from None
    return found


def _of_one(golds: Sequence[int], given: Sequence[int], labels: int) -> dict[str, float]:
    table = np.zeros((labels, labels), np.int64)
    np.add.at(table, (np.array(golds), np.array(given)), 1)
    each = [
        Counts(int(table[i, i]), int(table[:, i].sum()), int(table[i].sum())).f1
        for i in range(labels)
    ]
    seen = [i for i in range(labels) if table[i].any() or table[:, i].any()]
    out = {
        "accuracy": points(table.trace() / len(golds)),
        "f1_macro": points(float(np.mean([each[i] for i in seen]))),
    }
    if labels == 2:
        out["f1"] = points(each[1])
        out["matthews"] = points(_matthews(table))
    return out


def _matthews(table: NDArray[np.int64]) -> float:
    (tn, fp), (fn, tp) = table.tolist()
    below = float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return float((tp * tn - fp * fn) / below**0.5) if below else 0.0


def _of_sets(
    golds: Sequence[frozenset[int]], given: Sequence[set[int]], labels: int
) -> dict[str, float]:
    each = [Counts() for _ in range(labels)]
    for right, own in zip(golds, given, strict=True):
        for label in right | own:
            each[label].add(label in right and label in own, label in own, label in right)
    together = Counts(
        sum(c.right for c in each), sum(c.given for c in each), sum(c.there for c in each)
    )
    seen = [c.f1 for c in each if c.given or c.there]
    return {
        "exact_match": points(float(np.mean([g == o for g, o in zip(golds, given, strict=True)]))),
        "f1_micro": points(together.f1),
        "f1_macro": points(float(np.mean(seen)) if seen else 0.0),
    }


def correlations(golds: Sequence[float], given: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's; 0 where one side is constant."""
    one, other = np.array(golds, float), np.array(given, float)
    return {
        "pearson": points(_pearson(one, other)),
        "spearman": points(_pearson(ranks(one), ranks(other))),
    }


def _pearson(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    one, other = one - one.mean(), other - other.mean()
    below = float(np.sqrt((one @ one) * (other @ other)))
    return float(one @ other) / below if below else 0.0


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    means: NDArray[np.float64] = np.cumsum(counts) - (counts + 1) / 2
    return means[inverse]


MEASURE = LabelMeasure
