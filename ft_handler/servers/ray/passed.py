"""An ASGI app behind a deployment that Ray asks for one response a request."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response


class Passed(Response):  # type: ignore[misc]
    """What an ASGI app answers, as the response that Ray wants returned."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """The app answers the request that Ray has taken."""
        await self._app(scope, receive, send)
