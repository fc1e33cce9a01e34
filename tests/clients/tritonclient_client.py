"""Triton's HTTP client: JSON and binary tensors, scheduling parameters, compression, a refusal."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import tritonclient.http as triton


def tensor(name: str, values: list[str], binary: bool) -> Any:
    """A tensor of strings."""
    made = triton.InferInput(name, [len(values)], "BYTES")
    made.set_data_from_numpy(np.array(values, dtype=object), binary_data=binary)
    return made


def main(base: str, model: str, qa: str, *texts: str) -> None:
    """Print what the client makes of each answer."""
    client = triton.InferenceServerClient(base.removeprefix("http://"))
    found: dict[str, object] = {}

    def ask(name: str, model: str, inputs: list[Any], columns: list[str], **more: Any) -> None:
        answer = client.infer(model, inputs, **more)
        found[name] = {column: answer.as_numpy(column).tolist() for column in columns}

    columns = ["label", "score"]
    for name, binary in (("v2", False), ("v2 binary", True)):
        wanted = [triton.InferRequestedOutput(c, binary_data=binary) for c in columns]
        inputs = [tensor("text", list(texts), binary)]
        ask(name, model, inputs, columns, timeout=10**6, priority=1)
        ask(f"{name} outputs", model, inputs, columns, outputs=wanted, request_id="7")
    pair = [tensor("question", ["who built it"], True), tensor("context", list(texts[:1]), False)]
    ask("qa", qa, pair, ["answer", "score", "start", "end"], sequence_id=3, sequence_start=True)
    for name, value, compression in (("refusal", "", None), ("gzip", "a", "gzip")):
        try:
            client.infer(
                model, [tensor("text", [value], False)], request_compression_algorithm=compression
            )
        except triton.InferenceServerException as error:
            found[name] = [int(error.status()), error.message()]
    print(json.dumps(found))


main(*sys.argv[1:])
