"""Open Inference over gRPC as TorchServe speaks it, where `ts_open_inference_protocol` is on.

Its front writes a call's tensors as JSON, strings in base64, and drops parameters, requested
outputs and `raw_input_contents`. It makes its answer of a body with `id`, `model_name`,
`model_version` and `outputs`; any other body, such as an error's, makes it throw, and the worker is
taken down. It has no place for a status: a refused call succeeds, and its outputs are the error.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping

from ft_handler.errors import MalformedRequest, RequestError
from ft_handler.request.bodies import parse_json
from ft_handler.request.replies import encoded
from ft_handler.request.texts import utf8
from ft_handler.servers.torchserve.adapter import over_grpc
from ft_handler.types import Incoming, Reply

_BODY = "body"
_MOST_ID_CHARS = 1024


def is_call(headers: Mapping[str, object]) -> bool:
    """Whether a request's headers, as TorchServe keeps them, are those of a ModelInfer call.

    Of all that comes over gRPC it alone declares a content type, its own front having written JSON.
    """
    declared = headers.get(_BODY)
    return (
        isinstance(declared, Mapping)
        and declared.get("content-type") == "application/json"
        and over_grpc(headers)
    )


def document_of(item: Mapping[str, object]) -> dict[str, object]:
    """What the front wrote, parsed where TorchServe's worker was told to leave bodies alone."""
    body = item[_BODY]
    if isinstance(body, (bytes, bytearray)):
        body = parse_json(utf8(body))
    assert isinstance(body, dict), "the front writes an object"
    return body


def incoming(document: Mapping[str, object]) -> Incoming | RequestError:
    """The request, with its strings as they were sent, or why it is none."""
    tensors = document["inputs"]
    assert isinstance(tensors, list), "the front writes a list"
    try:
        decoded = [_decoded(tensor, f"inputs[{at}]") for at, tensor in enumerate(tensors)]
    except RequestError as error:
        return error
    return Incoming({**document, "inputs": decoded})


def answer(reply: Reply, document: Mapping[str, object], model: Mapping[str, str]) -> Reply:
    """The reply as the front can read it: a refusal's `code`, `type` and `message` as outputs.

    model  `model_name` and `model_version`
    """
    if reply.status == 200:
        return reply
    error = json.loads(reply.body)
    outputs = [
        {"name": name, "shape": [1], "datatype": datatype, "data": [error[name]]}
        for name, datatype in (("code", "INT32"), ("type", "BYTES"), ("message", "BYTES"))
    ]
    given = document["id"]
    known = given if isinstance(given, str) and len(given) <= _MOST_ID_CHARS else ""
    return reply._replace(body=encoded({**model, "id": known, "outputs": outputs}))


def _decoded(tensor: dict[str, object], where: str) -> dict[str, object]:
    """A tensor whose strings are what the client sent; raises MalformedRequest."""
    data = tensor.get("data")
    if tensor["datatype"] != "BYTES" or not isinstance(data, list):
        return tensor
    if not data and 0 not in (tensor.get("shape") or [0]):  # type: ignore[operator]
        raise MalformedRequest(
            f"{where} has no bytes_contents; TorchServe drops raw_input_contents before they get "
            "here"
        )
    try:
        return {**tensor, "data": [utf8(base64.b64decode(text)) for text in data]}
    except binascii.Error:
        raise MalformedRequest(f"{where} is not as TorchServe writes it") from None
