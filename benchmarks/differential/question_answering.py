"""Questions of SQuAD, answered by transformers' pipeline."""

from __future__ import annotations

import random
from typing import Any

from kinds import Ask, Case, Told, near
from reference import model_of, tokenizer_of
from texts import questions

_SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"top_k": 5},
    {"max_seq_len": 96, "doc_stride": 24, "top_k": 3},
    {"max_seq_len": 128, "handle_impossible_answer": True},
    {"align_to_words": False, "top_k": 3, "max_answer_len": 30},
)


def draw(count: int, rng: random.Random) -> list[Case]:
    """Questions under various parameters."""
    asked = questions(count, rng)
    return [{"input": one, "parameters": rng.choice(_SETTINGS)} for one in asked]


def asked(base: str, adapter: str | None) -> Ask:
    """transformers' pipeline."""
    from transformers import pipeline

    model = model_of("AutoModelForQuestionAnswering", base, adapter)
    ask = pipeline("question-answering", model=model, tokenizer=tokenizer_of(base))
    return lambda case: ask(**case["input"], **case["parameters"])


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    fields = ("answer", "start", "end")
    return all(a[f] == b[f] for f in fields) and near(a["score"], b["score"])


def judged(case: Case, ours: list[Any], theirs: list[Any], told: Told) -> str:
    """Whether two lists of answers are the same, else the documented class they differ by."""
    pairs = list(zip(ours, theirs, strict=False))
    if all(_same(a, b) for a, b in pairs):
        if len(ours) == len(theirs):
            return "same"
        rest = (ours if len(ours) > len(theirs) else theirs)[len(pairs) :]
        return "list ends elsewhere, at scores near 0" if rest[0]["score"] < 1e-3 else "other"
    if any(one.get("truncated") for one in ours):
        return "question cut here"
    if told.first_token in case["input"]["question"] + case["input"]["context"]:
        return f"{told.first_token} spelt out: there it may be an answer's begin"
    differ = [(a, b) for a, b in pairs if not _same(a, b)]
    if all(a["score"] < 1e-3 and b["score"] < 1e-3 for a, b in differ):
        return "answers of scores near 0 in another order"
    if all(near(a["score"], b["score"]) for a, b in differ):
        return "equal scores in another order"
    longest = min(case["parameters"].get("max_seq_len", 384), told.model.info.max_positions)
    shared = {"doc_stride": min(longest // 2, 128), **case["parameters"]}
    if longest < 384 and shared != case["parameters"]:
        again = told.answered({"input": case["input"], "parameters": shared})
        if again != ours:
            found = judged({**case, "parameters": shared}, again, theirs, told)
            return found if found == "other" else "windows share less beside a long question"
    if longest < 384 and case["parameters"].get("align_to_words", True):
        return "words cut by a window"
    return "other"
