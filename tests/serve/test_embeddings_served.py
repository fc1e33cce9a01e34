"""Embeddings through a real server: every body, and the clients that send them."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Running
from sentences import write_json, write_modules
from test_clients import ask

from ft_handler.predictor import Predictor
from ft_handler.prepare.options import TraceOptions
from ft_handler.prepare.trace import trace
from ft_handler.servers.torchserve.archive import archive

TEXTS = ("the film was great", "a bad plot", "caf\u00e9 in the old harbour")


@pytest.fixture(scope="module")
def predictor(
    make_tiny_bert: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
    store: Path,
    running: Running,
) -> Predictor:
    """A tiny encoder, registered as `embeddings`, and what answers in this process."""
    source = write_modules(make_tiny_bert("embeddings"), "mean", normalize=True)
    write_json(source, "config_sentence_transformers.json", {"prompts": {"query": "what film "}})
    folder = tmp_path_factory.mktemp("traced") / "embeddings"
    trace(TraceOptions(mode="embeddings", model_name_or_path=str(source), output=folder))
    archive(folder, model_name="embeddings", export_path=store)
    asked = {"url": "embeddings.mar", "initial_workers": 1, "synchronous": "true"}
    answer = running.manage("POST", "/models", **asked)
    assert answer.status_code == 200, answer.text
    return Predictor.load(folder)


def test_every_body_has_its_answer(predictor: Predictor, running: Running) -> None:
    tensor = {"name": "text", "shape": [2], "datatype": "BYTES", "data": list(TEXTS[:2])}
    bodies: list[Any] = [
        {"text": TEXTS[0]},
        list(TEXTS),
        {"inputs": TEXTS[0], "prompt_name": "query"},
        {"inputs": list(TEXTS), "dimensions": 7},
        {"input": list(TEXTS), "model": "any", "encoding_format": "base64"},
        {"input": TEXTS[2], "model": "any"},
    ]
    for body in bodies:
        answer = running.predict_json("embeddings", body)
        assert answer.status_code == 200, answer.text
        # To the last digit, alone or among others.
        assert answer.json() == predictor.predict(body)
    (vector,) = predictor.predict({"inputs": TEXTS[0]})  # type: ignore[misc]
    assert running.predict("embeddings", TEXTS[0]).json()["embedding"] == vector
    inference = running.server.inference
    one = {"instances": [TEXTS[0]]}
    answer = running.session.post(f"{inference}/v1/models/embeddings:predict", json=one)
    assert answer.json()["predictions"][0]["embedding"] == vector
    two = {"inputs": [tensor]}
    answer = running.session.post(f"{inference}/v2/models/embeddings/infer", json=two)
    embedding = answer.json()["outputs"][0]
    assert (embedding["shape"], embedding["datatype"]) == ([2, 64], "FP32")
    assert embedding["data"][:64] == vector
    # As many as OpenAI takes at once.
    many = {"input": ["a film"] * 2048, "model": "any", "encoding_format": "base64"}
    data = running.predict_json("embeddings", many).json()["data"]
    assert (len(data), data[-1]["index"]) == (2048, 2047)
    assert len({entry["embedding"] for entry in data}) == 1
    assert running.predict_json("embeddings", ["a film"] * 2049).status_code == 413
    refused = running.predict_json("embeddings", {"input": [101, 7592], "model": "any"})
    assert (refused.status_code, refused.json()["message"]) == (
        422, "token ids are not accepted: send texts",
    )  # fmt: skip


def test_the_hubs_client(predictor: Predictor, running: Running) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    client = hub.InferenceClient(model=f"{running.server.inference}/predictions/embeddings")
    for options in (
        {},
        {"normalize": False, "prompt_name": "query"},
        {"truncate": True, "truncation_direction": "left"},
    ):
        found = client.feature_extraction(TEXTS[0], **options)
        wanted = np.array(predictor.predict({"inputs": TEXTS[0], **options}), np.float32)
        assert found.shape == (1, 64)
        assert np.array_equal(found, wanted)
    with pytest.raises(hub.errors.HfHubHTTPError, match="'prompt_name' must be one of query"):
        client.feature_extraction(TEXTS[0], prompt_name="nonsense")


def test_openais_client(predictor: Predictor, running: Running) -> None:
    found = ask("openai", running, "embeddings")
    wanted = np.array(predictor.predict({"inputs": list(TEXTS)}), np.float32)
    assert set(found) == {"unsaid", "float", "base64", "dimensions", "refusal"}
    for name in ("unsaid", "float"):
        assert np.array_equal(np.array(found[name]["vectors"], np.float32), wanted)
        assert found[name]["model"] == "embeddings"
        assert found[name]["tokens"] > len(TEXTS)
    packed = [np.frombuffer(base64.b64decode(v), "<f4") for v in found["base64"]["vectors"]]
    assert np.array_equal(packed, wanted)
    short = np.array(found["dimensions"]["vectors"])
    assert short.shape == (3, 5)
    assert np.linalg.norm(short, axis=1) == pytest.approx([1] * 3, abs=1e-6)
    status, message = found["refusal"]
    assert status == 422
    assert "token ids" in message
