"""Beginnings of SQuAD's paragraphs, whose tokens are labelled by transformers' pipeline.

The model is best one of random weights (`python benchmarks/differential model`): noisy labels are
what grouping is tried with.
"""

from __future__ import annotations

import random
from typing import Any

from kinds import Ask, Case, Told, near
from reference import model_of, tokenizer_of
from texts import mutated, paragraphs

#: For windows of 128 tokens, special ones included; half of the texts need one alone.
_SETTINGS: tuple[dict[str, Any], ...] = tuple(
    {"aggregation_strategy": strategy, **more}
    for strategy in ("none", "simple", "first", "average", "max")
    for more in (
        {},
        {},
        {"ignore_labels": []},
        {"ignore_labels": ["O", "PER", "B-LOC", "nothing"]},
        *(
            []
            if strategy == "none"
            else [{"stride": 24}, {"stride": 48, "ignore_labels": ["MISC"]}]
        ),
    )
)

_LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC")
#: Of a random model's configuration.
CONFIGURED: dict[str, Any] = {
    "num_labels": len(_LABELS),
    "id2label": dict(enumerate(_LABELS)),
    "label2id": {name: i for i, name in enumerate(_LABELS)},
}


def draw(count: int, rng: random.Random) -> list[Case]:
    """Beginnings of paragraphs, under every strategy."""
    contexts = [p["context"] for p in paragraphs()]
    return [
        {
            "input": {
                "text": mutated(rng.choice(contexts)[: rng.choice((60, 200, 500, 900))], rng)
            },
            "parameters": rng.choice(_SETTINGS),
        }
        for _ in range(count)
    ]


def asked(base: str, adapter: str | None) -> Ask:
    """transformers' pipeline."""
    from transformers import pipeline

    model = model_of("AutoModelForTokenClassification", base, adapter)
    ask = pipeline("token-classification", model=model, tokenizer=tokenizer_of(base))
    return lambda case: ask(case["input"]["text"], **case["parameters"])


def judged(case: Case, ours: list[Any], theirs: list[Any], told: Told) -> str:
    """Whether both are the same, else the documented class they differ by."""
    return _Judge(told.model).judged(case, ours, theirs)


class _Judge:
    """Judges lists of tokens or entities; what differs is explained by computing it again."""

    def __init__(self, model: Any) -> None:
        self._pipeline, self._runner = model.pipeline, model.pipeline._runner

    def judged(self, case: Case, ours: list[Any], theirs: list[Any]) -> str:
        """Whether both are the same, else the documented class they differ by."""
        if _same(ours, theirs):
            return "same"
        kinds = []
        if case["parameters"]["aggregation_strategy"] in ("first", "average", "max"):
            again = self._by_their_words(case)
            if _same(again, theirs):
                return "words whose length cleaning changes: there they continue the one before"
            if again != ours:
                kinds, ours = ["words of another length, and"], again
        alone = self._until_second_window(case["input"]["text"])
        if alone is None:
            return "other"
        # What both read in the first window alone; its last entity may go on behind that.
        heads = [[a for a in one if a["end"] <= alone] for one in (ours, theirs)]
        count = min(map(len, heads)) - 1
        if count > 0 and not _same(heads[0][:count], heads[1][:count]):
            return "other"
        stride = "stride" in case["parameters"]
        kinds.append("windows are merged otherwise" if stride else "cut there, read whole here")
        return " ".join(kinds)

    def _by_their_words(self, case: Case) -> list[Any]:
        """Our answer if words began where transformers' rule for WordPiece has them."""
        from ft_handler.types import Incoming

        pieces = self._runner._pieces
        own = pieces.begin_words

        def their_words(ids: Any, origins: Any, text: str) -> Any:
            begins = own(ids, origins, text)
            for i, word in enumerate(pieces.spelled(ids, origins, text)):
                begins[i] = len(word) == origins[i, 1] - origins[i, 0]
            begins[:1] = True
            return begins

        pieces.begin_words = their_words
        try:
            found: list[Any] = self._pipeline.predict(
                Incoming({**case["input"], **case["parameters"]})
            )
        finally:
            del pieces.begin_words
        return found

    def _until_second_window(self, text: str) -> int | None:
        """The character at which a second window begins; None for a text of one."""
        from ft_handler.tasks.token_classification import Parameters, TokenInput
        from ft_handler.types import Item

        room = self._runner._room
        (encoding,) = self._runner.encode([Item(0, 0, TokenInput(text, Parameters()))])
        if len(encoding.ids) <= room:
            return None
        # Under any of the strides, neighbours share less than half.
        least = min(room // 2, len(encoding.ids) - room)
        return int(encoding.origins[least, 0])


def _same(ours: list[Any], theirs: list[Any]) -> bool:
    """Whether two lists agree in every field, in order."""
    return len(ours) == len(theirs) and all(
        a.keys() == b.keys()
        and near(a["score"], b["score"])
        and all(a[k] == b[k] for k in a if k != "score")
        for a, b in zip(ours, theirs, strict=True)
    )
