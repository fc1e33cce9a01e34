"""The Python face: answers without a server, from a folder or the file alone, many threads."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from ft_handler.errors import ConfigError, RequestTooLarge, UnusableRequest
from ft_handler.predictor import Predictor
from ft_handler.prepare.options import TraceOptions
from ft_handler.prepare.trace import trace
from ft_handler.types import Incoming

TEXTS = ["a good film", "the old bridge of the city", "warm", "an awful plot and a dull actor"]
PAIR = {"question": "who built it", "context": "An engineer built the old Bridge of the city."}


@pytest.fixture(scope="module")
def folders(
    tiny_classification: Path, tiny_qa: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Mode -> a traced folder."""
    out = {}
    for mode, source in (
        ("sequence_classification", tiny_classification),
        ("question_answering", tiny_qa),
    ):
        out[mode] = tmp_path_factory.mktemp("traced") / mode
        trace(TraceOptions(mode=mode, model_name_or_path=str(source), output=out[mode]))
    return out


@pytest.fixture(scope="module")
def classifier(folders: dict[str, Path]) -> Predictor:
    return Predictor.load(folders["sequence_classification"])


def test_one_answer_or_a_list_of_them(classifier: Predictor) -> None:
    one: Any = classifier.predict(TEXTS[0])
    assert set(one) == {"label", "score"}
    many: Any = classifier.predict(TEXTS)
    assert [m["label"] for m in many] == [classifier.predict(t)["label"] for t in TEXTS]  # type: ignore[index]
    assert many[0]["score"] == pytest.approx(one["score"], abs=1e-6)
    assert len(classifier.predict(TEXTS[0], top_k=2)) == 2  # type: ignore[arg-type]
    pair: Any = classifier.predict({"text": "a film", "text_pair": "the plot"})
    assert pair["label"] in classifier.info.labels.values()


def test_the_file_alone_answers_the_same(folders: dict[str, Path], tmp_path: Path) -> None:
    for mode, question in (("sequence_classification", TEXTS[1]), ("question_answering", PAIR)):
        alone = tmp_path / f"{mode}.pt"
        alone.write_bytes((folders[mode] / "traced_model.pt").read_bytes())
        of_file = Predictor.load(alone).predict(question)
        assert of_file == Predictor.load(folders[mode]).predict(question)


def test_arguments_win_over_the_folders_settings(folders: dict[str, Path]) -> None:
    short = Predictor.load(folders["sequence_classification"], settings={"max_length": 5})
    answer: Any = short.predict(TEXTS[1])
    assert answer["truncated"] is True


def test_refusals_are_exceptions_with_their_status(classifier: Predictor) -> None:
    with pytest.raises(UnusableRequest, match=r"inputs\[1\]") as refused:
        classifier.predict(["a", 5])
    assert refused.value.status == 422
    with pytest.raises(RequestTooLarge):
        classifier.predict("a" * 250_001)
    with pytest.raises(UnusableRequest, match="'top_k' must be at least 1"):
        classifier.predict("a", top_k=0)


def test_answers_are_explained_whatever_the_settings_say(classifier: Predictor) -> None:
    one: Any = classifier.explain(TEXTS[0])
    assert one["words"] == TEXTS[0].split()
    assert len(one["importances"]) == 3
    many: Any = classifier.explain(TEXTS[:2], target="neutral")
    assert [m["label"] for m in many] == ["neutral", "neutral"]
    with pytest.raises(UnusableRequest, match="'target'"):
        classifier.explain("a", target="terrible")


def test_what_cannot_be_loaded_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder or file"):
        Predictor.load(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="max_lenght"):
        Predictor.load(folders["question_answering"], settings={"max_lenght": 3})


def test_settings_of_a_server_are_left_alone(folders: dict[str, Path]) -> None:
    Predictor.load(folders["question_answering"], settings={"metrics": False})


@pytest.mark.parametrize("mode", ["sequence_classification", "question_answering"])
def test_answers_are_a_servers_from_eight_threads(folders: dict[str, Path], mode: str) -> None:
    predictor = Predictor.load(folders[mode])
    requests: list[object] = list(TEXTS) * 8
    if mode == "question_answering":
        requests = [{**PAIR, "context": f"{t}. {PAIR['context']}"} for t in TEXTS] * 8
    wanted = []
    for request in requests:
        ((reply,), _) = predictor._pipeline.run([Incoming(request)])
        wanted.append(json.loads(reply.body))
    found: list[object] = [None] * len(requests)

    def work(first: int) -> None:
        for at in range(first, len(requests), 8):
            found[at] = predictor.predict(requests[at])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted
