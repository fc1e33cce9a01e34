"""The Open Inference Protocol (KServe v2): tensors of strings in, rows of texts out."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TypeGuard

from ft_handler.errors import MalformedRequest, UnusableRequest
from ft_handler.request.texts import checked_name
from ft_handler.tasks.base import AnyTask

_KEYS = frozenset({"name", "shape", "datatype", "data", "parameters"})
_NEEDED = ("data", "datatype", "name", "shape")
_MOST_AXES = 8


def is_tensors(inputs: object) -> TypeGuard[list[object]]:
    """Whether `inputs` are v2 tensors and no plain list of inputs."""
    return isinstance(inputs, list) and any(
        isinstance(i, dict) and ("datatype" in i or "shape" in i) for i in inputs
    )


def rows_of(task: AnyTask, tensors: Sequence[object]) -> list[dict[str, object]]:
    """The inputs, by the task's keys, that tensors hold; raises RequestError."""
    columns: dict[str, list[object]] = {}
    for position, tensor in enumerate(tensors):
        name, data = _tensor(tensor, f"inputs[{position}]")
        if name in columns:
            raise MalformedRequest("two inputs have the same name")
        columns[name] = data
    if len(columns) == 1 and task.bare is not None:
        return [{task.bare: value} for value in next(iter(columns.values()))]
    keys = task.required if task.bare is None else (*task.required, *task.optional)
    if columns.keys() != set(keys):
        raise UnusableRequest(
            "the inputs must be named " + " and ".join(f"'{key}'" for key in keys)
        )
    if len({len(column) for column in columns.values()}) > 1:
        raise UnusableRequest("the inputs must have the same shape")
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def wanted_outputs(wanted: object, offered: Sequence[str]) -> tuple[str, ...] | None:
    """The names of the outputs asked for, None for all; raises UnusableRequest."""
    if wanted is None:
        return None
    if not isinstance(wanted, list) or not all(isinstance(o, dict) for o in wanted):
        raise UnusableRequest("'outputs' must be a list of objects")
    names = [o.get("name") for o in wanted]
    if not all(isinstance(n, str) and n in offered for n in names):
        raise UnusableRequest("'outputs' may name " + ", ".join(offered))
    return tuple(dict.fromkeys(names))


def _tensor(tensor: object, where: str) -> tuple[str, list[object]]:
    if not isinstance(tensor, dict):
        raise UnusableRequest(f"{where} must be an object")
    if not tensor.keys() <= _KEYS:
        raise MalformedRequest(f"{where} has an unknown key")
    for key in _NEEDED:
        if key not in tensor:
            raise MalformedRequest(f"{where} has no '{key}'")
    _check_parameters(tensor.get("parameters", {}), where)
    if tensor["datatype"] != "BYTES":
        raise UnusableRequest(f"{where}.datatype must be BYTES")
    shape, data = tensor["shape"], tensor["data"]
    if not isinstance(data, list):
        raise UnusableRequest(f"{where}.data must be a list")
    if (
        not isinstance(shape, list)
        or not 1 <= len(shape) <= _MOST_AXES
        or not all(type(n) is int and 0 <= n < 2**31 for n in shape)
    ):
        raise UnusableRequest(f"{where}.shape must be a list of non-negative integers")
    if any(isinstance(value, list) for value in data):
        if not all(isinstance(value, list) for value in data):
            raise UnusableRequest(f"{where}.data mixes strings and lists")
        data = [text for row in data for text in row]
    if prod(shape) != len(data):
        raise UnusableRequest(f"{where}.data does not have as many elements as its shape says")
    return checked_name(tensor["name"], f"{where}.name"), data


def _check_parameters(parameters: object, where: str) -> None:
    if not isinstance(parameters, dict):
        raise UnusableRequest(f"{where}.parameters must be an object")
    if "binary_data_size" in parameters:
        raise UnusableRequest(f"{where}: the binary tensor extension is not supported")
    if parameters.get("content_type", "str") != "str" or not parameters.keys() <= {"content_type"}:
        raise UnusableRequest(f"{where}.parameters may only hold content_type 'str'")
