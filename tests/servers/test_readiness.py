"""Ready or not, drained or not, from what a TorchServe says."""

from __future__ import annotations

import io
import json
import os
import socket
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from ports import free_port

from ft_handler import tasks
from ft_handler.errors import EnvironmentProblem
from ft_handler.servers.torchserve import busy
from ft_handler.servers.torchserve.api import Api, read_key
from ft_handler.servers.torchserve.draining import announce, announced, wait_until_idle
from ft_handler.servers.torchserve.health import Health
from ft_handler.servers.torchserve.properties import ServeOptions, effective_properties
from ft_handler.servers.torchserve.readiness import Readiness


class Told(Api):
    """A TorchServe that says what it is told to."""

    def __init__(self) -> None:
        super().__init__(effective_properties(ServeOptions(port=free_port(3))), Path("none"))
        self.models: dict[str, list[dict[str, Any]]] = {}
        self.asked: list[str] = []
        self.prediction: int | Exception = 200
        self.add("cls")

    def add(self, name: str, workers: Sequence[tuple[int, str]] = ((7, "READY"),)) -> None:
        self.models[name] = [
            {
                "minWorkers": 1,
                "maxBatchDelay": 1,
                "customizedMetadata": '{"mode": "sequence_classification"}',
                "jobQueueStatus": {"pendingRequests": 0},
                "workers": [{"pid": pid, "status": status} for pid, status in workers],
            }
        ]

    def request(
        self, url: str, data: bytes | None = None, method: str | None = None, timeout: float = 60
    ) -> Any:
        path = url.removeprefix(self.management).removeprefix(self.inference)
        self.asked.append(path)
        if path.startswith("/predictions/"):
            assert data == json.dumps(dict(tasks.get("sequence_classification").sample)).encode()
            if isinstance(self.prediction, Exception):
                raise self.prediction
            if self.prediction != 200:
                raise self._error(self.prediction)
            return {}
        if path.startswith("/models?"):
            return {"models": [{"modelName": name} for name in self.models]}
        name = path.removeprefix("/models/").partition("?")[0].removesuffix("/all")
        if name not in self.models:
            raise self._error(404)
        return self.models[name]

    @staticmethod
    def _error(status: int) -> urllib.error.HTTPError:
        body = io.BytesIO(b'{"message": "said why"}')
        return urllib.error.HTTPError("", status, "reason", None, body)  # type: ignore[arg-type]


def test_ready_after_an_answered_sample() -> None:
    told = Told()
    readiness = Readiness(told)
    assert readiness.obstacle() is None
    assert told.asked[-1] == "/predictions/cls"
    # The same worker is taken at its word; another process has to answer first.
    told.prediction = 503
    assert readiness.obstacle(["cls"]) is None
    told.add("cls", [(8, "READY")])
    assert readiness.obstacle(["cls"]) == "cls: a prediction is answered 503: said why"


def test_what_is_not_ready() -> None:
    told = Told()
    assert Readiness(told).obstacle(["no such"]) == "no such: no such model is registered"
    assert told.asked == ["/models/no%20such"]
    told.add("cls", [(7, "READY"), (8, "UNLOADING")])
    assert Readiness(told).obstacle() == "cls: 1 of 2 workers are READY"
    told.add("cls", [])
    assert Readiness(told).obstacle() == "cls: 0 of 1 workers are READY"
    told.models["cls"][0]["minWorkers"] = 0
    assert Readiness(told).obstacle() == "cls: 0 of 1 workers are READY"
    told.models.clear()
    assert Readiness(told).obstacle() == "no model is registered"


def test_settings_may_refuse_the_sample_but_not_the_key() -> None:
    told = Told()
    told.prediction = 422
    assert Readiness(told).obstacle() is None
    told.prediction = 400
    assert Readiness(told).obstacle() == "cls: a prediction is answered 400: said why"


@pytest.mark.parametrize("error", [TimeoutError(), urllib.error.URLError(TimeoutError())])
def test_an_answer_that_does_not_come_in_time(error: Exception) -> None:
    told = Told()
    told.prediction = error
    assert Readiness(told).obstacle(timeout=3) == "no answer within 3 s"
    assert Readiness(told).obstacle(timeout=0) == "no answer within 0 s"


def test_models_of_other_handlers_are_taken_at_their_workers_word() -> None:
    told = Told()
    told.models["cls"][0]["customizedMetadata"] = "something else"
    assert Readiness(told).obstacle() is None
    assert not any(path.startswith("/predictions/") for path in told.asked)


def test_no_server() -> None:
    api = Api(effective_properties(ServeOptions(port=free_port(3))), Path("none"))
    assert Readiness(api).obstacle() == f"no server answers at {api.management}"
    assert not api.answers()


def test_a_server_that_drains_is_not_ready() -> None:
    told = Told()
    port = told.port_of("management_address")
    with announce(port):
        assert announced(port)
        assert not announced(port + 1)
        found = Readiness(told).obstacle()
        assert found is not None
        assert "drains" in found
    assert not announced(port)
    assert Readiness(told).obstacle() is None


def test_predictions_through_a_unix_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            # Closed before it is read, it would be a broken pipe to whoever sends it.
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps([self.path, self.headers["Authorization"]]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def address_string(self) -> str:
            return "here"

        def log_message(self, *_: object) -> None:
            pass

    class Listening(HTTPServer):
        address_family = socket.AF_UNIX

        def server_bind(self) -> None:
            self.socket.bind(self.server_address)

    # A proxy of the environment is not asked for what is on this machine.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    key_file = tmp_path / "key_file.json"
    key_file.write_text('{"inference": {"key": "abc"}}')
    where = tmp_path / "socket"
    with Listening(str(where), Answers) as server:  # type: ignore[arg-type]
        threading.Thread(target=server.handle_request).start()
        overrides = {"inference_address": f"unix:{where}"}
        api = Api(effective_properties(ServeOptions(overrides=overrides)), key_file)
        answer = api.request(f"{api.inference}/predictions/cls", b"{}", "POST", 10)
    assert answer == ["/predictions/cls", "Bearer abc"]


# the end


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Told, Path, busy.Mark]:
    """A server whose one worker is this process, and which counts."""
    (tmp_path / busy.FOLDER).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    told = Told()
    told.add("cls", [(os.getpid(), "READY")])
    return told, tmp_path / busy.FOLDER, busy.Mark()


def test_idle_when_no_batch_is_under_way(counted: tuple[Told, Path, busy.Mark]) -> None:
    told, folder, mark = counted
    assert wait_until_idle(told, folder, 0, 60, lambda: True)
    mark.step()
    assert not wait_until_idle(told, folder, 0, 1, lambda: True)
    mark.step()
    assert wait_until_idle(told, folder, 0, 60, lambda: True)


def test_not_idle_while_requests_are_queued(counted: tuple[Told, Path, busy.Mark]) -> None:
    told, folder, _ = counted
    told.models["cls"][0]["jobQueueStatus"]["pendingRequests"] = 3
    assert not wait_until_idle(told, folder, 0, 1, lambda: True)


def test_not_idle_while_batches_come_and_go(
    counted: tuple[Told, Path, busy.Mark], monkeypatch: pytest.MonkeyPatch
) -> None:
    told, folder, mark = counted
    asked = told.request

    def request(url: str, *more: Any, **named: Any) -> Any:
        if "/all" in url:
            mark.step()
            mark.step()
        return asked(url, *more, **named)

    monkeypatch.setattr(told, "request", request)
    assert not wait_until_idle(told, folder, 0, 1, lambda: True)


def test_a_server_that_ended_is_not_waited_for(counted: tuple[Told, Path, busy.Mark]) -> None:
    told, folder, mark = counted
    mark.step()
    assert not wait_until_idle(told, folder, 0, 600, lambda: False)


def test_without_a_folder_nothing_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    busy.Mark().step()
    assert not list(tmp_path.iterdir())
    assert busy.count(tmp_path, os.getpid()) == 0


# over HTTP


class Probed:
    """What a health server is asked about."""

    def __init__(self) -> None:
        self.obstacle: str | None = None
        self.live = True
        self.asked: list[tuple[str, ...]] = []

    def why_not(self, names: Sequence[str]) -> str | None:
        self.asked.append(tuple(names))
        return self.obstacle


@pytest.fixture
def probed() -> Iterator[tuple[Probed, Health, str]]:
    about, port = Probed(), free_port(1)
    health = Health("127.0.0.1", port, about.why_not, lambda: about.live)
    health.start()
    yield about, health, f"http://127.0.0.1:{port}"
    health.stop()


def get(url: str, method: str = "GET") -> tuple[int, Any]:
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=10)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        body = answer.read()
        return int(answer.status), json.loads(body) if body else None


def test_health_says_what_is_found(probed: tuple[Probed, Health, str]) -> None:
    about, health, url = probed
    assert get(f"{url}/v2/health/ready") == (200, {"ready": True})
    assert get(f"{url}/v2/health/ready", "HEAD") == (200, None)
    about.obstacle = "no"
    assert get(f"{url}/v2/models/a-b.c/ready") == (503, {"ready": False, "cause": "no"})
    assert get(f"{url}/v2/models/cls/versions/2.0/ready?x=1")[0] == 503
    assert about.asked == [(), ("a-b.c",), ("cls/2.0",)]
    assert get(f"{url}/v2/health/live") == (200, {"live": True})
    about.live = False
    assert get(f"{url}/v2/health/live")[0] == 503
    for other in ("/", "/v2/models/a/b/ready", "/v2/models/a%2fb/ready", "/predictions/cls"):
        assert get(url + other)[0] == 404
    health.draining = True
    about.obstacle = None
    assert get(f"{url}/v2/health/ready") == (503, {"ready": False, "cause": "the server drains"})


def test_clients_that_say_nothing_leave_room_for_others(probed: tuple[Probed, Health, str]) -> None:
    _, _, url = probed
    port = int(url.rpartition(":")[2])
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
    assert get(f"{url}/v2/health/live")[0] == 200
    for one in silent:
        one.close()


def test_a_taken_health_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentProblem, match=rf"{port} \(--health-port\)"):
            Health("127.0.0.1", port, lambda _: None, lambda: True)


# keys


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "key"
    assert read_key(path, "inference") is None
    path.write_text("abc-123\n")
    assert (read_key(path, "inference"), read_key(path, "management")) == ("abc-123", "abc-123")
    for text in ("", "{}", "two words", '{"inference": 3}', "\xff"):
        path.write_bytes(text.encode("latin-1"))
        assert read_key(path, "inference") is None
