"""One real TorchServe: payload forms, management, bad requests, a killed worker, gRPC."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.parse
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from malformed import CASES
from odd_requests import Odd, odd_requests
from tiny import WORD_LIST

from ft_handler.predictor import Predictor
from ft_handler.servers.torchserve.archive import archive
from ft_handler.servers.torchserve.metrics import METRICS

Expected = Callable[[str], dict[str, float]]

ODD_BATCHES = 40  # of 8 to 24 odd requests

SENTENCE = "the film was great"
CONTEXT = "the old bridge was built in the harbour and opened that year"
QUESTION = {"question": "who built it", "context": CONTEXT}


def sentence(number: int) -> str:
    """A text of its own for every number, of many lengths."""
    rng = random.Random(number)
    words = rng.choices(WORD_LIST.split(), k=rng.randint(1, 60))
    return f"{number} " + " ".join(words)


def right(answer: Any, text: str, expected: Expected) -> bool:
    """Whether the best label and its score are transformers' own."""
    scores = expected(text)
    best = max(scores, key=lambda label: scores[label])
    return answer["label"] == best and abs(answer["score"] - scores[best]) < 1e-4


def test_plain_text(running: Any, expected: Expected) -> None:
    answer = running.predict("cls", SENTENCE)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert right(answer.json(), SENTENCE, expected)


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (SENTENCE, "text/plain; charset=utf-8"),
        (SENTENCE, "application/octet-stream"),
        (SENTENCE, None),
        (json.dumps({"text": SENTENCE}), "application/json"),
        (json.dumps({"text": SENTENCE, "target": 1}), "application/json"),
        (json.dumps({"text": SENTENCE}), "text/plain"),
        (str({"text": SENTENCE, "target": 1}), "text/plain"),
        (urllib.parse.urlencode({"data": SENTENCE}), "application/x-www-form-urlencoded"),
        (urllib.parse.urlencode({"text": SENTENCE}), "application/x-www-form-urlencoded"),
    ],
)
def test_one_text_in_every_form(
    running: Any, expected: Expected, body: str, content_type: str | None
) -> None:
    answer = running.predict("cls", body, content_type)
    assert answer.status_code == 200, answer.text
    assert right(answer.json(), SENTENCE, expected)


@pytest.mark.parametrize(
    ("body", "content_type", "text"),
    [
        (b"{wow} nice", "text/plain", "{wow} nice"),
        (b"[[Film]] is great", "TEXT/plain", "[[Film]] is great"),
        (b'{"text": "a', "text/markdown; charset=utf-8", '{"text": "a'),
        (b"[ ] fix", None, "[ ] fix"),
        ("caf\u00e9".encode("latin-1"), "text/plain; charset=ISO-8859-1", "caf\u00e9"),
        ('{"text": "caf\u00e9"}'.encode("utf-16"), "application/json; charset=utf-16", "caf\u00e9"),
        (b'{"text": "a film"}', "Application/JSON", "a film"),
        (b'{"text": "a film"}', "application/x+json", "a film"),
        (b"the \0film", "text/plain", "the film"),
        (b'{"text": "the \\u0000film"}', "application/json", "the film"),
        (b'{"text": "\\q"}', "application/json", None),
        (b'{"text": "a",}', "application/json", None),
        (b'{"text": "a",}', None, None),
        (b"a film", "application/json", None),
    ],
)
def test_a_body_is_what_it_was_declared(
    running: Any, expected: Expected, body: bytes, content_type: str | None, text: str | None
) -> None:
    answer = running.predict("cls", body, content_type)
    assert answer.status_code == (400 if text is None else 200), answer.text
    if text is not None:
        assert right(answer.json(), text, expected)


def test_every_route_of_a_prediction(running: Any, expected: Expected) -> None:
    base = running.server.inference
    headers = {"Content-Type": "text/plain"}
    for path in ("predictions/cls", "predictions/cls/1.0", "invocations?model_name=cls"):
        answer = requests.post(f"{base}/{path}", data=SENTENCE, headers=headers, timeout=60)
        assert answer.status_code == 200, (path, answer.text)
        assert right(answer.json(), SENTENCE, expected), path
        answer = requests.post(f"{base}/{path}", json={"text": SENTENCE, "top_k": 2}, timeout=60)
        assert len(answer.json()) == 2, path


@pytest.mark.parametrize(
    "part",
    [
        (None, SENTENCE),
        ("review.txt", SENTENCE),
        ("review.json", json.dumps({"text": SENTENCE}), "application/json"),
    ],
)
def test_multipart(running: Any, expected: Expected, part: tuple[Any, ...]) -> None:
    url = f"{running.server.inference}/predictions/cls"
    answer = requests.post(url, files={"data": part}, timeout=60)
    assert answer.status_code == 200, answer.text
    assert right(answer.json(), SENTENCE, expected)


def test_parameters_and_pairs(running: Any, expected: Expected) -> None:
    answer = running.predict_json("cls", {"text": SENTENCE, "top_k": 3}).json()
    assert {a["label"]: pytest.approx(a["score"], abs=1e-4) for a in answer} == expected(SENTENCE)
    assert [a["score"] for a in answer] == sorted((a["score"] for a in answer), reverse=True)
    alone = running.predict_json("cls", {"text": SENTENCE}).json()
    pair = running.predict_json("cls", {"text": SENTENCE, "text_pair": "a sad story"}).json()
    assert pair != alone


def test_list_comes_back_as_a_list_in_order(running: Any, expected: Expected) -> None:
    texts = [sentence(n) for n in range(9)]
    answers = running.predict_json("cls", texts).json()
    assert len(answers) == len(texts)
    assert all(right(a, t, expected) for a, t in zip(answers, texts, strict=True))


def test_kserve_v1_and_open_inference_v2(running: Any, expected: Expected) -> None:
    base = running.server.inference
    one = requests.post(
        f"{base}/v1/models/cls:predict", json={"instances": [SENTENCE]}, timeout=60
    ).json()
    assert right(one["predictions"][0], SENTENCE, expected)
    body = {
        "id": "a7",
        "inputs": [
            {"name": "text", "shape": [2], "datatype": "BYTES", "data": [SENTENCE, "a bad plot"]}
        ],
    }
    two = requests.post(f"{base}/v2/models/cls/infer", json=body, timeout=60).json()
    assert two["id"] == "a7"
    assert two["model_name"] == "cls"
    outputs = {o["name"]: o for o in two["outputs"]}
    assert outputs["label"]["shape"] == [2]
    assert right(
        {"label": outputs["label"]["data"][0], "score": outputs["score"]["data"][0]},
        SENTENCE,
        expected,
    )


def test_question_answering(running: Any) -> None:
    answer = running.predict_json("qa", QUESTION).json()
    assert set(answer) == {"score", "start", "end", "answer"}
    assert answer["answer"] == CONTEXT[answer["start"] : answer["end"]]
    several = running.predict_json("qa", {**QUESTION, "top_k": 3}).json()
    assert several[0] == answer
    assert len(several) == 3
    # Longer than the tiny model's 128 positions: windows, and offsets into the whole text.
    long = " ".join([CONTEXT] * 40)
    found = running.predict_json("qa", {**QUESTION, "context": long}).json()
    assert found["answer"] == long[found["start"] : found["end"]]


def test_grpc(running: Any, expected: Expected, tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
    try:
        from grpc_client import Client
    finally:
        sys.path.pop(0)
    port = int(running.server.properties["grpc_inference_port"])
    with Client(f"127.0.0.1:{port}") as client:
        assert right(json.loads(client.predict("cls", SENTENCE.encode())), SENTENCE, expected)
        answer = json.loads(client.predict("qa", json.dumps(QUESTION).encode()))
        assert answer == running.predict_json("qa", QUESTION).json()
        # TorchServe loses the status over gRPC: the call succeeds, the body is the error.
        refused = json.loads(client.predict("cls", b"\xff\xfe"))
        assert (refused["code"], refused["type"]) == (400, "MalformedRequest")


def test_grpc_streams_end_and_harm_nobody(running: Any, expected: Expected) -> None:
    """StreamPredictions among other calls: one answer a call, refused ones too, no worker dies."""
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
    try:
        from grpc_client import Client
    finally:
        sys.path.pop(0)
    before = running.pids("cls")
    port = int(running.server.properties["grpc_inference_port"])
    with Client(f"127.0.0.1:{port}") as client:

        def stream(number: int) -> None:
            answers = client.stream("cls", sentence(number).encode())
            assert [right(json.loads(a), sentence(number), expected) for a in answers] == [True]

        def refused(_: int) -> None:
            (answer,) = client.stream("cls", b"\xff\xfe")
            assert json.loads(answer)["code"] == 400

        def unary(number: int) -> None:
            answer = client.predict("cls", sentence(number).encode())
            assert right(json.loads(answer), sentence(number), expected)

        def http(number: int) -> None:
            answer = running.predict("cls", sentence(number))
            assert "ts_stream_next" not in answer.headers
            assert right(answer.json(), sentence(number), expected)

        with ThreadPoolExecutor(8) as pool:
            calls = [
                pool.submit(call, number)
                for number in range(12)
                for call in (stream, refused, unary, http)
            ]
        for call in calls:
            call.result()
    assert running.pids("cls") == before


def test_http_without_a_header_is_no_grpc(running: Any) -> None:
    """A client that sends no header at all gets its answer: nothing waits for a stream."""
    address = urllib.parse.urlsplit(running.server.inference)
    with socket.create_connection((address.hostname, address.port), timeout=30) as plain:
        plain.sendall(b"GET /predictions/cls HTTP/1.0\r\n\r\n")
        assert b"400" in plain.recv(1 << 16).split(b"\r\n")[0]


def test_undecodable_bodies_are_a_metric_and_hardly_a_line(running: Any) -> None:
    count = 300

    def counted() -> float:
        text = requests.get(f"{running.server.metrics}/metrics", timeout=60).text
        lines = re.findall(r'^ft_undecodable_total\{.*"cls".* ([\d.]+)$', text, re.M)
        return sum(map(float, lines))

    before = counted()
    with ThreadPoolExecutor(8) as pool:
        bodies = [(b'{"text": ', "application/json"), (b"\xff", "text/plain")] * (count // 2)
        codes = list(pool.map(lambda b: running.predict("cls", *b).status_code, bodies))
    assert codes == [400] * count
    deadline = time.monotonic() + 10
    while counted() != before + count and time.monotonic() < deadline:
        time.sleep(0.2)
    assert counted() == before + count
    said = [x for x in running.output.getvalue().splitlines() if "Content-Type says" in x]
    # Earlier tests of this server may have said so a minute or more ago.
    assert 1 <= len(said) <= 10


def test_bad_requests_in_good_traffic(running: Any, expected: Expected) -> None:
    """Every bad request gets its own 4xx, every good one its right answer, nothing restarts."""
    models = {"sequence_classification": "cls", "question_answering": "qa"}
    jobs: list[tuple[str, Any]] = [("cls", sentence(n)) for n in range(200)]
    for mode, model in models.items():
        jobs += [(model, case) for case in random.Random(1).sample(CASES[mode], 120)]
    random.Random(2).shuffle(jobs)
    before = running.pids("cls"), running.pids("qa")
    wrong: list[str] = []

    def send(job: tuple[str, Any]) -> None:
        model, case = job
        if isinstance(case, str):
            answer = running.predict(model, case)
            if answer.status_code != 200 or not right(answer.json(), case, expected):
                wrong.append(f"good request: {answer.status_code} {answer.text[:200]}")
            return
        answer = running.predict(model, case.body, case.content_type)
        body = answer.json() if answer.text else {}
        ok = answer.status_code == case.status == body.get("code")
        if not (ok and {"code", "type", "message"} <= set(body)):
            wrong.append(f"{case.name}: {answer.status_code}, wanted {case.status}: {answer.text}")

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(send, jobs))
    assert not wrong, "\n".join(wrong)
    assert (running.pids("cls"), running.pids("qa")) == before


def test_odd_requests_harm_no_neighbour(running: Any, expected: Expected) -> None:
    """Requests of every kind between tagged good ones: no 5xx, right answers, the same workers."""
    before = running.pids("cls"), running.pids("qa")
    good = {text: expected(text) for text in map(sentence, range(8))}
    counts: dict[int, int] = {}

    def send(job: tuple[str, Odd | str]) -> str | None:
        model, odd = job
        if isinstance(odd, str):
            answer = running.predict(model, odd)
            if answer.status_code != 200 or not right(answer.json(), odd, good.__getitem__):
                return f"good request: {answer.status_code} {answer.text[:200]}"
            return None
        url = f"{running.server.inference}/predictions/{model}"
        answer = running.session.post(url, data=odd.body, headers=odd.headers, timeout=60)
        counts[answer.status_code] = counts.get(answer.status_code, 0) + 1
        return f"{odd}: {answer.status_code}" if answer.status_code >= 500 else None

    batch = st.lists(
        st.tuples(st.just("cls"), odd_requests("sequence_classification"))
        | st.tuples(st.just("qa"), odd_requests("question_answering")),
        min_size=8, max_size=24,
    )  # fmt: skip

    with ThreadPoolExecutor(10) as pool:

        @settings(max_examples=ODD_BATCHES, deadline=None, suppress_health_check=list(HealthCheck))
        @given(batch)
        def mixed(odd: list[tuple[str, Odd | str]]) -> None:
            jobs = [*odd, *(("cls", text) for text in good)]
            random.Random(len(odd)).shuffle(jobs)
            assert [fault for fault in pool.map(send, jobs) if fault] == []

        mixed()
    assert {200, 400, 415, 422} <= set(counts)
    assert (running.pids("cls"), running.pids("qa")) == before


def test_client_text_stays_out_of_the_log(running: Any) -> None:
    secret = "zanzibar pelican 48151623"
    running.predict("cls", secret)
    running.predict_json("cls", {"text": secret, "top_k": -1})
    running.predict_json("qa", {"question": secret})
    time.sleep(0.5)
    assert "zanzibar" not in running.output.getvalue()


def test_no_answer_is_swapped_between_clients(running: Any, expected: Expected) -> None:
    """Many clients at once, each with texts of its own; list requests among them."""
    wrong: list[str] = []

    def client(number: int) -> None:
        for i in range(12):
            texts = [sentence(1000 * number + 10 * i + k) for k in range(1 + i % 4)]
            if len(texts) == 1:
                answers = [running.predict("cls", texts[0]).json()]
            else:
                answers = running.predict_json("cls", texts).json()
            if not all(right(a, t, expected) for a, t in zip(answers, texts, strict=True)):
                wrong.append(f"client {number}, request {i}: {answers}")

    threads = [threading.Thread(target=client, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]


def test_metrics_are_exposed(running: Any) -> None:
    running.predict("cls", SENTENCE)
    text = requests.get(f"{running.server.metrics}/metrics", timeout=60).text
    series = {line.partition("{")[0] for line in text.splitlines() if 'ModelName="cls"' in line}
    assert {m.name + "_count" * (m.kind == "histogram") for m in METRICS} <= series


def test_describe_scale_unregister(running: Any) -> None:
    answer = running.manage(
        "POST", "/models", url="cls.mar", model_name="spare", initial_workers=1, synchronous="true"
    )
    assert answer.status_code == 200, answer.text
    described = running.describe("spare")
    assert described["modelUrl"] == "cls.mar"
    assert described["batchSize"] > 1
    running.manage("PUT", "/models/spare", min_worker=2, max_worker=2, synchronous="true")
    assert len(running.wait_for_pids("spare", 2)) == 2
    assert running.predict("spare", SENTENCE).status_code == 200
    running.manage("PUT", "/models/spare", min_worker=1, max_worker=1, synchronous="true")
    running.wait_for_pids("spare", 1)
    assert running.manage("DELETE", "/models/spare").status_code == 200
    assert running.predict("spare", SENTENCE).status_code == 404
    names = [m["modelName"] for m in running.manage("GET", "/models").json()["models"]]
    assert "cls" in names
    assert "spare" not in names


def test_nothing_outside_the_store_can_be_registered(running: Any, store: Path) -> None:
    for url in ("http://127.0.0.1:9/x.mar", (store / "cls.mar").as_uri(), "../cls.mar"):
        answer = running.manage("POST", "/models", url=url, model_name="outside")
        assert 400 <= answer.status_code < 500, (url, answer.text)


def test_killed_worker_comes_back(running: Any, expected: Expected) -> None:
    """Under load: answers are right or 5xx, never wrong, and a new worker takes over."""
    before = running.wait_for_pids("cls", 1)
    stop = threading.Event()
    good, failed, wrong = [], [], []

    def client(number: int) -> None:
        i = 0
        while not stop.is_set():
            i += 1
            text = sentence(50_000 + 1000 * number + i)
            answer = running.predict("cls", text)
            if answer.status_code != 200:
                failed.append(answer.status_code)
            elif right(answer.json(), text, expected):
                good.append(time.monotonic())
            else:
                wrong.append(answer.text)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    os.kill(before[0], signal.SIGKILL)
    killed = time.monotonic()
    deadline = killed + 60
    while not any(t > killed + 1 for t in good) and time.monotonic() < deadline:
        time.sleep(0.2)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]
    assert all(status >= 500 for status in failed)
    after = running.wait_for_pids("cls", 1)
    assert after != before
    assert any(t > killed + 1 for t in good)


def test_stock_archiver(
    running: Any,
    traced: Mapping[str, Path],
    pack_with_stock_archiver: Callable[..., None],
    expected: Expected,
) -> None:
    """`torch-model-archiver --handler "$(ft-handler handler-path)"`, the library in the archive."""
    from ft_handler import load_library

    folder = traced["sequence_classification"]
    names = ("tokenizer.json", "index_to_name.json")
    files = [folder / name for name in names] + [load_library()]
    pack_with_stock_archiver("stock", folder, files, folder / "model-config.yaml")
    answer = running.manage(
        "POST", "/models", url="stock.mar", initial_workers=1, synchronous="true"
    )
    assert answer.status_code == 200, answer.text
    assert right(running.predict("stock", SENTENCE).json(), SENTENCE, expected)
    assert running.manage("DELETE", "/models/stock").status_code == 200


def test_setup_config_json(
    running: Any,
    traced: Mapping[str, Path],
    store: Path,
    pack_with_stock_archiver: Callable[..., None],
    expected: Expected,
    tmp_path: Path,
) -> None:
    """The older settings file, with batch size and workers given when registering."""
    folder = traced["sequence_classification"]
    settings = {
        "model_name": "bert-base-uncased",
        "mode": "sequence_classification",
        "do_lower_case": True,
        "num_labels": "3",
        "save_mode": "torchscript",
        "max_length": "100",
        "captum_explanation": False,
        "embedding_name": "bert",
        "FasterTransformer": True,
    }
    older = tmp_path / "setup_config.json"
    older.write_text(json.dumps(settings))
    files = [older, folder / "vocab.txt", folder / "index_to_name.json"]
    pack_with_stock_archiver("older", folder, files, None)
    with zipfile.ZipFile(store / "older.mar") as packed:
        assert "model-config.yaml" not in packed.namelist()
    answer = running.manage(
        "POST", "/models", url="older.mar", initial_workers=1, batch_size=8, max_batch_delay=5,
        synchronous="true",
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    assert running.describe("older")["batchSize"] == 8
    assert right(running.predict("older", SENTENCE).json(), SENTENCE, expected)
    assert running.manage("DELETE", "/models/older").status_code == 200


def test_explanations_through_the_server(
    running: Any, traced: Mapping[str, Path], store: Path, tmp_path: Path
) -> None:
    """Switched on in the older settings file, as TorchServe's example has it."""
    folder = shutil.copytree(traced["sequence_classification"], tmp_path / "explained")
    settings = {"captum_explanation": True, "embedding_name": "bert"}
    (folder / "setup_config.json").write_text(json.dumps(settings))
    archive(folder, model_name="explained", export_path=store)
    answer = running.manage(
        "POST", "/models", url="explained.mar", initial_workers=1, synchronous="true"
    )
    assert answer.status_code == 200, answer.text

    def explain(path: str, document: Any) -> requests.Response:
        return requests.post(f"{running.server.inference}{path}", json=document, timeout=60)

    wanted: Any = Predictor.load(folder).explain({"text": SENTENCE, "target": 1})
    one = explain("/explanations/explained", {"text": SENTENCE, "target": 1})
    assert one.status_code == 200, one.text
    body = [{"data": SENTENCE, "target": 1}, {"text": SENTENCE, "target": "neutral"}]
    v1 = explain("/v1/models/explained:explain", {"instances": body})
    for found in (one.json(), *v1.json()["explanations"]):
        assert found.keys() == wanted.keys()
        assert (found["words"], found["label"]) == (SENTENCE.split(), "neutral")
        # What shares a batch moves the last bits.
        assert found["importances"] == pytest.approx(wanted["importances"], abs=1e-5)
        assert found["delta"] == pytest.approx(wanted["delta"], abs=1e-5)
    refused = explain("/explanations/explained", {"text": SENTENCE, "target": 7})
    assert (refused.status_code, refused.json()["type"]) == (422, "UnusableRequest")
    assert running.predict("explained", SENTENCE).status_code == 200
    # Another model of the same server, where nobody switched it on.
    assert explain("/explanations/cls", {"text": SENTENCE}).status_code == 501
    assert running.manage("DELETE", "/models/explained").status_code == 200


def test_every_metric_is_declared() -> None:
    from ft_handler.servers.torchserve.properties import METRICS_CONFIG

    declared = yaml.safe_load(METRICS_CONFIG.read_text())["model_metrics"]
    by_kind = {kind: {m["name"]: m for m in listed} for kind, listed in declared.items()}
    for metric in METRICS:
        found = by_kind[metric.kind][metric.name]
        own = [metric.label] if metric.label else []
        assert (found["unit"], found["dimensions"]) == (metric.unit, [*own, "ModelName", "Level"])
