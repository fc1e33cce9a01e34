"""The playground's own server: what it shows, whom it answers, what it passes on."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import stub_server
from fakes import model_info
from stub_server import Stub

from ft_handler.errors import ConfigError, EnvironmentProblem
from ft_handler.playground.local import PAGE, Playground
from ft_handler.playground.upstream import Unreachable, Upstream, configured, named


class Model:
    """What the stub needs of a model that is only described."""

    info = model_info("question_answering")

    class task:
        name = "question_answering"

    class pipeline:
        @staticmethod
        def run(requests: Any) -> Any:
            class Stats:
                tokens, padded, padded_fixed = 7, 1, 121

            class Reply:
                status, body, content_type = 200, b'{"answer": "yes"}', "application/json"

            return [Reply], Stats

    explainer = None


@pytest.fixture
def stub() -> Iterator[Stub]:
    server = Stub({"qa": Model()})  # type: ignore[dict-item]
    with stub_server.running(server):
        yield server


@pytest.fixture
def local(stub: Stub, tmp_path: Path) -> Iterator[Playground]:
    playground = Playground(named(stub.url, stub.url, stub.url, tmp_path / "key"))
    with stub_server.running(playground):
        yield playground


@pytest.fixture
def ask(local: Playground) -> Callable[..., tuple[int, Mapping[str, str], bytes]]:
    """`ask(method, path, body, **headers)`: status, headers and body."""

    def call(
        method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, Mapping[str, str], bytes]:
        connection = http.client.HTTPConnection(*local.server_address[:2], timeout=30)
        own = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            own.setdefault("Content-Type", "application/json")
        connection.request(method, path, body, own)
        answer = connection.getresponse()
        try:
            return answer.status, dict(answer.headers), answer.read()
        finally:
            connection.close()

    return call


def test_the_page_loads_nothing_from_elsewhere(ask: Any) -> None:
    for path, kind in (("/", "html"), ("/style.css", "css"), ("/script.js", "javascript")):
        status, headers, body = ask("GET", path)
        assert status == 200
        assert kind in headers["Content-Type"]
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert b"http:" not in body
        assert b"https:" not in body
        assert b"innerHTML" not in body
    assert {file.name for file in PAGE.iterdir()} == {"index.html", "style.css", "script.js"}


def test_predictions_are_passed_on_as_they_are(ask: Any, stub: Stub) -> None:
    stub.headers |= {"Server-Timing": "compute;dur=3", "Set-Cookie": "a=b"}
    body = b'{"question": "who?", "context": "me"}'
    status, headers, answer = ask("POST", "/predictions/qa", body)
    assert (status, answer) == (200, b'{"answer": "yes"}')
    assert headers["Server-Timing"] == "compute;dur=3"
    assert "Set-Cookie" not in headers
    assert stub.asked[-1][::2] == ("/predictions/qa", body)
    status, _, answer = ask("POST", "/explanations/qa", body)
    assert (status, json.loads(answer)["type"]) == (501, "NotOffered")


def test_what_is_told_of_models(ask: Any, stub: Stub) -> None:
    _, _, listed = ask("GET", "/models")
    assert json.loads(listed) == {"server": stub.url, "models": ["qa"]}
    _, _, described = ask("GET", "/models/qa")
    assert json.loads(described)["mode"] == "question_answering"
    assert stub.asked[-1][0] == "/models/qa?customized=true"
    ask("POST", "/predictions/qa", b"{}")
    _, _, counted = ask("GET", "/counters/qa")
    assert json.loads(counted) == {"requests": 1, "tokens": 7, "padded": 1, "padded_fixed": 121}
    assert ask("GET", "/models/other")[0] == 502


def test_nothing_else_is_passed_on(ask: Any, stub: Stub) -> None:
    for method, path in (
        ("GET", "/metrics"), ("GET", "/models/qa/1.0"), ("GET", "/models/..%2Ftoken"),
        ("GET", "/predictions/qa"), ("GET", "/../pyproject.toml"), ("GET", "/models/"),
        ("POST", "/models"), ("POST", "/models/qa"), ("POST", "/predictions/qa/1.0"),
        ("POST", "/predictions/..%2F..%2Fmodels"), ("POST", "/v2/models/qa/infer"),
        ("POST", "/predictions/qa%0d%0aX:y"),
    ):  # fmt: skip
        assert ask(method, path, b"{}" if method == "POST" else None)[0] == 404, path
    for method in ("PUT", "DELETE", "OPTIONS"):
        assert ask(method, "/models/qa")[0] == 501
    assert stub.asked == []


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:{port}"},
        {"Host": "127.0.0.1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
def test_pages_of_elsewhere_are_not_answered(
    ask: Any, local: Playground, stub: Stub, headers: Mapping[str, str]
) -> None:
    """A name that leads to this machine, and a form or script of another page."""
    port = str(local.server_address[1])
    own = {name: value.format(port=port) for name, value in headers.items()}
    for method, path in (("GET", "/"), ("GET", "/models"), ("POST", "/predictions/qa")):
        status, answered, _ = ask(method, path, b"{}" if method == "POST" else None, **own)
        assert status == 403
        assert not any(name.startswith("Access-Control") for name in answered)
    assert stub.asked == []


def test_the_pages_own_requests_are_answered(ask: Any, local: Playground) -> None:
    own = {"Origin": local.url.rstrip("/"), "Sec_Fetch_Site": "same-origin"}
    assert ask("POST", "/predictions/qa", b"{}", **own)[0] == 200
    port = local.server_address[1]
    assert ask("GET", "/", Host=f"localhost:{port}")[0] == 200


def test_bodies_are_declared_and_bounded(ask: Any, local: Playground, stub: Stub) -> None:
    # What a form of another page can send without asking.
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert ask("POST", "/predictions/qa", b"{}", Content_Type=kind)[0] == 415
    assert ask("POST", "/predictions/qa", b"{}", Content_Length=str(9 << 20))[0] == 413
    with socket.create_connection(local.server_address[:2], timeout=30) as plain:
        plain.sendall(
            b"POST /predictions/qa HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % local.server_address[1]
            + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
            + b"2\r\n{}\r\n0\r\n\r\n"
        )
        assert plain.makefile("rb").readline().split()[1] == b"411"
    assert stub.asked == []


def test_the_key_is_sent_and_never_shown(ask: Any, stub: Stub, tmp_path: Path) -> None:
    stub.key = "i-key"
    status, _, answer = ask("POST", "/predictions/qa", b"{}")
    assert status == 400
    keys = {"inference": {"key": "i-key", "expiration time": "x"}, "management": {"key": "m-key"}}
    (tmp_path / "key").write_text(json.dumps(keys))
    assert ask("POST", "/predictions/qa", b"{}")[0] == 200
    status, _, answer = ask("GET", "/models")
    assert (status, b"key" in answer) == (502, True)
    # Renewed while the page is open.
    stub.key = "m-key"
    assert ask("GET", "/models")[0] == 200
    for path in ("/", "/script.js", "/models", "/models/qa", "/counters/qa"):
        assert b"-key" not in ask("GET", path)[2]


def test_a_server_that_is_not_there_is_said(tmp_path: Path) -> None:
    gone = named("http://127.0.0.1:9", None, None, None)
    with pytest.raises(Unreachable, match=r"no answer from http://127\.0\.0\.1:10"):
        gone.models()
    playground = Playground(gone)
    with stub_server.running(playground):
        connection = http.client.HTTPConnection(*playground.server_address[:2], timeout=30)
        connection.request("POST", "/predictions/x", b"{}", {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["type"]) == (502, "Unreachable")
        connection.close()
        with pytest.raises(EnvironmentProblem, match="cannot be bound"):
            Playground(gone, playground.server_address[1])


def test_addresses(tmp_path: Path) -> None:
    at = named("https://[::1]:9000/", None, "http://m:1", None)
    assert at == Upstream("https://[::1]:9000", "https://[::1]:9001", "http://m:1")
    for wrong in ("127.0.0.1:8080", "ftp://a", "http://", "http://a:x", "http://u@a", "http://a?b"):
        with pytest.raises(ConfigError):
            named(wrong, None, None, None)
    config = tmp_path / "config.properties"
    config.write_text("inference_address=http://0.0.0.0:9100\n")
    found = configured(config, None)
    assert (found.inference, found.management) == ("http://127.0.0.1:9100", "http://127.0.0.1:8081")
    config.write_text("inference_address=unix:/tmp/x\n")
    with pytest.raises(ConfigError, match="is a Unix socket"):
        configured(config, None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--key-file", "nowhere"], "there is no file"),
        (["--metrics", "http://127.0.0.1:9"], "goes with --server"),
        (["--server", "nonsense"], "is not http://HOST:PORT"),
    ],
)
def test_options_that_make_no_sense(options: list[str], words: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ft_handler", "playground", "--port", "0", *options],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={"COLUMNS": "200", "PATH": "", "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert done.returncode != 0
    assert words in done.stderr
