"""Asks a running TorchServe: its addresses, its keys, and what its management API tells."""

from __future__ import annotations

import functools
import http.client
import json
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ft_handler.servers.torchserve.properties import address

#: What TorchServe writes its keys to, in the folder it was started in.
KEY_FILE = "key_file.json"


def read_key(path: Path, purpose: str) -> str | None:
    """The key for `inference`, `management` or `API` in TorchServe's key file; None without one.

    A file with a word of text and nothing else is a key for everything, as a proxy may ask for.
    """
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    if re.fullmatch(r"[!-z|~]+", text):  # printable, and no brace of JSON
        return text
    try:
        return str(json.loads(text)[purpose]["key"])
    except (ValueError, KeyError, TypeError):
        return None


class Api:
    """A TorchServe with these settings, started by whomever.

    key_file  where it has written its keys; without the file none are sent
    """

    def __init__(self, properties: Mapping[str, str], key_file: Path) -> None:
        self.properties = dict(properties)
        self.key_file = key_file

    @property
    def inference(self) -> str:
        """Base URL of the inference API."""
        return self.properties["inference_address"]

    @property
    def management(self) -> str:
        """Base URL of the management API."""
        return self.properties["management_address"]

    @property
    def metrics(self) -> str:
        """Base URL of the metrics API."""
        return self.properties["metrics_address"]

    def host_of(self, key: str) -> str:
        """The host of an address; this machine's own where that is a Unix socket."""
        return address(key, self.properties[key]).host or "127.0.0.1"

    def port_of(self, key: str) -> int:
        """The port of an address that is no Unix socket."""
        return address(key, self.properties[key]).port

    @property
    def token_auth(self) -> bool:
        """Whether requests need a key."""
        return self.properties.get("disable_token_authorization", "false").lower() != "true"

    def key(self, purpose: str) -> str | None:
        """The key for `inference`, `management` or `API`; None when none is needed (yet)."""
        if not self.token_auth:
            return None
        return read_key(self.key_file, purpose)

    def request(
        self, url: str, data: bytes | None = None, method: str | None = None, timeout: float = 60
    ) -> Any:
        """Call the inference or management API with the right key; the answer as JSON or text.

        data  a JSON document, or nothing to say
        """
        purpose = "management" if url.startswith(self.management) else "inference"
        headers = {"Content-Type": "application/json"} if data else {}
        key = self.key(purpose)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        # The server is on this machine: a proxy of the environment has no part in it.
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
        found = address("inference_address", self.inference)
        if found.path and purpose == "inference":
            handlers.append(_UnixHandler(found.path))
            url = "http://localhost" + url.removeprefix(str(found))
        call = urllib.request.Request(url, data=data, method=method, headers=headers)
        with urllib.request.build_opener(*handlers).open(call, timeout=timeout) as answer:
            body = answer.read().decode()
        try:
            return json.loads(body)
        except ValueError:
            return body

    def describe(self, name: str, timeout: float = 60) -> dict[str, Any]:
        """`GET /models/NAME`: the default version's description; of `NAME/VERSION` that one's."""
        return dict(self.versions(name, timeout)[0])

    def versions(self, name: str, timeout: float = 60) -> list[dict[str, Any]]:
        """`GET /models/NAME`; of `NAME/all` the descriptions of all versions."""
        return list(self.request(f"{self.management}/models/{name}", timeout=timeout))

    def registered(self, timeout: float = 60) -> list[str]:
        """Names of all registered models."""
        listed = self.request(f"{self.management}/models?limit=1000", timeout=timeout)
        return [str(model["modelName"]) for model in listed["models"]]

    def answers(self) -> bool:
        """Whether the management API answers anything."""
        try:
            self.registered(timeout=5)
        except urllib.error.HTTPError:
            return True
        except (OSError, ValueError, http.client.HTTPException):
            return False
        return True

    def ready(self) -> tuple[list[str], list[str]]:
        """Registered models whose workers are all READY, and the others."""
        done: list[str] = []
        waiting: list[str] = []
        for name in self.registered():
            up, wanted = workers_up(self.describe(name))
            (done if up >= wanted else waiting).append(name)
        return done, waiting


def workers_up(described: Mapping[str, Any]) -> tuple[int, int]:
    """How many workers of a description are READY, and how many there should be."""
    workers = described.get("workers", [])
    up = sum(worker["status"] == "READY" for worker in workers)
    return up, max(len(workers), int(described["minWorkers"]))


class _UnixHandler(urllib.request.HTTPHandler):
    """Opens every http: URL through one Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(functools.partial(_UnixConnection, self._path), request)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, host: str, **options: Any) -> None:
        super().__init__(host, **options)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
