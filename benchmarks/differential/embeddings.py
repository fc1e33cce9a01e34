"""Sentences of SST-2 as vectors, by sentence-transformers."""

from __future__ import annotations

import math
import random
from typing import Any

from kinds import Ask, Case, Told
from texts import sentences

_TOLERANCE = 1e-5


def draw(count: int, rng: random.Random) -> list[Case]:
    """Sentences, embedded in several ways."""
    ways: tuple[dict[str, Any], ...] = ({}, {}, {"dimensions": 128}, {"prompt": "query: "})
    found = sentences(count, rng, pairs=0)
    return [{"input": one, "parameters": rng.choice(ways)} for one in found]


def asked(base: str, adapter: str | None) -> Ask:
    """sentence-transformers; dimensions are cut, then normalised."""
    import sentence_transformers

    model = sentence_transformers.SentenceTransformer(base, device="cpu")

    def ask(case: Case) -> Any:
        options = dict(case["parameters"])
        if dimensions := options.pop("dimensions", None):
            options |= {"truncate_dim": dimensions, "normalize_embeddings": True}
        vector = model.encode(case["input"]["text"], show_progress_bar=False, **options)
        return {"embedding": vector.tolist()}

    return ask


def judged(case: Case, ours: list[Any], theirs: list[Any], told: Told) -> str:
    """Whether two vectors point the same way: 1 - cosine is at most 1e-5, and their lengths."""
    a, b = ours[0]["embedding"], theirs[0]["embedding"]
    if len(a) != len(b):
        return "other"
    lengths = [math.sqrt(math.fsum(x * x for x in v)) for v in (a, b)]
    product = math.fsum(x * y for x, y in zip(a, b, strict=True))
    same = 1 - product / (lengths[0] * lengths[1]) <= _TOLERANCE
    return "same" if same and abs(lengths[0] - lengths[1]) <= _TOLERANCE else "other"
