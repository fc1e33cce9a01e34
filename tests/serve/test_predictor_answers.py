"""`Predictor` answers what the server answers: 500 mixed inputs of both tasks, eight threads."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import Running

from ft_handler.errors import RequestError
from ft_handler.predictor import Predictor

WORDS = [
    "the", "old", "Bridge", "of", "a", "city,", "was", "built", "by", "an", "engineer.", "film",
    "unbuilt", "é", "naïve", "[SEP]", "(1)", "河流", "\U0001f600", "don't", "a" * 60,
]  # fmt: skip


def text(rng: random.Random, longest: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))


def classification(rng: random.Random) -> object:
    kind = rng.randrange(6)
    if kind == 0:
        return {"text": text(rng, 20), "text_pair": text(rng, 20)}
    if kind == 1:
        return {"text": text(rng, 40), "top_k": rng.choice([None, 1, 2])}
    if kind == 2:
        return [text(rng, 30) for _ in range(rng.randint(1, 4))]
    if kind == 3:
        return {"inputs": text(rng, 200), "parameters": {"truncation": rng.random() < 0.5}}
    if kind == 4:
        return {"text": text(rng, 10), "function_to_apply": rng.choice(["none", "sigmoid", "x"])}
    return {"text": text(rng, 60)}


def question(rng: random.Random) -> object:
    pair: dict[str, object] = {"question": text(rng, 8), "context": text(rng, 120)}
    if rng.random() < 0.5:
        pair["top_k"] = rng.choice([1, 3, 0])
    if rng.random() < 0.3:
        pair["handle_impossible_answer"] = True
    if rng.random() < 0.3:
        pair |= {"max_seq_len": 48, "doc_stride": rng.choice([8, 16]), "max_question_len": 16}
    return [pair, {**pair, "context": text(rng, 10)}] if rng.random() < 0.2 else pair


def outcome(predictor: Predictor, request: object) -> tuple[int, Any]:
    try:
        return 200, predictor.predict(request)
    except RequestError as error:
        words = str(error)
        body = {"code": error.status, "type": error.type, "message": words, "error": words}
        return error.status, body


@pytest.mark.parametrize(
    ("model", "mode", "make"),
    [
        ("cls", "sequence_classification", classification),
        ("qa", "question_answering", question),
    ],
)
def test_answers_are_the_servers(
    running: Running, traced: Mapping[str, Path], model: str, mode: str, make: Any
) -> None:
    rng = random.Random(8)
    requests = [make(rng) for _ in range(250)]
    predictor = Predictor.load(traced[mode])
    found: list[tuple[int, Any] | None] = [None] * len(requests)

    def work(first: int) -> None:
        for at in range(first, len(requests), 8):
            found[at] = outcome(predictor, requests[at])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    statuses = set()
    for at, request in enumerate(requests):
        answer = running.predict_json(model, request)
        statuses.add(answer.status_code)
        # Of the same sequences a CPU computes the same bits, whatever shares the batch.
        assert outcome(predictor, request) == (answer.status_code, answer.json()), at
    for thread in threads:
        thread.join()
    assert found == [outcome(predictor, request) for request in requests]
    assert {200, 422} <= statuses
