"""KServe's REST client: v1, v2 with JSON, v2 with binary tensors, a refusal."""

from __future__ import annotations

import asyncio
import json
import sys

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig


def tensor(name: str, values: list[str], binary: bool) -> InferInput:
    """A tensor of strings."""
    made = InferInput(name, [len(values)], "BYTES")
    made.set_data_from_numpy(np.array(values, dtype=object), binary_data=binary)
    return made


async def main(base: str, model: str, qa: str, *texts: str) -> None:
    """Print what the client makes of each answer."""
    found: dict[str, object] = {}
    one = InferenceRESTClient(RESTConfig(protocol="v1"))
    two = InferenceRESTClient(RESTConfig(protocol="v2"))
    found["v1"] = (await one.infer(base, {"instances": list(texts)}, model_name=model))[
        "predictions"
    ]
    for name, binary in (("v2", False), ("v2 binary", True)):
        request = InferRequest(model, [tensor("text", list(texts), binary)])
        answer = await two.infer(base, request, model_name=model)
        found[name] = {o.name: o.data for o in answer.outputs}
    pair = [tensor("question", ["who built it"], False), tensor("context", list(texts[:1]), False)]
    answer = await two.infer(base, InferRequest(qa, pair), model_name=qa)
    found["qa"] = {o.name: o.data for o in answer.outputs}
    try:
        await two.infer(base, InferRequest(model, [tensor("text", [""], False)]), model_name=model)
    except httpx.HTTPStatusError as error:
        found["refusal"] = [error.response.status_code, error.response.json()["error"]]
    print(json.dumps(found))


asyncio.run(main(*sys.argv[1:]))
