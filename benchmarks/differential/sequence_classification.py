"""Sentences of SST-2 and pairs of them, classified by transformers' pipeline."""

from __future__ import annotations

import random
from typing import Any

from kinds import Ask, Case, Told, near
from reference import model_of, tokenizer_of
from texts import sentences


def draw(count: int, rng: random.Random) -> list[Case]:
    """Sentences, every label asked for."""
    return [{"input": one, "parameters": {"top_k": 1000}} for one in sentences(count, rng)]


def asked(base: str, adapter: str | None) -> Ask:
    """transformers' pipeline."""
    from transformers import pipeline

    model = model_of("AutoModelForSequenceClassification", base, adapter)
    ask = pipeline(
        "text-classification", model=model, tokenizer=tokenizer_of(base), top_k=None,
        truncation=True,
    )  # fmt: skip
    return lambda case: ask(case["input"])


def judged(case: Case, ours: list[Any], theirs: list[Any], told: Told) -> str:
    """Whether two lists of labels and scores are the same."""
    mine, other = ({one["label"]: one["score"] for one in side} for side in (ours, theirs))
    same = mine.keys() == other.keys() and all(near(mine[k], other[k]) for k in mine)
    return "same" if same else "other"
