"""The HTTP side of several models: a deployment that passes each request on to its model's."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.requests import Request
from starlette.responses import Response

from ft_handler.errors import Overloaded
from ft_handler.request.replies import encode_error
from ft_handler.servers.ray.passed import Passed
from ft_handler.servers.web import app
from ft_handler.types import Incoming, Reply, Trace

#: Seconds in which a replica says that it is there.
_READY_WITHIN = 5.0


class Front:
    """Answers over HTTP for the models behind it.

    models  name -> the model's version, and the handle of its deployment
    """

    def __init__(self, models: Mapping[str, tuple[str, Any]], max_request_size: int) -> None:
        behind = {name: _Behind(version, handle) for name, (version, handle) in models.items()}
        self._app = app(behind, max_request_size)

    async def __call__(self, request: Request) -> Response:
        """One HTTP request."""
        return Passed(self._app)


class _Behind:
    """A model in other processes."""

    def __init__(self, version: str, handle: Any) -> None:
        self.version, self._handle = version, handle

    async def answer(self, incoming: Incoming, explain: bool, trace: Trace | None) -> Reply:
        try:
            reply: Reply = await self._handle.answer.remote(incoming, explain, trace)
        except (BackPressureError, DeploymentUnavailableError):
            return encode_error(Overloaded())
        return reply

    async def ready(self) -> bool:
        async def asked() -> bool:
            return bool(await self._handle.ready.remote())

        try:
            return await asyncio.wait_for(asked(), _READY_WITHIN)
        except Exception:  # whatever Ray says: it does not answer
            return False

    async def signature(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = await self._handle.signature.remote()
        return found
