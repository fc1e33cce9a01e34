"""The playground's own server: on loopback alone, the page and what the page may ask."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ft_handler.errors import EnvironmentProblem
from ft_handler.playground.upstream import Answer, Unreachable, Upstream

HOST = "127.0.0.1"
PAGE = Path(__file__).resolve().parent / "page"
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/script.js": ("script.js", "text/javascript; charset=utf-8"),
}
#: As `ft-handler archive` names models.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_MOST_BYTES = 8 << 20
_IDLE_SECONDS = 60
#: Nothing from elsewhere is loaded, run, sent or framed, whatever an answer holds.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Playground(ThreadingHTTPServer):
    """Shows the page on 127.0.0.1 and asks a server for it.

    Raises EnvironmentProblem when the port is taken; port 0 takes a free one.
    """

    daemon_threads = True

    def __init__(self, upstream: Upstream, port: int = 0) -> None:
        self.upstream = upstream
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise EnvironmentProblem(
                f"{HOST}:{port} cannot be bound: {error.strerror}; choose another --port"
            ) from None
        own = self.server_address[1]
        self.hosts = {f"{name}:{own}" for name in (HOST, "localhost")}

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that goes away in the middle is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: Playground
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "ft-handler", ""
    timeout = _IDLE_SECONDS

    def do_GET(self) -> None:
        """The page's files, and what is told of models."""
        if not self._admitted():
            return
        path = urlsplit(self.path).path
        if path in _FILES:
            file, kind = _FILES[path]
            self._send(Answer(200, {"Content-Type": kind}, (PAGE / file).read_bytes()))
        elif path == "/models":
            upstream = self.server.upstream
            self._tell(lambda: {"server": upstream.inference, "models": upstream.models()})
        elif described := self._model(path, "models"):
            self._tell(lambda: self.server.upstream.description(described))
        elif counted := self._model(path, "counters"):
            self._tell(lambda: self.server.upstream.counters(counted))
        else:
            self._refuse(404, "NotFound", "there is nothing here")

    def do_POST(self) -> None:
        """A prediction or an explanation, passed on as it is."""
        if not self._admitted():
            return
        path = urlsplit(self.path).path
        routes = ("predictions", "explanations")
        route, name = next(((r, n) for r in routes if (n := self._model(path, r))), (None, None))
        length = self.headers.get("Content-Length", "")
        # A page from elsewhere cannot declare this without asking first, and is not answered.
        if self.headers.get_content_type() != "application/json":
            self._refuse(415, "UnsupportedMedia", "only application/json is passed on")
        elif route is None:
            self._refuse(404, "NotFound", "there is nothing here")
        elif not re.fullmatch(r"[0-9]{1,12}", length):
            self._refuse(411, "LengthRequired", "the body's length must be given")
        elif int(length) > _MOST_BYTES:
            self._refuse(413, "RequestTooLarge", f"at most {_MOST_BYTES} bytes are passed on")
        else:
            body = self.rfile.read(int(length))
            try:
                self._send(self.server.upstream.ask(f"/{route}/{name}", body))
            except Unreachable as error:
                self._refuse(502, "Unreachable", str(error))

    def _admitted(self) -> bool:
        """Whether the page asks, and not one of elsewhere whose name was made to lead here."""
        origin = self.headers.get("Origin")
        site = self.headers.get("Sec-Fetch-Site", "none")
        good = (
            self.headers.get("Host") in self.server.hosts
            and (origin is None or urlsplit(origin).netloc in self.server.hosts)
            and site in ("same-origin", "none")
        )
        if not good:
            self._refuse(403, "Forbidden", "only the playground's own page may ask")
        return good

    @staticmethod
    def _model(path: str, route: str) -> str | None:
        """The model's name in `/ROUTE/NAME`, if the path is that."""
        before, _, name = path.rpartition("/")
        name = unquote(name)
        return name if before == f"/{route}" and _NAME.fullmatch(name) else None

    def _tell(self, ask: Callable[[], object]) -> None:
        try:
            document = ask()
        except Unreachable as error:
            self._refuse(502, "Unreachable", str(error))
        else:
            kind = {"Content-Type": "application/json"}
            self._send(Answer(200, kind, json.dumps(document).encode()))

    def _refuse(self, status: int, kind: str, message: str) -> None:
        # What was not read of the body must not be taken for another request.
        self.close_connection = True
        document = {"code": status, "type": kind, "message": message}
        body = json.dumps(document).encode()
        self._send(Answer(status, {"Content-Type": "application/json"}, body))

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        headers = {**answer.headers, **_HEADERS, "Content-Length": str(len(answer.body))}
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, format: str, *args: object) -> None:
        """No line for a request: paths and answers are nobody else's."""
