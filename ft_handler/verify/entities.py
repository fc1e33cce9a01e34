"""Labels of words: F1 of whole entities, as CoNLL counts them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from ft_handler.errors import DataError
from ft_handler.types import Prediction
from ft_handler.verify.data import Example, Tag
from ft_handler.verify.measures import Counts, Measure, Subject, points

OUTSIDE = "O"


class EntityMeasure(Measure):
    """Answers are lists of entities with places: each token's `entity`, or an `entity_group`.

    A word has the label of its first token; one that is in no answer is outside.
    """

    parameters: Mapping[str, object] = {}

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        subject.outputs()
        info = subject.info
        self._names = [info.labels[i] for i in range(len(info.labels))]

    def gold(self, example: Example) -> Any:
        """The words with their labels; a label that is a number is one of the model's."""
        if not isinstance(example.gold, list) or not all(
            isinstance(tag, Tag) for tag in example.gold
        ):
            raise DataError(f"{example.place}: needs words and a label for each")
        return [Tag(t.begin, t.end, self._name(t.label, example.place)) for t in example.gold]

    def _name(self, label: str, place: str) -> str:
        if not label.isdecimal() or label in self._names:
            return label
        if int(label) < len(self._names):
            return self._names[int(label)]
        raise DataError(f"{place}: label {label} is over the model's {len(self._names)}")

    def metrics(self, golds: Sequence[Any], predictions: Sequence[Prediction]) -> dict[str, float]:
        """Precision, recall and F1 over all entities of all texts."""
        counts = Counts()
        for tags, prediction in zip(golds, predictions, strict=True):
            there = set(entities([tag.label for tag in tags]))
            given = set(entities(labels_of(tags, cast("list[dict[str, Any]]", prediction))))
            counts.add(len(there & given), len(given), len(there))
        return {name: points(getattr(counts, name)) for name in Counts.names}

    def answer(self, prediction: Prediction) -> object:
        """What stands where."""
        found = cast("list[dict[str, Any]]", prediction)
        return [(one.get("entity_group", one.get("entity")), one["start"], one["end"])
                for one in found]  # fmt: skip


def labels_of(words: Sequence[Tag], found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The label that an answer gives each word."""
    out = [OUTSIDE] * len(words)
    for one in found:
        group = one.get("entity_group")
        covered = [
            i
            for i, word in enumerate(words)
            if one["start"] <= word.begin < one["end"]
            or (group is not None and word.begin < one["start"] < word.end)
        ]
        for number, i in enumerate(covered):
            if group is not None:
                out[i] = f"{'I' if number else 'B'}-{group}"
            elif out[i] == OUTSIDE:
                out[i] = str(one["entity"])
    return out


def entities(labels: Iterable[str]) -> list[tuple[str, int, int]]:
    """Entities as (kind, first word, end) of labels in IOB1, IOB2 or IOBES.

    A label without a prefix, such as a part of speech, is an entity of one word.
    """
    out: list[tuple[str, int, int]] = []
    continues = False
    for at, label in enumerate(labels):
        if label == OUTSIDE:
            continues = False
            continue
        prefix, dash, kind = label.partition("-")
        if not dash or len(prefix) > 1:
            prefix, kind = "S", label
        if continues and prefix in "IE" and out[-1][0] == kind:
            out[-1] = (kind, out[-1][1], at + 1)
        else:
            out.append((kind, at, at + 1))
        continues = prefix in "BI"
    return out


MEASURE = EntityMeasure
