"""Spans of a context: exact match and F1 of words, as SQuAD counts them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

from ft_handler.errors import DataError
from ft_handler.types import Prediction
from ft_handler.verify.data import Example
from ft_handler.verify.measures import Counts, Measure, Subject, points

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class SpanMeasure(Measure):
    """Answers are texts with their places; where the file has questions without one, none may be.

    Of several right answers the nearest counts.
    """

    parameters: Mapping[str, object]

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        subject.outputs()
        unanswerable = any(example.gold == [] for example in subject.examples)
        self.parameters = {"top_k": 1, "handle_impossible_answer": unanswerable}

    def gold(self, example: Example) -> Any:
        """Every right answer; an empty one where there is none."""
        gold = example.gold
        if isinstance(gold, dict):  # as the datasets library has them
            gold = gold.get("text")
        if isinstance(gold, str):
            gold = [gold]
        if not isinstance(gold, list) or not all(isinstance(text, str) for text in gold):
            raise DataError(f"{example.place}: needs the text of an answer, or a list of them")
        # An answer of nothing but articles and marks cannot be met.
        return [text for text in gold if normalized(text)] or [""]

    def metrics(self, golds: Sequence[Any], predictions: Sequence[Prediction]) -> dict[str, float]:
        """SQuAD's two."""
        given = [str(cast(Any, prediction)["answer"]) for prediction in predictions]
        pairs = list(zip(golds, given, strict=True))
        exact = sum(max(normalized(g) == normalized(own) for g in texts) for texts, own in pairs)
        overlap = sum(max(word_f1(g, own) for g in texts) for texts, own in pairs)
        return {"exact_match": points(exact / len(pairs)), "f1": points(overlap / len(pairs))}

    def answer(self, prediction: Prediction) -> object:
        """The text and its place."""
        found = cast("dict[str, Any]", prediction)
        return found["answer"], found["start"], found["end"]


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and more than one blank."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def word_f1(gold: str, given: str) -> float:
    """F1 of the words of two answers; of an empty one whether both are."""
    one, other = normalized(gold).split(), normalized(given).split()
    if not one or not other:
        return float(one == other)
    return Counts((Counter(one) & Counter(other)).total(), len(other), len(one)).f1


MEASURE = SpanMeasure
