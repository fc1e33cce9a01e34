"""Texts sorted for a query: NDCG, reciprocal rank and average precision as trec_eval has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ft_handler.errors import DataError
from ft_handler.types import Prediction
from ft_handler.verify.data import Example
from ft_handler.verify.labels import CLOSE, number
from ft_handler.verify.measures import Measure, Subject, points

#: Ranks that count in NDCG and the reciprocal rank.
DEPTH = 10


class OrderMeasure(Measure):
    """Answers are all texts with their scores, the best first.

    Two orders say the same where only texts whose scores are close have changed places.
    """

    parameters: Mapping[str, object] = {"top_n": 0, "return_text": False}

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        subject.outputs()
        self.examples = gathered(subject.examples)

    def gold(self, example: Example) -> Any:
        """How relevant each text is, 0 being not at all."""
        gold, texts = example.gold, example.texts.get("texts", [])
        if not isinstance(gold, list) or len(gold) != len(texts):
            raise DataError(f"{example.place}: needs a label for each of its {len(texts)} texts")
        what = f"{example.place}: how relevant a text is, from 0 on,"
        labels = np.array([number(label, what) for label in gold])
        if (labels < 0).any():
            raise DataError(f"{what} cannot be below it")
        return labels

    def metrics(self, golds: Sequence[Any], predictions: Sequence[Prediction]) -> dict[str, float]:
        """Means over the queries that have a relevant text; 0 where none has one."""
        each = [
            measures_of(labels[[one["index"] for one in _ranked(prediction)]])
            for labels, prediction in zip(golds, predictions, strict=True)
            if labels.any()
        ]
        means = np.mean(each, axis=0) if each else np.zeros(3)
        names = (f"ndcg@{DEPTH}", f"mrr@{DEPTH}", "map")
        return {name: points(share) for name, share in zip(names, means.tolist(), strict=True)}

    def answer(self, prediction: Prediction) -> object:
        """The places of the texts in their order."""
        return tuple(one["index"] for one in _ranked(prediction))

    def same(self, one: Prediction, other: Prediction) -> bool:
        """Whether no two texts stand the other way round whose scores are over `CLOSE` apart."""
        ours, theirs = _scores(one), _scores(other)
        turned = np.subtract.outer(ours, ours) * np.subtract.outer(theirs, theirs) < 0
        return not (turned & (abs(np.subtract.outer(theirs, theirs)) > CLOSE)).any()

    def agreement(
        self, ours: Sequence[Prediction], theirs: Sequence[Prediction]
    ) -> dict[str, float]:
        """The largest difference between scores of a text, and orders that are not equal."""
        pairs = list(zip(ours, theirs, strict=True))
        return {
            "score_difference": max(
                float(abs(_scores(one) - _scores(other)).max()) for one, other in pairs
            ),
            "order_changes": sum(self.answer(one) != self.answer(other) for one, other in pairs),
        }


def gathered(examples: Sequence[Example]) -> list[Example]:
    """Rows of one query and one text become one example a query, where its first row stands."""
    out: dict[object, Example] = {}
    for at, example in enumerate(examples):
        query, text = example.texts.get("query"), example.texts.get("text")
        if query is None or text is None:
            out[at] = example
            continue
        first = out.setdefault(query, Example({"query": query, "texts": []}, [], example.place))
        cast("list[Any]", first.texts["texts"]).append(text)
        cast("list[Any]", first.gold).append(example.gold)
    return [_settled(example) for example in out.values()]


def _settled(example: Example) -> Example:
    """Without an answer where no row has one; raises DataError where some have."""
    gold = example.gold
    if not isinstance(gold, list) or None not in gold:
        return example
    if any(label is not None for label in gold):
        raise DataError(f"{example.place}: some texts of this query have a label, others have none")
    return Example(example.texts, None, example.place)


def measures_of(labels: NDArray[np.float64]) -> tuple[float, float, float]:
    """NDCG with linear gains, the reciprocal rank of the first relevant text, average precision.

    labels  how relevant the texts are in the order of the answer, at least one of them above 0
    """
    discounts = 1 / np.log2(np.arange(2, len(labels[:DEPTH]) + 2))
    best = np.sort(labels)[::-1]
    ranks = np.flatnonzero(labels) + 1
    return (
        float(labels[:DEPTH] @ discounts / (best[:DEPTH] @ discounts)),
        1 / int(ranks[0]) if ranks[0] <= DEPTH else 0.0,
        float(np.mean(np.arange(1, len(ranks) + 1) / ranks)),
    )


def _ranked(prediction: Prediction) -> list[dict[str, Any]]:
    return cast("list[dict[str, Any]]", prediction)


def _scores(prediction: Prediction) -> NDArray[np.float64]:
    """The scores in the order of the request."""
    scores = np.empty(len(prediction))
    for one in _ranked(prediction):
        scores[one["index"]] = one["score"]
    return scores


MEASURE = OrderMeasure
