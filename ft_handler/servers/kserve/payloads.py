"""KServe's requests as ours, and our replies as KServe's responses and errors."""

from __future__ import annotations

import struct
from typing import Any, NoReturn

import grpc
import orjson
from fastapi import HTTPException
from grpc_interceptor.exceptions import GrpcException
from kserve import InferInput, InferOutput, InferRequest, InferResponse
from kserve.protocol.infer_type import to_http_parameters

from ft_handler.errors import MalformedRequest, RequestError
from ft_handler.request.texts import utf8
from ft_handler.types import Incoming, Reply

#: What our statuses are over gRPC; a client may try again where it is UNAVAILABLE.
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
}


def incoming_of(request: InferRequest) -> Incoming | RequestError:
    """An Open Inference request that KServe has read, with all it holds, or why it is none."""
    document: dict[str, object] = {"model_name": request.model_name}
    if request.id:
        document["id"] = request.id
    if request.parameters:
        document["parameters"] = to_http_parameters(request.parameters)
    if request.request_outputs:
        document["outputs"] = [
            {"name": output.name, "parameters": dict(output.parameters or {})}
            for output in request.request_outputs
        ]
    raw = bool(request.from_grpc and request.use_binary_outputs)
    try:
        document["inputs"] = [
            _tensor(tensor, raw, f"inputs[{at}]") for at, tensor in enumerate(request.inputs)
        ]
    except RequestError as error:
        return error
    return Incoming(document)


def _tensor(tensor: InferInput, raw: bool, where: str) -> dict[str, object]:
    parameters = to_http_parameters(tensor.parameters or {})
    parameters.pop("binary_data_size", None)  # KServe's client leaves it in where nothing follows
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "datatype": tensor.datatype,
        "data": _strings(tensor, raw, where) if tensor.datatype == "BYTES" else [],
        "parameters": parameters,
    }


def _strings(tensor: InferInput, raw: bool, where: str) -> list[object]:
    """The strings of a tensor; raises MalformedRequest."""
    values: Any = tensor.data
    if raw:
        try:
            values = tensor.as_numpy().ravel().tolist()
        except (ValueError, struct.error):
            raise MalformedRequest(
                f"{where}: raw_input_contents must hold as many strings as the shape says, each "
                "behind its length"
            ) from None
    return [utf8(value) if isinstance(value, bytes) else value for value in values]


def response_of(reply: Reply, request: InferRequest) -> InferResponse:
    """A reply with tensors as KServe's response, raw where the request was."""
    document = orjson.loads(reply.body)
    outputs = []
    for tensor in document["outputs"]:
        output = InferOutput(tensor["name"], tensor["shape"], tensor["datatype"], tensor["data"])
        if request.use_binary_outputs:
            output.set_data_from_numpy(output.as_numpy(), binary_data=True)
        outputs.append(output)
    return InferResponse(
        document.get("id", ""),
        document["model_name"],
        outputs,
        from_grpc=request.from_grpc,
        use_binary_outputs=request.use_binary_outputs,
    )


def refuse(reply: Reply, over_grpc: bool) -> NoReturn:
    """Raise what KServe answers with the status and the message of a reply that refuses."""
    message = orjson.loads(reply.body)["message"]
    if over_grpc:
        code = _CODES.get(reply.status, grpc.StatusCode.INTERNAL)
        raise GrpcException(status_code=code, details=message)
    raise HTTPException(reply.status, message)
