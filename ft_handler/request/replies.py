"""Results to replies: the one place where requests are put together again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import orjson

from ft_handler.errors import InternalError, RequestError, RequestTooLarge
from ft_handler.request.failures import log_failure
from ft_handler.types import Form, Item, Prediction, Reply

NO_HEADERS: Mapping[str, str] = MappingProxyType({})


def encoded(document: object) -> bytes:
    """A document as JSON; arrays of fp32 have the fewest digits that tell them apart."""
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def encode_error(error: RequestError, headers: Mapping[str, str] = NO_HEADERS) -> Reply:
    """The answer to a refused request."""
    return problem(error.status, error.reason, error.type, str(error), headers)


def problem(
    status: int, reason: str, kind: str, message: str, headers: Mapping[str, str] = NO_HEADERS
) -> Reply:
    """An answer that says what is wrong: `{"code", "type", "message", "error"}`.

    `error` is the message again, where clients of KServe, Triton and Hugging Face look for it.
    """
    body = {"code": status, "type": kind, "message": message, "error": message}
    return Reply(status, reason, orjson.dumps(body), headers=headers, error=kind)


def outcome(form: Form, items: Iterable[Item[Any]]) -> list[Prediction] | RequestError:
    """The predictions of one request's items, or the error that refuses it.

    Of several errors the first input's counts. An item that no stage answered is our failure.
    """
    predictions: list[Prediction] = []
    unanswered = False
    for item in items:
        if isinstance(item.result, RequestError):
            if form.many and item.result.status < 500:
                return type(item.result)(f"inputs[{item.position}]: {item.result}")
            return item.result
        if item.result is None:
            unanswered = True
        else:
            predictions.append(item.result)
    return InternalError() if unanswered else predictions


def assemble(
    requests: Sequence[Form | RequestError],
    items: Sequence[Item[Any]],
    headers: Mapping[str, str] = NO_HEADERS,
    most_bytes: int | None = None,
) -> list[Reply]:
    """One reply a request, in order.

    requests    each one's form, or the error that refused it
    items       of all requests, in the order of their places
    headers     what every reply gets as its headers: this very mapping, not a copy
    most_bytes  of an answer; a longer one is refused, None is no bound
    """
    counts = [0] * len(requests)
    for item in items:
        counts[item.request] += 1
    replies, at = [], 0
    for request, count in zip(requests, counts, strict=True):
        reply = _reply(request, items[at : at + count], headers)
        if most_bytes is not None and len(reply.body) > most_bytes:
            reply = encode_error(_too_long(len(reply.body), most_bytes), headers)
        replies.append(reply)
        at += count
    return replies


def _too_long(size: int, most: int) -> RequestTooLarge:
    return RequestTooLarge(
        f"the answer has {size} bytes, the limit is {most}: send fewer or shorter texts"
    )


def _reply(
    request: Form | RequestError, items: Sequence[Item[Any]], headers: Mapping[str, str]
) -> Reply:
    if isinstance(request, RequestError):
        return encode_error(request, headers)
    result = outcome(request, items)
    if isinstance(result, RequestError):
        return encode_error(result, headers)
    try:
        return Reply(200, "OK", encoded(request.document(result)), headers=headers)
    except Exception as error:
        log_failure("encode", error)
        return encode_error(InternalError(), headers)
