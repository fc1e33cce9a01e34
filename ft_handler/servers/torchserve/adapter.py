"""What TorchServe hands over, as requests: one dict each, holding a body or the fields of a form.

`{"body": ...}` is any body, `{"data": ...}` one of gRPC or of a form's field of that name; other
keys are form fields, and the query of `/invocations`. Values are bytes, text or parsed JSON. HTTP
requests have headers, gRPC requests none. What a request is for stands there too: explanations and
descriptions reach the same handler.
"""

from __future__ import annotations

from collections.abc import Mapping

from ft_handler.errors import MalformedRequest, NotOffered, RequestError, UnusableRequest
from ft_handler.types import Incoming

_BODIES = ("body", "data")
#: `/invocations?model_name=` hands over what chose the model.
_NO_FIELD = frozenset({*_BODIES, "model_name", "model_version"})
_NO_FIELDS: Mapping[str, object] = {}
_NO_HEADERS: Mapping[str, str] = {}
_HEADERS = frozenset({"content-type", "content-encoding", "inference-header-content-length"})
_LENGTHS = frozenset(map(len, _HEADERS))
#: Headers by which TorchServe marks what is no prediction.
EXPLAIN, DESCRIBE = "explain", "describe"


def purpose(headers: Mapping[str, str]) -> str | None:
    """What a request is for: EXPLAIN, DESCRIBE, or None for a prediction."""
    for header in (EXPLAIN, DESCRIBE):
        if headers.get(header) == "True":
            return header
    return None


def over_grpc(headers: Mapping[str, object]) -> bool:
    """Whether a request's headers, as TorchServe keeps them, are those of a gRPC call: none.

    A header is a text. Beside them TorchServe keeps a dict for every input, under the input's name.
    """
    return not any(isinstance(value, str) for value in headers.values())


def incoming(
    item: Mapping[str, object], headers: Mapping[str, str] = _NO_HEADERS, why: str | None = None
) -> Incoming | RequestError:
    """One element of TorchServe's `data` as a request, or why it is none.

    why  what the request is for, as `purpose` says, unless that is offered
    """
    if why is EXPLAIN:
        return NotOffered(
            "explanations are not offered (setting captum_explanation); /predictions answers"
        )
    bodies = [name for name in _BODIES if name in item]
    if len(bodies) > 1:
        return MalformedRequest("send either 'body' or 'data', not both")
    fields: Mapping[str, object] = _NO_FIELDS
    if len(item) > len(bodies):
        fields = {name: value for name, value in item.items() if name not in _NO_FIELD}
    if bodies:
        body = item[bodies[0]]
        if isinstance(body, (str, bytes, bytearray)):
            return _declared(body, fields, headers)
        if body is None:  # what a parser makes of `null`
            return UnusableRequest("the body must be text, an object or a list of inputs")
        return Incoming(body, fields)
    if not fields:
        return MalformedRequest(
            "the form has no field; send plain text with Content-Type: text/plain"
        )
    return Incoming(None, fields)


def _declared(
    body: str | bytes | bytearray, fields: Mapping[str, object], headers: Mapping[str, str]
) -> Incoming:
    """A body with what its headers say of it; their names have no case."""
    if isinstance(body, str) and "Content-Type" in headers:  # the usual spelling: no search
        return Incoming(body, fields, headers["Content-Type"])
    named = {
        lower: headers[name]
        for name in headers
        # Most headers have another length, which is quicker to see.
        if len(name) in _LENGTHS and (lower := name.lower()) in _HEADERS
    }
    size = named.get("inference-header-content-length", "").strip()
    return Incoming(
        body,
        fields,
        named.get("content-type"),
        named.get("content-encoding"),
        int(size) if size.isascii() and size.isdigit() and len(size) < 10 else None,
    )
