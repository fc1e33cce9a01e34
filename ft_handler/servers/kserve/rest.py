"""REST routes that hand a body over as it came, before KServe's own ones, which read it first.

Those drop keys that they do not know, answer some broken bodies with 500, and repeat a client's
text in what they say of others.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from kserve.errors import ModelNotReady
from kserve.protocol.dataplane import DataPlane
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ft_handler.errors import RequestError, RequestTooLarge
from ft_handler.request.replies import encode_error
from ft_handler.servers.inputs import incoming
from ft_handler.types import Reply

_Ask = Callable[..., Awaitable[tuple[Any, dict[str, str]]]]


def routes(plane: DataPlane, most_bytes: int) -> list[Route]:
    """The routes of predictions and explanations.

    most_bytes  of a body; a longer one is refused
    """

    def route(path: str, ask: _Ask) -> Route:
        async def answer(request: Request) -> Response:
            return _response(await _reply(request, plane, ask, most_bytes))

        return Route(path, answer, methods=["POST"])

    return [
        route("/v1/models/{name}:predict", plane.infer),
        route("/v1/models/{name}:explain", plane.explain),
        route("/v2/models/{name}/infer", plane.infer),
    ]


async def _reply(request: Request, plane: DataPlane, ask: _Ask, most_bytes: int) -> Reply:
    """Raises KServe's ModelNotFound and ModelNotReady, which it answers itself."""
    name = request.path_params["name"]
    if not await plane.model_ready(name, True):
        raise ModelNotReady(name)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most_bytes:
            return encode_error(RequestTooLarge(f"the body is longer than {most_bytes} bytes"))
    headers = dict(request.headers)
    asked = incoming({"body": body}, headers)
    if isinstance(asked, RequestError):
        return encode_error(asked)
    reply, _ = await ask(name, asked, headers)
    assert isinstance(reply, Reply)
    return reply


def _response(reply: Reply) -> Response:
    return Response(reply.body, reply.status, dict(reply.headers), reply.content_type)
