"""Reranking and zero-shot classification through a real server, of files with one shared head."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Running

from ft_handler.predictor import Predictor
from ft_handler.prepare.options import TraceOptions
from ft_handler.prepare.trace import trace
from ft_handler.servers.torchserve.archive import archive

QUERY = "who built the old bridge"
TEXTS = ["a warm film", "an engineer built the bridge of the city", "a warm film", "the river"]
LABELS = ["travel", "music", "a film"]
SENTENCE = "the captain sailed on the river"


def register(running: Running, store: Path, folder: Path, name: str) -> None:
    archive(folder, model_name=name, export_path=store)
    answer = running.manage(
        "POST", "/models", url=f"{name}.mar", initial_workers=1, synchronous="true"
    )
    assert answer.status_code == 200, answer.text


@pytest.fixture(scope="module")
def reranker(
    running: Running,
    store: Path,
    make_tiny_bert: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A file traced for reranking, served as `rank`."""
    source = make_tiny_bert(num_labels=1, id2label={0: "score"}, label2id={"score": 0})
    folder = tmp_path_factory.mktemp("rank") / "rank"
    trace(TraceOptions(mode="reranking", model_name_or_path=str(source), output=folder))
    register(running, store, folder, "rank")
    return folder


@pytest.fixture(scope="module")
def zero_shot(
    running: Running,
    store: Path,
    traced: Mapping[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A file traced for sequence classification, served as `zero` by the setting `mode`."""
    folder = tmp_path_factory.mktemp("zero") / "zero"
    shutil.copytree(traced["sequence_classification"], folder)
    config = folder / "model-config.yaml"
    settings = yaml.safe_load(config.read_text())
    settings["handler"] |= {"mode": "zero_shot_classification", "max_labels": 5}
    config.write_text(yaml.safe_dump(settings))
    register(running, store, folder, "zero")
    return folder


def test_reranking(running: Running, reranker: Path) -> None:
    predictor = Predictor.load(reranker)
    asked = {"query": QUERY, "texts": TEXTS, "return_text": True}
    own: Any = predictor.predict(asked)
    assert [a["text"] for a in own] == [TEXTS[a["index"]] for a in own]
    places = [a["index"] for a in own]
    assert places.index(2) == places.index(0) + 1
    assert running.predict_json("rank", asked).json() == own
    cohere = {"model": "x", "query": QUERY, "documents": TEXTS, "top_n": 2}
    assert running.predict_json("rank", cohere).json() == {
        "results": [{"index": a["index"], "relevance_score": a["score"]} for a in own[:2]]
    }
    url = f"{running.server.inference}/v1/models/rank:predict"
    found = running.session.post(url, json={"instances": [asked, asked]}, timeout=60).json()
    assert found == {"predictions": [own, own]}
    tensors = [
        {"name": name, "shape": [len(data)], "datatype": "BYTES", "data": data}
        for name, data in (("query", [QUERY]), ("texts", TEXTS))
    ]
    url = f"{running.server.inference}/v2/models/rank/infer"
    found = running.session.post(url, json={"inputs": tensors}, timeout=60).json()
    assert [(o["name"], o["shape"]) for o in found["outputs"]] == [
        ("index", [1, 4]),
        ("score", [1, 4]),
    ]
    assert found["outputs"][0]["data"] == places
    refused = running.predict_json("rank", {**asked, "texts": [*TEXTS, ""]})
    assert (refused.status_code, refused.json()["message"]) == (422, "'texts'[4] is empty")


def test_zero_shot_classification(running: Running, zero_shot: Path) -> None:
    predictor = Predictor.load(zero_shot)
    asked = {"text": SENTENCE, "candidate_labels": LABELS}
    own: Any = predictor.predict(asked)
    assert set(own) == {"sequence", "labels", "scores"}
    assert running.predict_json("zero", asked).json() == own
    form = {"text": SENTENCE, "candidate_labels": ",".join(LABELS)}
    url = f"{running.server.inference}/predictions/zero"
    assert running.session.post(url, data=form, timeout=60).json() == own
    refused = running.predict_json("zero", {**asked, "candidate_labels": LABELS * 2})
    assert refused.status_code == 413
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    client = hub.InferenceClient(model=url)
    found = client.zero_shot_classification(SENTENCE, LABELS)
    assert [(a.label, a.score) for a in found] == [*zip(own["labels"], own["scores"], strict=True)]
    more: dict[str, Any] = {"multi_label": True, "hypothesis_template": "It is {}."}
    wanted: Any = predictor.predict({**asked, **more})
    found = client.zero_shot_classification(SENTENCE, LABELS, **more)
    assert [a.label for a in found] == wanted["labels"]
    with pytest.raises(hub.errors.HfHubHTTPError, match="once"):
        client.zero_shot_classification(SENTENCE, LABELS, hypothesis_template="no place")
