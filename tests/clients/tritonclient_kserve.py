"""Triton's HTTP and gRPC clients against KServe's own server: metadata, answers, a refusal."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

COLUMNS = ("label", "score")


def main(http: str, grpc: str, model: str, *texts: str) -> None:
    """Print what each client makes of each answer."""
    found: dict[str, Any] = {}
    for kind, library, address in (
        ("http", tritonclient.http, http),
        ("grpc", tritonclient.grpc, grpc),
    ):
        client = library.InferenceServerClient(address)

        def ask(values: list[str], library: Any = library, client: Any = client, **how: Any) -> Any:
            tensor = library.InferInput("text", [len(values)], "BYTES")
            tensor.set_data_from_numpy(np.array(values, dtype=object), **how)
            wanted = [library.InferRequestedOutput(name) for name in COLUMNS]
            answer = client.infer(model, [tensor], outputs=wanted, request_id="7")
            strings = (answer.as_numpy(name).tolist() for name in COLUMNS)
            return [[v.decode() if isinstance(v, bytes) else v for v in row] for row in strings]

        ways = ({"binary_data": False}, {"binary_data": True}) if kind == "http" else ({},)
        for how in ways:
            found[f"{kind} {how}"] = ask(list(texts), **how)
        try:
            ask([""])
        except InferenceServerException as error:
            found[f"{kind} refused"] = [error.status(), error.message()]
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready(model)
        metadata = client.get_model_metadata(model)
        inputs = metadata["inputs"] if kind == "http" else metadata.inputs
        found[f"{kind} inputs"] = [i["name"] if kind == "http" else i.name for i in inputs]
    print(json.dumps(found))


main(*sys.argv[1:])
