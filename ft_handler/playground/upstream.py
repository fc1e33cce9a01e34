"""The server that the page asks: its addresses, its keys, and requests to it."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from ft_handler.errors import ConfigError, FtHandlerError
from ft_handler.servers.torchserve.api import read_key
from ft_handler.servers.torchserve.properties import (
    ADDRESSES,
    ServeOptions,
    address,
    effective_properties,
)

#: What the page is told -> the metric it is read from, of docs/operations.md.
COUNTERS = {
    "requests": "ft_requests_total",
    "tokens": "ft_tokens_total",
    "padded": "ft_padding_avoided_total",
    "padded_fixed": "ft_padding_avoided_fixed_total",
}
#: Seconds until an answer; explanations of long texts take their time.
_TIMEOUT = 120
#: Headers of an answer that mean something to the page.
_PASSED_ON = ("Content-Type", "Server-Timing")


class Unreachable(FtHandlerError):
    """The server does not answer, or not as one of ours would."""


class Answer(NamedTuple):
    """What the server said: headers are those that are passed on."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Upstream:
    """A running server.

    inference, management, metrics  base URLs; the last two are asked for names and figures alone
    key_file                        TorchServe's key file, or one with a key and nothing else; read
                                    for every request, so that renewed keys count
    """

    inference: str
    management: str
    metrics: str
    key_file: Path | None = None

    def models(self) -> list[str]:
        """The names of all models; raises Unreachable."""
        listed = self._document("/models?limit=1000")
        try:
            return [str(model["modelName"]) for model in listed["models"]]
        except (KeyError, TypeError):
            raise Unreachable(f"{self.management} lists no models as TorchServe does") from None

    def description(self, name: str) -> dict[str, Any]:
        """What a model's traced file says of itself; raises Unreachable."""
        described = self._document(f"/models/{quote(name, safe='')}?customized=true")
        try:
            found = described[0]["customizedMetadata"]
            if isinstance(found, dict) and "mode" in found:
                return found
        except (KeyError, IndexError, TypeError):
            pass
        raise Unreachable(f"{name} does not say what it is")

    def counters(self, name: str) -> dict[str, float]:
        """How far a model's counters are, summed over its workers; raises Unreachable."""
        answer = _ask(self.metrics, "GET", "/metrics")
        text = answer.body.decode("utf-8", "replace")
        found = {}
        for key, metric in COUNTERS.items():
            of_model = rf'^{metric}\{{(?:[^\n]*,)?ModelName="{re.escape(name)}"[^\n]*\}} (\S+)$'
            values = re.findall(of_model, text, re.MULTILINE)
            try:
                found[key] = sum(map(float, values))
            except ValueError:
                raise Unreachable(f"{self.metrics} shows no metrics") from None
        return found

    def ask(self, path: str, body: bytes) -> Answer:
        """POST a JSON body to the inference interface; raises Unreachable."""
        headers = {"Content-Type": "application/json", **self._key("inference")}
        return _ask(self.inference, "POST", path, body, headers)

    def _document(self, path: str) -> Any:
        answer = _ask(self.management, "GET", path, headers=self._key("management"))
        if answer.status != 200:
            why = "; the key does not fit" if answer.status in (400, 401, 403) else ""
            raise Unreachable(f"{self.management} answers {answer.status}{why}")
        try:
            return json.loads(answer.body)
        except ValueError:
            raise Unreachable(f"{self.management} answers no JSON") from None

    def _key(self, purpose: str) -> dict[str, str]:
        key = self.key_file and read_key(self.key_file, purpose)
        return {"Authorization": f"Bearer {key}"} if key else {}


def configured(config: Path | None, key_file: Path | None) -> Upstream:
    """The server that `ft-handler serve` starts here with these settings.

    Raises ConfigError for settings that could not be served, and for a Unix socket.
    """
    properties = effective_properties(ServeOptions(config=config))
    found = {key: address(key, properties[key]) for key in ADDRESSES}
    for key, one in found.items():
        if one.path:
            raise ConfigError(
                f"{key} is a Unix socket, which the playground does not ask: --server"
            )
        if one.host == "0.0.0.0":  # every interface of this machine, so this one too
            found[key] = replace(one, host="127.0.0.1")
    inference, management, metrics = map(str, found.values())
    return Upstream(inference, management, metrics, key_file)


def named(
    server: str, management: str | None, metrics: str | None, key_file: Path | None
) -> Upstream:
    """A server by its URL; the other two are a port and two further on, as of `--port`.

    Raises ConfigError for what is no http:// or https:// URL.
    """
    return Upstream(
        _base(server), _base(management or _next(server, 1)), _base(metrics or _next(server, 2)),
        key_file,
    )  # fmt: skip


def _base(url: str) -> str:
    parts = urlsplit(url)
    try:
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment or parts.username:
        raise ConfigError(f"{url!r} is not http://HOST:PORT or https://HOST:PORT")
    return url.rstrip("/")


def _next(url: str, offset: int) -> str:
    parts = urlsplit(_base(url))
    port = parts.port or (443 if parts.scheme == "https" else 80)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{parts.scheme}://{host}:{port + offset}"


def _ask(
    base: str,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """One request, without redirects and without proxies: keys go to this server alone."""
    parts = urlsplit(base)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=_TIMEOUT)
    try:
        connection.request(method, parts.path + path, body, dict(headers or {}))
        answer = connection.getresponse()
        kept = {name: answer.headers[name] for name in _PASSED_ON if name in answer.headers}
        return Answer(answer.status, kept, answer.read())
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(f"no answer from {base}: {error or type(error).__name__}") from None
    finally:
        connection.close()
