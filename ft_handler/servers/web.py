"""The HTTP side of a server that has none of its own: routes, bodies and statuses as an ASGI app.

    app({"sentiment": model})

Models are whatever answers an `Incoming`; the app knows neither batches nor processes. Routes and
bodies are those of docs/http.md, with Open Inference's routes of health and metadata beside them.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol
from urllib.parse import unquote_to_bytes

import orjson
from python_multipart import FormParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from ft_handler.errors import InternalError, MalformedRequest, RequestError, RequestTooLarge
from ft_handler.request.bodies import parse_json
from ft_handler.request.failures import log_failure
from ft_handler.request.replies import encode_error, problem
from ft_handler.request.texts import utf8
from ft_handler.request.tracing import new_request_id, trace_of
from ft_handler.servers.inputs import incoming
from ft_handler.types import Incoming, Reply, Trace
from ft_handler.version import __version__

#: Bytes of a body where nothing says otherwise; TorchServe's `max_request_size`.
MAX_REQUEST_SIZE = 6_553_500
#: Fields of a form, so that none is many small pieces of work.
_MOST_FIELDS = 1000
_URLENCODED, _MULTIPART = b"application/x-www-form-urlencoded", b"multipart/form-data"


class Model(Protocol):
    """A model behind the app.

    version  what paths may name
    """

    version: str

    async def answer(self, incoming: Incoming, explain: bool, trace: Trace | None) -> Reply:
        """The answer to a request, or the explanation of its answer."""

    async def ready(self) -> bool:
        """Whether requests would be answered now."""

    async def signature(self) -> Mapping[str, Any]:
        """Its tensors, as `ft_handler.servers.signature` has them."""


def app(models: Mapping[str, Model], max_request_size: int = MAX_REQUEST_SIZE) -> Starlette:
    """The ASGI app that serves the models, by their names."""
    return _Front(models, max_request_size).app()


class _NotFound(Exception):
    """Nothing has this name; TorchServe's names for it, which clients may know."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.reply = problem(404, "Not Found", kind, message)


class _Front:
    def __init__(self, models: Mapping[str, Model], max_request_size: int) -> None:
        self._models, self._max_request_size = models, max_request_size

    def app(self) -> Starlette:
        asked, told = ["POST", "PUT"], ["GET"]
        model, version = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"
        routes = [
            Route("/predictions/{name}", self._predict, methods=asked),
            Route("/predictions/{name}/{version}", self._predict, methods=asked),
            Route("/explanations/{name}", self._explain, methods=asked),
            Route("/explanations/{name}/{version}", self._explain, methods=asked),
            Route("/invocations", self._invoke, methods=asked),
            Route("/v1/models/{name}:predict", self._predict, methods=asked),
            Route("/v1/models/{name}:explain", self._explain, methods=asked),
            Route("/v1/models", self._listed, methods=told),
            Route("/v1/models/{name}", self._ready, methods=told),
            Route(f"{model}/infer", self._predict, methods=asked),
            Route(f"{version}/infer", self._predict, methods=asked),
            Route("/v2", self._server, methods=told),
            Route("/v2/health/live", self._live, methods=told),
            Route("/v2/health/ready", self._all_ready, methods=told),
            Route(model, self._metadata, methods=told),
            Route(version, self._metadata, methods=told),
            Route(f"{model}/ready", self._ready, methods=told),
            Route(f"{version}/ready", self._ready, methods=told),
            Route("/ping", self._ping, methods=told),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _no_route})

    # -- what is computed --

    async def _predict(self, request: Request) -> Response:
        return await self._answer(request, explain=False)

    async def _explain(self, request: Request) -> Response:
        return await self._answer(request, explain=True)

    async def _invoke(self, request: Request) -> Response:
        """SageMaker's path: the query names the model, and further fields."""
        name = request.query_params.get("model_name")
        if name is None and len(self._models) == 1:
            (name,) = self._models
        request.path_params["name"] = name
        if version := request.query_params.get("model_version"):
            request.path_params["version"] = version
        return await self._answer(request, False, dict(request.query_params))

    async def _answer(
        self, request: Request, explain: bool, query: Mapping[str, str] | None = None
    ) -> Response:
        headers = dict(request.headers)
        trace = trace_of(headers, arrived=time.time(), request_id=new_request_id())
        try:
            model = self._model(request)
            item = {**(query or {}), **await self._item(request)}
            asked = incoming(item, headers)
            if isinstance(asked, RequestError):
                raise asked
            return _response(await model.answer(asked, explain, trace))
        except RequestError as error:
            return _response(encode_error(error))
        except _NotFound as error:
            return _response(error.reply)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        except Exception as error:
            log_failure("the request", error)
            return _response(encode_error(InternalError()))

    def _model(self, request: Request) -> Model:
        model = self._models.get(request.path_params["name"])
        if model is None:
            raise _NotFound("ModelNotFoundException", "no model of this name is served here")
        if request.path_params.get("version", model.version) != model.version:
            raise _NotFound(
                "ModelVersionNotFoundException", f"this model is served as {model.version} alone"
            )
        return model

    async def _item(self, request: Request) -> Mapping[str, object]:
        """A body, or the fields of a form; raises RequestError."""
        body = await self._body(request)
        kind, options = parse_options_header(request.headers.get("content-type"))
        if kind == _URLENCODED:
            return _urlencoded(body)
        if kind == _MULTIPART:
            return _multipart(body, options.get(b"boundary"))
        return {"body": _spelled(body) if kind == b"application/json" else body}

    async def _body(self, request: Request) -> bytes:
        """All of it, but never much more than is allowed; raises RequestTooLarge."""
        most = self._max_request_size
        declared = request.headers.get("content-length", "")
        pieces, size = [], int(declared) if declared.isdecimal() else 0
        if size <= most:
            size = 0
            async for piece in request.stream():
                size += len(piece)
                if size > most:
                    break
                pieces.append(piece)
        if size > most:
            raise RequestTooLarge(f"the body is over {most} bytes, which is the limit")
        return b"".join(pieces)

    # -- what is told --

    async def _listed(self, request: Request) -> Response:
        return _json({"models": list(self._models)})

    async def _server(self, request: Request) -> Response:
        return _json({"name": "ft_handler", "version": __version__, "extensions": []})

    async def _live(self, request: Request) -> Response:
        return _json({"live": True})

    async def _all_ready(self, request: Request) -> Response:
        ready = await self._are_ready()
        return _json({"ready": ready}, 200 if ready else 503)

    async def _ping(self, request: Request) -> Response:
        ready = await self._are_ready()
        return _json({"status": "Healthy" if ready else "Unhealthy"}, 200 if ready else 503)

    async def _are_ready(self) -> bool:
        for model in self._models.values():
            if not await model.ready():
                return False
        return True

    async def _ready(self, request: Request) -> Response:
        return await self._told(request, self._readiness)

    async def _metadata(self, request: Request) -> Response:
        return await self._told(request, self._description)

    async def _told(
        self, request: Request, tell: Callable[[str, Model], Awaitable[Response]]
    ) -> Response:
        try:
            return await tell(request.path_params["name"], self._model(request))
        except _NotFound as error:
            return _response(error.reply)
        except Exception as error:
            log_failure("the request", error)
            return _response(encode_error(InternalError()))

    async def _readiness(self, name: str, model: Model) -> Response:
        ready = await model.ready()
        return _json({"name": name, "ready": ready}, 200 if ready else 503)

    async def _description(self, name: str, model: Model) -> Response:
        described = {"name": name, "versions": [model.version], "platform": "ft_handler"}
        return _json({**described, **await model.signature()})


def _response(reply: Reply) -> Response:
    return Response(reply.body, reply.status, dict(reply.headers), reply.content_type)


def _json(document: object, status: int = 200) -> Response:
    return Response(orjson.dumps(document), status, media_type="application/json")


async def _no_route(request: Request, error: Exception) -> Response:
    """What Starlette finds no endpoint for."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        reply = problem(405, "", "MethodNotAllowedException", "this path takes another method")
    else:
        reply = problem(404, "", "ResourceNotFoundException", "nothing has this path")
    return _response(reply._replace(headers=error.headers or {}))


def _spelled(body: bytes) -> bytes | str:
    """The text that a body of JSON spells, which may itself hold a document; else the body."""
    if body.lstrip()[:1] != b'"':
        return body
    try:
        return str(parse_json(utf8(body)))
    except MalformedRequest:
        return body


def _urlencoded(body: bytes) -> dict[str, object]:
    """The fields of a form that was sent as a query is; what has no `=` is no field."""
    pairs = [pair.partition(b"=") for pair in body.split(b"&", _MOST_FIELDS)]
    if len(pairs) > _MOST_FIELDS:
        raise _too_many()

    def plain(text: bytes) -> bytes:
        return unquote_to_bytes(text.replace(b"+", b" "))

    return {utf8(plain(name)): plain(value) for name, is_field, value in pairs if is_field}


def _multipart(body: bytes, boundary: bytes | None) -> dict[str, object]:
    """The fields and files of a form; a part that is JSON by its own type is what it spells."""
    fields: dict[str, object] = {}

    def add(name: bytes | None, value: bytes) -> None:
        if len(fields) == _MOST_FIELDS:
            raise _too_many()
        fields[utf8(name or b"")] = value

    def add_file(file: Any) -> None:
        file.file_object.seek(0)
        value = file.file_object.read()
        add(file.field_name, value)
        if file.content_type == "application/json":
            with suppress(orjson.JSONDecodeError):  # read as any other file then
                fields[utf8(file.field_name)] = orjson.loads(value)

    config = {"MAX_MEMORY_FILE_SIZE": len(body)}
    try:
        parser = FormParser(
            "multipart/form-data",
            lambda field: add(field.field_name, field.value or b""),
            add_file,
            boundary=boundary,
            config=config,
        )
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise MalformedRequest("the form is not valid multipart/form-data") from None
    return fields


def _too_many() -> RequestTooLarge:
    return RequestTooLarge(f"the form has more than {_MOST_FIELDS} fields")
