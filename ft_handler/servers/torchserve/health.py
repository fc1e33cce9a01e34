"""Readiness and liveness over HTTP, which TorchServe lacks, at the paths of Open Inference v2.

A probe of a proxy or of Kubernetes that asks here costs no process, and the answer turns before a
server that drains is stopped.
"""

from __future__ import annotations

import json
import re
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

from ft_handler.errors import EnvironmentProblem

#: Seconds that a client may take, and for which a verdict is repeated to whoever asks next.
_CLIENT_SECONDS, _FRESH_SECONDS = 5.0, 0.5
#: Clients at the same time; one more is sent away at once.
_MOST_CLIENTS = 64

_NAME = r"([\w.+-]+)"
_READY = re.compile(rf"/v2/(?:health|models/{_NAME}(?:/versions/{_NAME})?)/ready", re.ASCII)
_LIVE = "/v2/health/live"


class Health(ThreadingHTTPServer):
    """Answers probes in threads of its own, from `start()` (or `with`) until `stop()`.

    obstacle  why the models of these names, or all, should not be sent requests; None: they may be
    alive     whether the server behind it can be asked anything at all

    Raises EnvironmentProblem when the port cannot be bound.
    """

    daemon_threads = True
    request_queue_size = _MOST_CLIENTS

    def __init__(
        self,
        host: str,
        port: int,
        obstacle: Callable[[Sequence[str]], str | None],
        alive: Callable[[], bool],
    ) -> None:
        try:
            family, _, _, _, where = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self.address_family = family
            super().__init__(where, _Probe)  # type: ignore[arg-type]
        except OSError as error:
            raise EnvironmentProblem(
                f"{host}:{port} (--health-port) cannot be bound: {error.strerror}"
            ) from None
        self._obstacle, self.alive = obstacle, alive
        self._places = threading.BoundedSemaphore(_MOST_CLIENTS)
        self._asking = threading.Lock()
        self._known: dict[tuple[str, ...], tuple[float, str | None]] = {}
        self.draining = False

    def server_bind(self) -> None:
        """Bind, without the question to a name server that http.server would ask."""
        socketserver.TCPServer.server_bind(self)

    def start(self) -> None:
        """Begin to answer."""
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}).start()

    def stop(self) -> None:
        """Answer no more."""
        self.shutdown()
        self.server_close()

    def obstacle(self, names: tuple[str, ...]) -> str | None:
        """The verdict on these models, at most half a second old."""
        if self.draining:
            return "the server drains"
        with self._asking:
            when, verdict = self._known.get(names, (float("-inf"), None))
            if time.monotonic() - when >= _FRESH_SECONDS:
                verdict = self._obstacle(names)
                # Names come from whoever asks: only a few verdicts are kept.
                if len(self._known) >= _MOST_CLIENTS:
                    self._known.clear()
                self._known[names] = time.monotonic(), verdict
        return None if not self.draining and verdict is None else verdict or "the server drains"

    def process_request(self, request: object, client_address: object) -> None:
        """A thread for this client, while there is a place."""
        assert isinstance(request, socket.socket)
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: object, client_address: object) -> None:
        """Answer one client, and free its place."""
        assert isinstance(request, socket.socket)
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no concern of ours."""


class _Probe(BaseHTTPRequestHandler):
    timeout: ClassVar[float] = _CLIENT_SECONDS
    server: Health
    server_version = "ft-handler"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        ready = _READY.fullmatch(path)
        if path == _LIVE:
            live = self.server.alive()
            self._answer(200 if live else 503, {"live": live})
        elif ready:
            name = "/".join(part for part in ready.groups() if part)
            found = self.server.obstacle((name,) if name else ())
            self._answer(
                200 if found is None else 503,
                {"ready": True} if found is None else {"ready": False, "cause": found},
            )
        else:
            self._answer(404, {"error": "no such path"})

    do_HEAD = do_GET

    def _answer(self, status: int, document: dict[str, object]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Probes come every second: they leave no lines."""
