"""Passages of SQuAD for its questions, ranked by sentence-transformers' CrossEncoder."""

from __future__ import annotations

import random
import tempfile
from typing import Any

from kinds import Ask, Case, Told, near
from reference import model_of, tokenizer_of
from texts import questions

#: Of a random model's configuration.
CONFIGURED: dict[str, Any] = {"num_labels": 1}


def draw(count: int, rng: random.Random) -> list[Case]:
    """Questions with one to six passages each, some of them the same, some very long."""
    asked = questions(count, rng)
    drawn = []
    for one in asked:
        found = [one["context"], *(rng.choice(asked)["context"] for _ in range(rng.randrange(5)))]
        if rng.random() < 0.1:
            found.append(rng.choice(found))
        rng.shuffle(found)
        query = one["question"] * (40 if rng.random() < 0.03 else 1)
        drawn.append({
            "input": {"query": query, "texts": found},
            "parameters": {"raw_scores": rng.random() < 0.5},
        })  # fmt: skip
    return drawn


def asked(base: str, adapter: str | None) -> Ask:
    """sentence-transformers' CrossEncoder."""
    import torch
    from sentence_transformers import CrossEncoder

    with tempfile.TemporaryDirectory() as folder:
        model_of("AutoModelForSequenceClassification", base, adapter).save_pretrained(folder)
        tokenizer = tokenizer_of(base)
        tokenizer.save_pretrained(folder)
        model = CrossEncoder(folder, max_length=tokenizer.model_max_length, device="cpu")

    def ask(case: Case) -> Any:
        raw = torch.nn.Identity() if case["parameters"]["raw_scores"] else None
        found = model.rank(
            case["input"]["query"], case["input"]["texts"], activation_fn=raw,
            show_progress_bar=False,
        )  # fmt: skip
        return [{"index": one["corpus_id"], "score": float(one["score"])} for one in found]

    return ask


def refused(case: Case, message: str) -> str | None:
    """The documented reason for which a request is refused here, if it is one."""
    return "an empty text or label is refused here" if message.endswith("is empty") else None


def judged(case: Case, ours: list[Any], theirs: list[Any], told: Told) -> str:
    """Whether two lists of candidates have the same scores in the same order."""
    level = all(near(a["score"], b["score"]) for a, b in zip(ours, theirs, strict=True))
    mine, other = ({one["index"]: one["score"] for one in side} for side in (ours, theirs))
    if not level or any(not near(mine[i], other[i]) for i in other):
        return "other"
    return "same" if [*mine] == [*other] else "equal scores in another order"
