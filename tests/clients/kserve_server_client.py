"""KServe's clients against KServe's own server: REST v1 and v2, gRPC, each with binary tensors."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import grpc
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

COLUMNS = ("label", "score")


def tensor(values: list[str], binary: bool, name: str = "text") -> InferInput:
    """A tensor of strings."""
    made = InferInput(name, [len(values)], "BYTES")
    made.set_data_from_numpy(np.array(values, dtype=object), binary_data=binary)
    return made


def columns(answer: Any) -> dict[str, list[Any]]:
    """The outputs by name, flat."""
    return {
        o.name: [v.decode() if isinstance(v, bytes) else v for v in o.as_numpy().ravel().tolist()]
        for o in answer.outputs
    }


async def refused(call: Any) -> list[str]:
    """The status and the message of a call that is refused."""
    try:
        await call
    except grpc.RpcError as error:
        return [error.code().name, error.details()]
    raise AssertionError("the call was answered")


async def main(base: str, address: str, model: str, *texts: str) -> None:
    """Print what the clients make of each answer."""
    found: dict[str, Any] = {}
    one = InferenceRESTClient(RESTConfig(protocol="v1"))
    two = InferenceRESTClient(RESTConfig(protocol="v2"))
    rpc = InferenceGRPCClient(address, channel_args=[("grpc.enable_retries", 0)])
    instances = {"instances": list(texts)}
    found["v1"] = (await one.infer(base, instances, model_name=model))["predictions"]
    for binary in (False, True):
        request = InferRequest(model, [tensor(list(texts), binary)], request_id="7")
        for name, answer in (
            (f"v2 {binary}", await two.infer(base, request, model_name=model)),
            (f"grpc {binary}", await rpc.infer(request)),
        ):
            assert answer.id == "7"
            found[name] = columns(answer)
    asked = InferRequest(model, [tensor(list(texts[:1]), False)], parameters={"top_k": 2})
    found["top_k"] = columns(await rpc.infer(asked))
    found["ready"] = [
        await two.is_server_ready(base),
        await two.is_model_ready(base, model),
        await rpc.is_server_ready(),
        await rpc.is_model_ready(model),
    ]

    def bad(*inputs: InferInput, **more: Any) -> Any:
        return rpc.infer(InferRequest(more.pop("model", model), list(inputs), **more))

    broken = tensor(["a"], True)
    broken._raw_data = b"\x09\x00\x00\x00a"
    floats = InferInput("text", [1], "FP32", [1.0])
    good = [rpc.infer(InferRequest(model, [tensor([text], True)])) for text in texts * 8]
    refusals = {
        "empty": bad(tensor([""], False)),
        "not UTF-8": bad(InferInput("text", [1], "BYTES", [b"\xff\xfe"])),
        "broken": bad(broken),
        "shape": bad(InferInput("text", [3], "BYTES", [b"a"])),
        "type": bad(floats),
        "nothing": bad(),
        "parameter": bad(tensor(["a"], True), parameters={"unheard_of": 1}),
        "two": bad(tensor(["a"], True), tensor(["a"], True)),
        "too many": bad(tensor(["a"] * 2049, False)),
        "model": bad(tensor(["a"], True), model="nobody"),
    }
    answers = await asyncio.gather(*good, *map(refused, refusals.values()))
    found["among bad ones"] = [columns(answer) for answer in answers[: len(good)]]
    found["refused"] = dict(zip(refusals, answers[len(good) :], strict=True))
    await rpc.close()
    print(json.dumps(found))


asyncio.run(main(*sys.argv[1:]))
