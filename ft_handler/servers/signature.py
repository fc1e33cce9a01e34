"""The tensors of a model, as Open Inference describes them and the model itself shows."""

from __future__ import annotations

from typing import Any

import orjson

from ft_handler.runtime import Ready
from ft_handler.types import Incoming


def signature(ready: Ready) -> dict[str, list[dict[str, Any]]]:
    """`inputs` and `outputs`, each tensor's `name`, `datatype` and `shape`, -1 where it may vary.

    The outputs are those that answer the task's sample; there are none where answers do not fit
    tensors or settings refuse the sample.
    """
    task = ready.task
    sample: dict[str, Any] = {
        key: task.sample[key] for key in (*task.required, *task.lists) if key in task.sample
    }
    inputs = [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in sample]
    columns = [list(value) if name in task.lists else [value] for name, value in sample.items()]
    asked = [
        {**tensor, "shape": [len(column)], "data": column}
        for tensor, column in zip(inputs, columns, strict=True)
    ]
    ((reply,), _) = ready.pipeline.run([Incoming({"inputs": asked})])
    if reply.status != 200:
        return {"inputs": inputs, "outputs": []}
    outputs = [
        {
            "name": tensor["name"],
            "datatype": tensor["datatype"],
            "shape": _open(tensor["shape"], task.columns_of[tensor["name"]].vector),
        }
        for tensor in orjson.loads(reply.body)["outputs"]
        if tensor["name"] in task.columns_of  # not whether this sample was cut
    ]
    return {"inputs": inputs, "outputs": outputs}


def _open(shape: list[int], vector: bool) -> list[int]:
    """A shape in which only a vector's length is known beforehand."""
    known = shape[-1:] if vector else []
    return [-1] * (len(shape) - len(known)) + known
