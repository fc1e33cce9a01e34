"""What TorchServe hands over, as requests: one dict each, holding a body or the fields of a form.

`{"body": ...}` is any body, `{"data": ...}` one of gRPC or of a form's field of that name; other
keys are form fields, and the query of `/invocations`. Values are bytes, text or parsed JSON.

What a request is for stands in its headers: explanations and descriptions reach the same handler.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ft_handler.errors import MalformedRequest, NotOffered, RequestError, UnusableRequest
from ft_handler.types import Incoming

_BODIES = ("body", "data")
#: Headers by which TorchServe marks what is no prediction; gRPC requests carry none.
EXPLAIN, DESCRIBE = "explain", "describe"


def purpose(ctx: Any, index: int) -> str | None:
    """What a request is for: EXPLAIN, DESCRIBE, or None for a prediction."""
    headers = ctx.get_all_request_header(index)
    for header in (EXPLAIN, DESCRIBE):
        if headers.get(header) == "True":
            return header
    return None


def incoming(item: Mapping[str, object], why: str | None = None) -> Incoming | RequestError:
    """One element of TorchServe's `data` as a request, or why it is none.

    why  what the request is for, as `purpose` says
    """
    if why is EXPLAIN:
        return NotOffered("explanations are not offered; /predictions answers")
    if len(item) == 1:  # nearly always
        body = item.get("body")
        if body is not None:
            return Incoming(body)
    bodies = [name for name in _BODIES if name in item]
    if len(bodies) > 1:
        return MalformedRequest("send either 'body' or 'data', not both")
    if not item:
        return MalformedRequest(
            "the form has no field; send plain text with Content-Type: text/plain"
        )
    fields = {name: value for name, value in item.items() if name not in _BODIES}
    if not bodies:
        return Incoming(None, fields)
    body = item[bodies[0]]
    if body is None:  # what a parser makes of `null`
        return UnusableRequest("the body must be text, an object or a list of inputs")
    return Incoming(body, fields)


def over_grpc(headers: Mapping[str, object]) -> bool:
    """Whether a request's headers, as TorchServe keeps them, are those of a gRPC call: none.

    A header is a text. Beside them TorchServe keeps a dict for every input, under the input's name.
    """
    return not any(isinstance(value, str) for value in headers.values())
