"""A token classifier in a real TorchServe answers what a Predictor answers, in every form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ft_handler.predictor import Predictor

TEXT = "The old captain sailed to the harbour, and who built it?"
LONG = "the painter sailed the old river to the museum of the city, " * 30


@pytest.fixture(scope="module")
def served(running: Any) -> Iterator[Any]:
    """The shared server, with `tok` registered."""
    answer = running.manage("POST", "/models", url="tok.mar", initial_workers=1, synchronous="true")
    assert answer.status_code == 200, answer.text
    yield running
    running.manage("DELETE", "/models/tok")


def same(found: Any, wanted: Any) -> bool:
    """The same entities, their scores nearly."""
    return [{**a, "score": None} for a in found] == [{**a, "score": None} for a in wanted] and [
        a["score"] for a in found
    ] == pytest.approx([a["score"] for a in wanted], abs=1e-5)


def test_tokens_and_entities_in_every_form(served: Any, traced: Mapping[str, Path]) -> None:
    ask = Predictor.load(traced["token_classification"]).predict
    entities = ask(TEXT, aggregation_strategy="average")
    long = ask(LONG, aggregation_strategy="simple")
    assert len(entities) > 2
    assert long[-1]["end"] > len(LONG) / 2
    assert same(served.predict("tok", TEXT).json(), ask(TEXT))
    asked = {"text": TEXT, "aggregation_strategy": "average"}
    assert same(served.predict_json("tok", asked).json(), entities)
    assert same(
        served.predict_json("tok", {"text": LONG, "aggregation_strategy": "simple"}).json(), long
    )
    nothing = {"text": TEXT, "ignore_labels": ["O", *(a["entity"] for a in ask(TEXT))]}
    assert served.predict_json("tok", nothing).json() == []
    first, second = served.predict_json("tok", [asked, nothing]).json()
    assert same(first, entities)
    assert second == []
    refused = served.predict_json("tok", {**asked, "aggregation_strategy": "last"})
    assert (refused.status_code, refused.json()["type"]) == (422, "UnusableRequest")
    address = served.server.inference
    v1 = served.session.post(f"{address}/v1/models/tok:predict", json={"instances": [asked]})
    assert same(v1.json()["predictions"][0], entities)
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [TEXT]}
    v2 = served.session.post(
        f"{address}/v2/models/tok/infer",
        json={"inputs": [tensor], "parameters": {"aggregation_strategy": "average"}},
    )
    columns = {o["name"]: o["data"] for o in v2.json()["outputs"]}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    assert same(rows, entities)


def test_the_hubs_client_reads_entities(served: Any, traced: Mapping[str, Path]) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    client = hub.InferenceClient(model=f"{served.server.inference}/predictions/tok")
    ask = Predictor.load(traced["token_classification"]).predict
    found = client.token_classification(
        LONG, aggregation_strategy="first", ignore_labels=["O", "PER"], stride=40
    )
    given = {"aggregation_strategy": "first", "ignore_labels": ["O", "PER"], "stride": 40}
    wanted = ask(LONG, **given)
    assert [(e.entity_group, e.word, e.start, e.end) for e in found] == [
        (a["entity_group"], a["word"], a["start"], a["end"]) for a in wanted
    ]
    assert client.token_classification("\u200b") == []


def test_an_answer_that_torchserve_cannot_take_is_refused_alone(served: Any) -> None:
    """Its front ends a worker, and all that it holds, for more than `max_response_size`."""
    pids = served.pids("tok")
    # Some 90 bytes for each of 70,000 tokens, where 6,553,500 are taken.
    refused = served.predict_json("tok", {"text": "a film " * 35_000})
    assert (refused.status_code, refused.json()["type"]) == (413, "RequestTooLarge")
    assert "the limit is 6553500" in refused.json()["message"]
    assert served.predict("tok", TEXT).status_code == 200
    assert served.pids("tok") == pids
