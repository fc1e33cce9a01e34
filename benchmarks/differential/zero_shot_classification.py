"""Sentences of SST-2 under candidate labels, judged by transformers' pipeline."""

from __future__ import annotations

import random
from typing import Any

from kinds import Ask, Case, Told, near
from reference import model_of, tokenizer_of
from texts import mutated, sentences

_SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"multi_label": True},
    {"hypothesis_template": "It is about {}, I think."},
    {"hypothesis_template": "{}", "multi_label": True},
    {"hypothesis_template": "{{{0}}} \u6771\u4eac"},
    {"hypothesis_template": "about"},
)
_LABELS = (
    "travel", "space & cosmos", "not urgent", "a film review", "M\u00fcnchen", "politics, local",
    "\u6771\u4eac", "sports", "positive", "negative", "(other)", "[SEP]", "e\u0301clair", "R&D",
)  # fmt: skip

_OUTPUTS = ("contradiction", "neutral", "entailment")
#: Of a random model's configuration.
CONFIGURED: dict[str, Any] = {
    "num_labels": len(_OUTPUTS),
    "id2label": dict(enumerate(_OUTPUTS)),
    "label2id": {name: i for i, name in enumerate(_OUTPUTS)},
}


def draw(count: int, rng: random.Random) -> list[Case]:
    """Sentences with one to six labels, some of both mutated, some texts far too long."""
    drawn = []
    for one in sentences(count, rng, pairs=0):
        labels = [
            label if rng.random() < 0.7 else mutated(label, rng)
            for label in rng.choices(_LABELS, k=rng.randrange(1, 7))
        ]
        parameters = {"candidate_labels": labels, **rng.choice(_SETTINGS)}
        drawn.append({"input": one, "parameters": parameters})
    return drawn


def asked(base: str, adapter: str | None) -> Ask:
    """transformers' pipeline."""
    from transformers import pipeline

    model = model_of("AutoModelForSequenceClassification", base, adapter)
    ask = pipeline("zero-shot-classification", model=model, tokenizer=tokenizer_of(base))
    return lambda case: ask(case["input"]["text"], **case["parameters"])


def refused(case: Case, message: str) -> str | None:
    """The documented reason for which a request is refused here, if it is one."""
    if message.endswith("is empty"):
        return "an empty text or label is refused here"
    if "'hypothesis_template' must hold '{}' once" in message:
        return "a template without a place is refused here"
    return None


def judged(case: Case, ours: list[Any], theirs: list[Any], told: Told) -> str:
    """Whether two answers are the same; equal labels may be in another order."""
    (mine,), (other,) = ours, theirs
    pairs = [sorted(zip(one["labels"], one["scores"], strict=True)) for one in (mine, other)]
    if mine["sequence"] != other["sequence"] or not all(
        a[0] == b[0] and near(a[1], b[1]) for a, b in zip(*pairs, strict=True)
    ):
        return "other"
    if mine["labels"] == other["labels"]:
        return "same"
    level = all(near(a, b) for a, b in zip(mine["scores"], other["scores"], strict=True))
    return "equal scores in another order" if level else "other"
