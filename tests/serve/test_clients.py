"""Client libraries of other servers against a running one, each in an environment of its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TEXTS = ("the film was great", "a bad plot", "caf\u00e9 in the old harbour")
Expected = Callable[[str], dict[str, float]]


def ask(client: str, running: Any, *models: str) -> dict[str, Any]:
    """What a client library understood, by what was asked; skips where it is not installed."""
    python = ROOT / "build" / "clients" / client / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{client} is not installed (scripts/environments.sh)")
    script = ROOT / "tests" / "clients" / f"{client}_client.py"
    command = [python, script, running.server.inference, *models, *TEXTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def check(found: dict[str, Any], running: Any, expected: Expected) -> None:
    """Every answer is the model's own; the refusal has its status and says why."""
    assert set(found) >= {"v2", "qa", "refusal"}
    for name, answer in found.items():
        if name.startswith("v"):
            rows = answer if name == "v1" else [
                {"label": label, "score": score}
                for label, score in zip(answer["label"], answer["score"], strict=True)
            ]  # fmt: skip
            assert len(rows) == len(TEXTS), name
            for row, text in zip(rows, TEXTS, strict=True):
                assert row["score"] == pytest.approx(expected(text)[row["label"]], abs=1e-4), name
    asked = {"question": "who built it", "context": TEXTS[0]}
    own = running.predict_json("qa", asked).json()
    qa = {key: values[0] for key, values in found["qa"].items()}
    assert qa == {**own, "score": pytest.approx(own["score"], rel=1e-5)}
    status, message = found["refusal"]
    assert status == 422
    assert "empty" in message


@pytest.mark.parametrize("client", ["kserve", "tritonclient", "mlserver"])
def test_clients_of_other_servers(client: str, running: Any, expected: Expected) -> None:
    found = ask(client, running, "cls", "qa")
    check(found, running, expected)
    if client == "tritonclient":
        status, message = found["gzip"]
        assert status == 415
        assert "gzip" in message


def test_the_hubs_client(running: Any, expected: Expected) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    base = running.server.inference
    client = hub.InferenceClient(model=f"{base}/predictions/cls")
    scores = expected(TEXTS[0])
    answer = client.text_classification(TEXTS[0])
    assert {a.label: pytest.approx(a.score, abs=1e-4) for a in answer} == scores
    (best,) = client.text_classification(TEXTS[0], top_k=1, function_to_apply="softmax")
    assert best.label == max(scores, key=lambda label: scores[label])
    with pytest.raises(hub.errors.HfHubHTTPError, match="empty"):
        client.text_classification("")
    client = hub.InferenceClient(model=f"{base}/predictions/qa")
    asked = {"question": "who built it", "context": "an engineer built the old bridge"}
    own = running.predict_json("qa", asked).json()
    answer = client.question_answering(**asked)
    assert (answer.answer, answer.start, answer.end) == (own["answer"], own["start"], own["end"])
    answers = client.question_answering(
        **asked, top_k=2, doc_stride=8, max_answer_len=5, max_question_len=16, max_seq_len=64,
        handle_impossible_answer=True, align_to_words=False,
    )  # fmt: skip
    assert len(answers) == 2
