"""A real Ray Serve beside a real TorchServe: the same answers, and a replica that is killed."""

from __future__ import annotations

import gzip
import json
import math
import random
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
from malformed import CASES
from ray_cluster import Cluster, ray_python

ROOT = Path(__file__).resolve().parents[2]
JSON, PLAIN = "application/json", "text/plain"
WORDS = ("the", "old", "bridge", "was", "built", "by", "an", "engineer", "film", "caf\u00e9")
#: One model alone, which speaks HTTP itself, and two behind a front.
ALONE, SEVERAL = "", "/several"


class Sent(NamedTuple):
    """A request, without the host."""

    path: str
    body: bytes
    headers: Mapping[str, str] = {}


@pytest.fixture(scope="module")
def cluster(traced: Mapping[str, Path]) -> Iterator[Cluster]:
    cls, qa = (str(traced[m]) for m in ("sequence_classification", "question_answering"))
    application = {"import_path": "ft_handler.servers.ray:app"}
    half = {"num_cpus": 0.5, "health_check_period_s": 1}
    applications = [
        {**application, "name": "alone", "route_prefix": "/",
         "args": {"model": cls, "name": "cls", "replicas": 2, **half}},
        {**application, "name": "several", "route_prefix": SEVERAL,
         "args": {"models": f"cls={cls},qa={qa}", **half,
                  "settings": {"captum_explanation": True}}},
    ]  # fmt: skip
    with Cluster(applications) as cluster:
        for prefix in (ALONE, SEVERAL):
            cluster.wait_ready(prefix)
        cluster.wait(lambda: len(cluster.replicas("alone:cls")) == 2)
        yield cluster


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 40)))


def traffic(models: tuple[str, ...]) -> list[Sent]:
    """Good and bad requests of every kind, of the models that there are."""
    rng = random.Random(5)
    asked = []
    for _ in range(20):
        text = sentence(rng)
        tensor = {"name": "text", "shape": [1], "datatype": "BYTES"}
        raw = struct.pack("<I", len(text.encode())) + text.encode()
        sized = {**tensor, "parameters": {"binary_data_size": len(raw)}}
        head = json.dumps({"id": "1", "inputs": [sized]}).encode()
        asked += [
            Sent("/predictions/cls", text.encode(), {"Content-Type": PLAIN}),
            Sent("/predictions/cls/1.0", json.dumps({"text": text, "top_k": 2}).encode(),
                 {"Content-Type": JSON}),
            Sent("/v1/models/cls:predict", json.dumps({"instances": [text, "film"]}).encode(),
                 {"Content-Type": JSON}),
            Sent("/v2/models/cls/infer",
                 json.dumps({"inputs": [{**tensor, "data": [text]}]}).encode(),
                 {"Content-Type": JSON}),
            Sent("/v2/models/cls/infer", head + raw,
                 {"Inference-Header-Content-Length": str(len(head))}),
        ]  # fmt: skip
        if "qa" in models:
            question = {"question": "who built it", "context": text, "top_k": rng.choice([1, 3])}
            asked.append(Sent("/predictions/qa", json.dumps(question).encode(),
                              {"Content-Type": JSON}))  # fmt: skip
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    boundary = {"Content-Type": "multipart/form-data; boundary=B"}
    file = (
        b'--B\r\nContent-Disposition: form-data; name="data"; filename="a"\r\n\r\n%s\r\n--B--\r\n'
    )
    asked += [
        Sent("/predictions/cls", b"text=the+film+was+gr%C3%A9at&top_k=2", form),
        Sent("/predictions/cls", b"text=a+film", form),
        Sent("/predictions/cls", b"the film was great", form),
        Sent("/predictions/cls", file % b"the film was great", boundary),
        Sent("/predictions/cls", file % b'["the film", "a plot"]', boundary),
        Sent("/predictions/cls", "le caf\u00e9".encode("latin-1"),
             {"Content-Type": "text/plain; charset=iso-8859-1"}),
        Sent("/predictions/cls", gzip.compress(b"a film"),
             {"Content-Type": PLAIN, "Content-Encoding": "gzip"}),
        Sent("/predictions/cls", b'"{\\"text\\": \\"a film\\"}"', {"Content-Type": JSON}),
        Sent("/invocations?model_name=cls&top_k=2", b"the film", {"Content-Type": PLAIN}),
    ]  # fmt: skip
    modes = {"cls": "sequence_classification", "qa": "question_answering"}
    for model in models:
        for case in rng.sample(CASES[modes[model]], 50):
            kind = {} if case.content_type is None else {"Content-Type": case.content_type}
            asked.append(Sent(f"/predictions/{model}", case.body, kind))
    rng.shuffle(asked)
    return asked


def agree(one: Any, other: Any) -> bool:
    """Whether two documents are the same, but for the last bits of what a batch computed."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-5)
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(agree(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(agree, one, other))
    return bool(one == other)


def post(session: requests.Session, base: str, sent: Sent) -> tuple[int, Any]:
    answer = session.post(base + sent.path, data=sent.body, headers=dict(sent.headers), timeout=60)
    return answer.status_code, answer.json()


@pytest.mark.parametrize(("prefix", "models"), [(ALONE, ("cls",)), (SEVERAL, ("cls", "qa"))])
def test_answers_are_torchserves(
    cluster: Cluster, running: Any, prefix: str, models: tuple[str, ...]
) -> None:
    """Mixed good and bad traffic: the statuses and bodies of a real TorchServe."""
    asked = traffic(models)
    session = requests.Session()
    session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=16))

    def both(sent: Sent) -> tuple[Sent, Any, Any]:
        ours = post(session, cluster.url + prefix, sent)
        return sent, ours, post(session, running.server.inference, sent)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(both, asked))
    assert [a for a in answers if not agree(a[1], a[2])] == []
    assert {200, 400, 415, 422} <= {ours[0] for _, ours, _ in answers}


def test_explanations_and_refusals_of_their_own(cluster: Cluster) -> None:
    def answer(path: str, body: bytes = b"the film was great") -> tuple[int, Any]:
        return post(requests.Session(), cluster.url, Sent(path, body, {"Content-Type": PLAIN}))

    status, explained = answer(SEVERAL + "/explanations/cls")
    assert (status, explained["words"]) == (200, ["the", "film", "was", "great"])
    assert answer("/explanations/cls")[0] == 501
    assert answer("/predictions/absent")[1]["type"] == "ModelNotFoundException"
    assert answer("/predictions/cls", b"a" * 6_553_501)[0] == 413


@pytest.mark.parametrize("prefix", [ALONE, SEVERAL])
def test_health_and_metadata(cluster: Cluster, prefix: str) -> None:
    def told(path: str) -> Any:
        answer = requests.get(cluster.url + prefix + path, timeout=30)
        assert answer.status_code == 200, path
        return answer.json()

    assert told("/v2")["name"] == "ft_handler"
    assert told("/v2/health/live") == {"live": True}
    assert told("/v2/models/cls/ready") == {"name": "cls", "ready": True}
    assert told("/v1/models/cls") == {"name": "cls", "ready": True}
    described = told("/v2/models/cls")
    assert described["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
    assert [o["name"] for o in described["outputs"]] == ["label", "score"]


def test_a_killed_replica_loses_what_it_held_alone(cluster: Cluster, running: Any) -> None:
    """Under traffic: requests lost were under way then, no answer is wrong, a new one comes."""
    rng = random.Random(6)
    texts = [sentence(rng) for _ in range(40)]
    asked = [Sent("/predictions/cls", t.encode(), {"Content-Type": PLAIN}) for t in texts]
    session = requests.Session()
    expected = [post(session, running.server.inference, sent) for sent in asked]
    before = cluster.replicas("alone:cls")
    assert len(before) == 2
    stop = threading.Event()
    spans: list[tuple[float, float, int]] = []
    wrong: list[Any] = []

    def client(number: int) -> None:
        own = requests.Session()
        at = number
        while not stop.is_set():
            start = time.monotonic()
            answer = own.post(cluster.url + asked[at].path, data=asked[at].body,
                              headers=dict(asked[at].headers), timeout=60)  # fmt: skip
            spans.append((start, time.monotonic(), answer.status_code))
            if answer.status_code == 200 and not agree((200, answer.json()), expected[at]):
                wrong.append((texts[at], answer.text))
            at = (at + 8) % len(asked)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    try:
        cluster.wait(lambda: len(spans) > 100)
        killed = time.monotonic()
        next(iter(before.values())).kill()
        cluster.wait(lambda: sum(start > killed for start, _, _ in list(spans)) > 200)
        cluster.wait(lambda: len({*cluster.replicas("alone:cls")} | {*before}) == 3)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    lost = [(start, end) for start, end, status in spans if status != 200]
    assert len(lost) <= 8
    assert all(start <= killed + 0.1 and end >= killed for start, end in lost)
    cluster.wait_ready(ALONE)
    assert agree([post(session, cluster.url, sent) for sent in asked], expected)


def test_the_parts_hold_where_ray_is_installed() -> None:
    """tests/servers/test_ray_parts.py imports Ray, which this environment has not."""
    done = subprocess.run(
        [ray_python(), "-m", "pytest", "-q", "-p", "no:cacheprovider",
         "tests/servers/test_ray_parts.py"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout
