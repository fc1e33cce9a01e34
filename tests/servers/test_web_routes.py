"""The HTTP app of servers that have none: every route, body and error, without any server."""

from __future__ import annotations

import asyncio
import json
import re
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
from fakes import FakeEngine, pipeline_of
from malformed import CASES, as_request
from tokenizers import Tokenizer

pytest.importorskip("starlette", reason="starlette is not installed")
pytest.importorskip("python_multipart", reason="python-multipart is not installed")

from ft_handler import __version__
from ft_handler.errors import Overloaded
from ft_handler.request.pipeline import Pipeline
from ft_handler.servers.inputs import not_explained
from ft_handler.servers.web import app
from ft_handler.types import Incoming, Reply, Trace

JSON, PLAIN = "application/json", "text/plain"
URLENCODED = "application/x-www-form-urlencoded"
FORM = "multipart/form-data; boundary=B"


class Answer(NamedTuple):
    """What came back over ASGI."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class OneModel:
    """A model in this process, as the app asks for one."""

    version = "1.0"

    def __init__(self, pipeline: Pipeline[Any, Any, Any]) -> None:
        self.pipeline = pipeline
        self.asked: list[Incoming] = []
        self.is_ready = True
        self.fails: Exception | None = None

    async def answer(self, incoming: Incoming, explain: bool, trace: Trace | None) -> Reply:
        self.asked.append(incoming)
        if self.fails:
            raise self.fails
        request = not_explained() if explain else incoming
        ((reply,), _) = self.pipeline.run([request], traces=[trace])
        return reply

    async def ready(self) -> bool:
        if self.fails:
            raise self.fails
        return self.is_ready

    async def signature(self) -> Mapping[str, Any]:
        return {"inputs": [{"name": "text"}], "outputs": []}


class Web:
    """The app over a model `cls`, asked as an HTTP server would ask it."""

    def __init__(self, pipeline: Pipeline[Any, Any, Any], **more: Any) -> None:
        self.model = OneModel(pipeline)
        self.app = app({"cls": self.model}, **more)

    def ask(
        self,
        method: str,
        target: str,
        body: bytes | list[bytes] = b"",
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
        gone: bool = False,
    ) -> Answer:
        """One request; a list is a body that comes in pieces, without a length."""
        path, _, query = target.partition("?")
        pieces = body if isinstance(body, list) else [body]
        named = dict(headers or {})
        if kind is not None:
            named["Content-Type"] = kind
        if not isinstance(body, list):
            named["Content-Length"] = str(len(body))
        scope = {
            "type": "http", "method": method, "path": path, "raw_path": path.encode(),
            "query_string": query.encode(), "root_path": "", "http_version": "1.1",
            "scheme": "http", "server": ("test", 80), "client": ("test", 1),
            "headers": [(k.lower().encode(), v.encode()) for k, v in named.items()],
        }  # fmt: skip
        coming = [
            {"type": "http.request", "body": piece, "more_body": at < len(pieces) - 1 or gone}
            for at, piece in enumerate(pieces)
        ]
        self.left = coming
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return coming.pop(0) if coming else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        asyncio.run(self.app(scope, receive, send))
        start = sent[0]
        return Answer(
            start["status"],
            {name.decode(): value.decode() for name, value in start["headers"]},
            b"".join(message.get("body", b"") for message in sent[1:]),
        )

    def post(self, target: str, body: bytes | list[bytes], *more: Any, **others: Any) -> Answer:
        return self.ask("POST", target, body, *more, **others)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Any) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_tokenizer / "tokenizer.json"))


@pytest.fixture
def web(tokenizer: Tokenizer) -> Web:
    return Web(pipeline_of(tokenizer, FakeEngine()))


def own(web: Web, value: object, **fields: object) -> Any:
    """The pipeline's own answer to what a request should have become."""
    ((reply,), _) = web.model.pipeline.run([Incoming(value, fields)])
    assert reply.status == 200, reply.body
    return json.loads(reply.body)


@pytest.mark.parametrize(
    "path", ["/predictions/cls", "/predictions/cls/1.0", "/v1/models/cls:predict", "/invocations",
             "/invocations?model_name=cls", "/invocations?model_name=cls&model_version=1.0"]
)  # fmt: skip
def test_every_path_of_predictions_answers(web: Web, path: str) -> None:
    expected = own(web, "the film was great")
    for method in ("POST", "PUT"):  # `curl -T` puts
        answer = web.ask(method, path, b"the film was great", PLAIN)
        assert (answer.status, answer.json) == (200, expected)
    assert answer.headers["content-type"] == JSON
    assert re.fullmatch(r"queue;dur=.*, tokenize;dur=.*", answer.headers["server-timing"])
    assert answer.headers["x-request-id"]


def test_a_request_is_followed_by_what_its_headers_say(web: Web) -> None:
    parent = f"00-{'a' * 32}-{'b' * 16}-01"
    headers = {"X-Request-ID": "mine", "traceparent": parent}
    answer = web.ask("POST", "/predictions/cls", b"a text", "text/plain", headers)
    assert answer.headers["x-request-id"] == "mine"
    assert answer.headers["traceparent"] == parent
    assert answer.headers["content-length"] == str(len(answer.body))


def test_the_query_of_invocations_holds_fields_and_that_of_predictions_none(web: Web) -> None:
    answer = web.post("/invocations?model_name=cls&top_k=2", b"the film", PLAIN)
    assert answer.json == own(web, "the film", top_k=2)
    answer = web.post("/predictions/cls?top_k=2", b"the film", PLAIN)
    assert answer.json == own(web, "the film")


@pytest.mark.parametrize("path", ["/v2/models/cls/infer", "/v2/models/cls/versions/1.0/infer"])
def test_tensors_in_json_and_in_binary(web: Web, path: str) -> None:
    tensor = {"name": "text", "shape": [2], "datatype": "BYTES"}
    asked = {"id": "7", "inputs": [{**tensor, "data": ["the film", "a bad plot"]}]}
    answer = web.post(path, json.dumps(asked).encode(), JSON)
    assert answer.status == 200
    assert (answer.json["id"], answer.json["outputs"][0]["shape"]) == ("7", [2])
    texts = b"".join(struct.pack("<I", len(t)) + t for t in (b"the film", b"a bad plot"))
    tensor["parameters"] = {"binary_data_size": len(texts)}
    head = json.dumps({"id": "7", "inputs": [tensor]}).encode()
    sized = {"Inference-Header-Content-Length": str(len(head))}
    binary = web.post(path, head + texts, "application/octet-stream", headers=sized)
    assert binary.json == answer.json
    sized = {"Inference-Header-Content-Length": str(len(head + texts) + 1)}
    assert web.post(path, head + texts, None, headers=sized).status == 400


def part(name: str, value: bytes, file: bool = False, kind: str | None = None) -> bytes:
    """A part of a form whose boundary is B."""
    disposition = f'form-data; name="{name}"' + '; filename="a"' * file
    head = f"--B\r\nContent-Disposition: {disposition}\r\n"
    head += f"Content-Type: {kind}\r\n" if kind else ""
    return head.encode() + b"\r\n" + value + b"\r\n"


END = b"--B--\r\n"


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"text=the+film+was+gr%C3%A9at&top_k=2", URLENCODED),
        ("text=the film was gréat&top_k=2".encode(), URLENCODED + "; charset=utf-8"),
        (b"nothing&top_k=2&text=the%20film%20was%20gr%c3%a9at", URLENCODED),
        (part("text", "the film was gréat".encode()) + part("top_k", b"2") + END, FORM),
        (part("data", "the film was gréat".encode(), True) + part("top_k", b"2") + END, FORM),
        (part("data", "the film was gréat".encode()) + part("top_k", b"2") + END, FORM),
        (part("data", '{"text": "the film was gréat"}'.encode(), True, JSON)
         + part("top_k", b"2") + END, FORM),
        (part("body", '{"text": "the film was gréat", "top_k": 2}'.encode(), True, PLAIN) + END,
         FORM),
    ],
)  # fmt: skip
def test_forms_are_read(web: Web, body: bytes, kind: str) -> None:
    answer = web.post("/predictions/cls", body, kind)
    assert answer.json == own(web, {"text": "the film was gréat", "top_k": 2})


@pytest.mark.parametrize(
    ("body", "kind", "status", "said"),
    [
        (b"plain text", URLENCODED, 400, "no field"),
        (b"", URLENCODED, 400, "no field"),
        (b"text=%ff", URLENCODED, 400, "UTF-8"),
        (b"%ff=a", URLENCODED, 400, "UTF-8"),
        (b"body=a&data=b", URLENCODED, 400, "not both"),
        (b"a=b&" * 1001, URLENCODED, 413, "fields"),
        (b"nonsense", FORM, 400, "multipart"),
        (part("text", b"a") + END, "multipart/form-data", 400, "multipart"),
        (part("text", b"a")[:30], FORM, 400, "no field"),
        (part("text", b"\xff") + END, FORM, 400, "UTF-8"),
        (b"".join(part(f"n{n}", b"") for n in range(1001)) + END, FORM, 413, "fields"),
        (part("data", b"{", True, JSON) + END, FORM, 400, "JSON"),
        (b"\x1f\x8b", PLAIN, 400, "UTF-8"),
    ],
)
def test_bad_forms_are_refused(web: Web, body: bytes, kind: str, status: int, said: str) -> None:
    answer = web.post("/predictions/cls", body, kind)
    assert (answer.status, answer.json["code"]) == (status, status)
    assert said in answer.json["message"]


def test_what_headers_say_of_a_body(web: Web) -> None:
    answer = web.post("/predictions/cls", "le café".encode("latin-1"), "text/plain; charset=latin1")
    assert answer.json == own(web, "le café")
    packed = web.post("/predictions/cls", b"x", PLAIN, headers={"Content-Encoding": "gzip"})
    assert (packed.status, packed.json["type"]) == (415, "UnsupportedMedia")
    assert web.post("/predictions/cls", b"{", JSON).status == 400


@pytest.mark.parametrize("mode", CASES)
def test_refusals_are_those_of_torchserve(tokenizer: Tokenizer, mode: str) -> None:
    """Every case of the corpus: status and body as through TorchServe's adapter."""
    web = Web(pipeline_of(tokenizer, FakeEngine(mode), mode))
    for case in CASES[mode]:
        answer = web.post("/predictions/cls", case.body, case.content_type)
        ((reply,), _) = web.model.pipeline.run([as_request(case.content_type, case.body)])
        assert (answer.status, answer.body) == (reply.status, reply.body), case.name
        assert answer.status == case.status, case.name


def test_explanations_have_their_own_paths(web: Web) -> None:
    paths = ("/explanations/cls", "/explanations/cls/1.0", "/v1/models/cls:explain")
    for path in paths:
        answer = web.post(path, b"the film", PLAIN)
        assert (answer.status, answer.json["type"]) == (501, "NotOffered"), path


def test_what_is_too_large_is_refused_before_it_is_read(tokenizer: Tokenizer) -> None:
    web = Web(pipeline_of(tokenizer, FakeEngine()), max_request_size=20)
    assert web.post("/predictions/cls", b"the film was great ", PLAIN).status == 200
    answer = web.post("/predictions/cls", b"a" * 21, PLAIN)
    assert (answer.status, answer.json["type"]) == (413, "RequestTooLarge")
    assert len(web.left) == 1
    # A length that is not told is counted as it comes.
    answer = web.post("/predictions/cls", [b"a" * 15, b"a" * 15, b"a" * 15], PLAIN)
    assert (answer.status, len(web.left)) == (413, 1)
    assert len(web.model.asked) == 1


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("POST", "/predictions/absent", 404, "ModelNotFoundException"),
        ("POST", "/predictions/cls/2.0", 404, "ModelVersionNotFoundException"),
        ("POST", "/invocations?model_name=absent", 404, "ModelNotFoundException"),
        ("POST", "/invocations?model_name=cls&model_version=3", 404,
         "ModelVersionNotFoundException"),
        ("POST", "/v1/models/absent:predict", 404, "ModelNotFoundException"),
        ("POST", "/v2/models/absent/infer", 404, "ModelNotFoundException"),
        ("GET", "/v1/models/absent", 404, "ModelNotFoundException"),
        ("GET", "/v2/models/absent", 404, "ModelNotFoundException"),
        ("GET", "/v2/models/cls/versions/2/ready", 404, "ModelVersionNotFoundException"),
        ("POST", "/predictions", 404, "ResourceNotFoundException"),
        ("GET", "/", 404, "ResourceNotFoundException"),
        ("GET", "/predictions/cls", 405, "MethodNotAllowedException"),
        ("POST", "/ping", 405, "MethodNotAllowedException"),
    ],
)  # fmt: skip
def test_what_is_not_there(web: Web, method: str, path: str, status: int, kind: str) -> None:
    answer = web.ask(method, path, b"the film", PLAIN)
    assert (answer.status, answer.json["code"], answer.json["type"]) == (status, status, kind)
    assert answer.json["error"] == answer.json["message"]
    assert "absent" not in answer.json["message"]
    assert answer.headers["content-type"] == JSON


def test_failures_tell_nothing(web: Web, caplog: pytest.LogCaptureFixture) -> None:
    web.model.fails = ValueError("a secret text")
    for answer in (
        web.post("/predictions/cls", b"a secret text", PLAIN),
        web.ask("GET", "/v2/models/cls/ready"),
    ):
        assert (answer.status, answer.json["type"]) == (500, "InternalError")
    web.model.fails = Overloaded()
    answer = web.post("/predictions/cls", b"a secret text", PLAIN)
    assert (answer.status, answer.json["type"]) == (503, "Overloaded")
    assert "ValueError" in caplog.text
    assert "secret" not in caplog.text


def test_a_client_that_went_asks_nothing(web: Web) -> None:
    web.post("/predictions/cls", [b"half of"], PLAIN, gone=True)
    assert web.model.asked == []


def test_health_and_metadata(web: Web) -> None:
    described = {
        "name": "cls", "versions": ["1.0"], "platform": "ft_handler",
        "inputs": [{"name": "text"}], "outputs": [],
    }  # fmt: skip
    expected = {
        "/v2": {"name": "ft_handler", "version": __version__, "extensions": []},
        "/v2/health/live": {"live": True},
        "/v2/health/ready": {"ready": True},
        "/v2/models/cls": described,
        "/v2/models/cls/versions/1.0": described,
        "/v2/models/cls/ready": {"name": "cls", "ready": True},
        "/v2/models/cls/versions/1.0/ready": {"name": "cls", "ready": True},
        "/v1/models": {"models": ["cls"]},
        "/v1/models/cls": {"name": "cls", "ready": True},
        "/ping": {"status": "Healthy"},
    }
    for path, document in expected.items():
        answer = web.ask("GET", path)
        assert (answer.status, answer.json) == (200, document), path
    web.model.is_ready = False
    expected = {
        "/v2/health/ready": {"ready": False},
        "/v2/models/cls/ready": {"name": "cls", "ready": False},
        "/v1/models/cls": {"name": "cls", "ready": False},
        "/ping": {"status": "Unhealthy"},
    }
    for path, document in expected.items():
        answer = web.ask("GET", path)
        assert (answer.status, answer.json) == (503, document), path
    assert web.ask("GET", "/v2/health/live").status == 200
