"""What a client sent as a request: a body or the fields of a form, and its headers.

`{"body": ...}` is any body, `{"data": ...}` the field of a form that stands for one; other keys are
fields. Values are bytes, text or parsed JSON. Every server that speaks HTTP reads requests so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ft_handler.errors import MalformedRequest, NotOffered, RequestError, UnusableRequest
from ft_handler.types import Incoming

_BODIES = ("body", "data")
_BODY = ("body",)
#: `/invocations?model_name=` hands over what chose the model.
_NO_FIELD = frozenset({*_BODIES, "model_name", "model_version"})
_NO_FIELDS: Mapping[str, object] = {}
_NO_HEADERS: Mapping[str, str] = {}
_HEADERS = frozenset({"content-type", "content-encoding", "inference-header-content-length"})
_LENGTHS = frozenset(map(len, _HEADERS))


def incoming(
    item: Mapping[str, object], headers: Mapping[str, str] = _NO_HEADERS
) -> Incoming | RequestError:
    """A body or a form as a request, or why it is none; the names of headers have no case."""
    bodies: Sequence[str] = _BODY
    if len(item) != 1 or "body" not in item:  # what nearly all requests are needs no search
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


def size_of(incoming: Incoming | RequestError) -> int:
    """Bytes that a request brought, or characters where a parser has made texts of them.

    Nearly in proportion to its tokens, and known before they are counted.
    """
    if isinstance(incoming, RequestError):
        return 0
    return _size(incoming.body) + sum(map(_size, incoming.fields.values()))


def _size(value: object) -> int:
    if isinstance(value, (str, bytes, bytearray)):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 0


def not_explained() -> NotOffered:
    """Why a model explains nothing that could."""
    return NotOffered(
        "explanations are not offered (setting captum_explanation); /predictions answers"
    )


def _declared(
    body: str | bytes | bytearray, fields: Mapping[str, object], headers: Mapping[str, str]
) -> Incoming:
    """A body with what its headers say of it."""
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
