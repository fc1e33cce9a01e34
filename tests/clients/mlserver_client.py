"""MLServer's types and codecs over plain HTTP: tensors, requests with a content type, a refusal."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request

import numpy as np
from mlserver.codecs import NumpyRequestCodec, StringCodec, StringRequestCodec
from mlserver.types import InferenceRequest, InferenceResponse, RequestOutput


def main(base: str, model: str, qa: str, *texts: str) -> None:
    """Print what the types make of each answer."""
    found: dict[str, object] = {}

    def ask(name: str, model: str, request: InferenceRequest) -> None:
        url = f"{base}/v2/models/{model}/infer"
        body = request.model_dump_json().encode()
        headers = {"Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, body, headers), timeout=60
            ) as reply:
                answer = InferenceResponse.model_validate_json(reply.read())
        except urllib.error.HTTPError as error:
            found[name] = [error.code, json.loads(error.read())["error"]]
            return
        found[name] = {o.name: list(o.data) for o in answer.outputs}

    values = list(texts)
    plain = InferenceRequest(inputs=[StringCodec.encode_input("text", values)])
    ask("v2", model, plain)
    ask("v2 request", model, StringRequestCodec.encode_request(values))
    ask("v2 array", model, NumpyRequestCodec.encode_request(np.array(values)))
    plain.outputs = [RequestOutput(name="label"), RequestOutput(name="score")]
    ask("v2 outputs", model, plain)
    pair = [
        StringCodec.encode_input("question", ["who built it"]),
        StringCodec.encode_input("context", values[:1]),
    ]
    ask("qa", qa, InferenceRequest(id="7", inputs=pair))
    ask("refusal", model, InferenceRequest(inputs=[StringCodec.encode_input("text", [""])]))
    print(json.dumps(found))


main(*sys.argv[1:])
