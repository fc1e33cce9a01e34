"""A server in this process with answers of real models: TorchServe's routes, without Java."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ft_handler.config import RawSettings, model_yaml
from ft_handler.runtime import Ready, open_model
from ft_handler.types import Incoming


class Stub(ThreadingHTTPServer):
    """Inference, management and metrics on one port; what was asked is remembered.

    key      what requests must carry, if anything
    headers  further headers of answers
    """

    daemon_threads = True

    def __init__(self, models: Mapping[str, Ready]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models = models
        self.key: str | None = None
        self.headers: dict[str, str] = {}
        self.asked: list[tuple[str, dict[str, str], bytes]] = []
        self.counters: dict[str, Counter[str]] = {name: Counter() for name in models}

    @property
    def url(self) -> str:
        """Its base URL."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Stub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.server.asked.append((self.path, dict(self.headers), b""))
        name = path.rpartition("/")[2]
        if path == "/metrics":
            lines = [
                f'{metric}{{ModelName="{model}",Level="Model",Hostname="h",}} {float(value)}'
                for model, counted in self.server.counters.items()
                for metric, value in counted.items()
            ]
            self._send(200, "\n".join(lines).encode() + b"\n", "text/plain")
        elif not self._allowed():
            self._send(400, b'{"code": 400, "message": "Token Authorization failed."}')
        elif path == "/models":
            listed = [{"modelName": name, "modelUrl": "x"} for name in self.server.models]
            self._send(200, json.dumps({"models": listed}).encode())
        elif name in self.server.models:
            ready = self.server.models[name]
            told = {**asdict(ready.info), "mode": ready.task.name}
            self._send(200, json.dumps([{"customizedMetadata": told}]).encode())
        else:
            self._send(404, b'{"code": 404, "message": "no such model"}')

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, dict(self.headers), body))
        _, route, name = self.path.split("/")
        ready = self.server.models[name]
        if not self._allowed():
            self._send(400, b'{"code": 400, "message": "Token Authorization failed."}')
            return
        pipeline = ready.explainer if route == "explanations" else ready.pipeline
        if pipeline is None:
            self._send(501, b'{"code": 501, "type": "NotOffered", "message": "not offered here"}')
            return
        kind = self.headers["Content-Type"]
        (reply,), stats = pipeline.run([Incoming(body, content_type=kind)])
        self._send(reply.status, reply.body, reply.content_type)
        self.server.counters[name].update(
            ft_requests_total=1, ft_tokens_total=stats.tokens,
            ft_padding_avoided_total=stats.padded,
            ft_padding_avoided_fixed_total=stats.padded_fixed,
        )  # fmt: skip

    def _allowed(self) -> bool:
        key = self.server.key
        return key is None or self.headers.get("Authorization") == f"Bearer {key}"

    def _send(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        for name, value in {**self.server.headers, "Content-Type": kind}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def opened(folder: Path, name: str) -> Ready:
    """A traced folder, ready to answer and to explain on this CPU."""
    raw = RawSettings.of_model_dir(folder, model_yaml(folder)).over({"num_threads": 1})
    from ft_handler.servers import server_settings

    return open_model(folder, raw, groups=server_settings(), name=name, explains=True)


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[None]:
    """The server answers while this lasts."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
