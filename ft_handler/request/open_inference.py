"""The Open Inference Protocol (KServe v2): tensors of strings in, rows of texts out."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from struct import Struct
from typing import TypeGuard

from ft_handler.errors import MalformedRequest, UnusableRequest
from ft_handler.request.texts import checked_name, is_word, utf8
from ft_handler.tasks.base import AnyTask

_NEEDED = ("data", "datatype", "name", "shape")
_KNOWN = ("name", "shape", "datatype", "data", "parameters")
_KEYS = frozenset(_KNOWN)
_MOST_AXES = 8
#: Of MLServer: how its codecs made strings of something. Those that leave them as they are.
_CONTENT_TYPES = (None, "str", "np", "pd", "hf")
_OF_TENSORS = frozenset({"binary_data_size", "content_type", "headers"})
_OF_OUTPUTS = frozenset({"binary_data", "content_type", "headers"})
_UNUSED = frozenset(
    {
        "binary_data_output",
        "content_type",
        "headers",
        "priority",
        "sequence_end",
        "sequence_id",
        "sequence_start",
        "timeout",
    }
)
_LENGTH = Struct("<I")


def is_tensors(inputs: object) -> TypeGuard[list[object]]:
    """Whether `inputs` are v2 tensors and no plain list of inputs."""
    return isinstance(inputs, list) and any(
        isinstance(i, dict) and ("datatype" in i or "shape" in i) for i in inputs
    )


def rows_of(
    task: AnyTask, tensors: Sequence[object], binary: memoryview | None = None
) -> list[dict[str, object]]:
    """The inputs, by the task's keys, that tensors hold; raises RequestError.

    binary  what follows the JSON of a request with binary tensors
    """
    columns: dict[str, list[object]] = {}
    rest = _Binary(binary)
    for position, tensor in enumerate(tensors):
        name, data = _tensor(tensor, f"inputs[{position}]", rest)
        if name in columns:
            raise MalformedRequest("two inputs have the same name")
        columns[name] = data
    rest.check_empty()
    if len(columns) == 1 and task.bare is not None:
        return [{task.bare: value} for value in next(iter(columns.values()))]
    keys = task.required if task.bare is None else (*task.required, *task.optional)
    keys = tuple(dict.fromkeys((*keys, *task.lists)))
    if columns.keys() != set(keys):
        raise UnusableRequest(
            "the inputs must be named " + " and ".join(f"'{key}'" for key in keys)
        )
    # A list is every row's.
    lists = {key: columns.pop(key) for key in task.lists}
    if len({len(column) for column in columns.values()}) > 1:
        raise UnusableRequest("the inputs must have the same shape")
    return [
        {**dict(zip(columns, values, strict=True)), **lists}
        for values in zip(*columns.values(), strict=True)
    ]


def wanted_outputs(wanted: object, offered: Sequence[str]) -> tuple[str, ...] | None:
    """The names of the outputs asked for, None for all; raises UnusableRequest."""
    if wanted is None:
        return None
    if not isinstance(wanted, list) or not all(isinstance(o, dict) for o in wanted):
        raise UnusableRequest("'outputs' must be a list of objects")
    for output in wanted:
        asked = output.get("parameters") or {}
        if not isinstance(asked, dict) or not asked.keys() <= _OF_OUTPUTS:
            raise UnusableRequest(
                "parameters of 'outputs' may hold " + ", ".join(sorted(_OF_OUTPUTS))
            )
    names = [o.get("name") for o in wanted]
    if not all(isinstance(n, str) and n in offered for n in names):
        raise UnusableRequest("'outputs' may name " + ", ".join(offered))
    return tuple(dict.fromkeys(names))


def model_parameters(parameters: object) -> dict[str, object]:
    """The model's own among a request's parameters; raises RequestError.

    What the protocol's clients add for other servers is left out: scheduling, sequences, and how
    outputs are laid out, since outputs are always JSON.
    """
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise UnusableRequest("'parameters' must be an object")
    _check_content_type(parameters, "parameters")
    return {name: value for name, value in parameters.items() if name not in _UNUSED}


def _tensor(tensor: object, where: str, binary: _Binary) -> tuple[str, list[object]]:
    if not isinstance(tensor, dict):
        raise UnusableRequest(f"{where} must be an object")
    if not tensor.keys() <= _KEYS:
        raise MalformedRequest(f"{where} has an unknown key; known keys: " + ", ".join(_KNOWN))
    size = _binary_size(tensor.get("parameters"), where)
    for key in _NEEDED:
        if key not in tensor and (key != "data" or size is None):
            raise MalformedRequest(f"{where} has no '{key}'")
    if tensor["datatype"] != "BYTES":
        raise UnusableRequest(f"{where}.datatype must be BYTES")
    shape = tensor["shape"]
    if (
        not isinstance(shape, list)
        or not 1 <= len(shape) <= _MOST_AXES
        or not all(type(n) is int and 0 <= n < 2**31 for n in shape)
    ):
        raise UnusableRequest(f"{where}.shape must be a list of non-negative integers")
    if size is not None:
        if tensor.get("data") is not None:
            raise MalformedRequest(f"{where} has both 'data' and 'binary_data_size'")
        data = binary.strings(size, where)
    else:
        given = tensor["data"]
        if not isinstance(given, list):
            raise UnusableRequest(f"{where}.data must be a list")
        data = given
        if any(isinstance(value, list) for value in given):
            if not all(isinstance(value, list) for value in given):
                raise UnusableRequest(f"{where}.data mixes strings and lists")
            data = [text for row in given for text in row]
    if prod(shape) != len(data):
        raise UnusableRequest(f"{where}.data does not have as many elements as its shape says")
    return checked_name(tensor["name"], f"{where}.name"), data


def _binary_size(parameters: object, where: str) -> int | None:
    """How many bytes a tensor has behind the JSON; None for one whose data stands in it."""
    if parameters is None:
        return None
    if not isinstance(parameters, dict):
        raise UnusableRequest(f"{where}.parameters must be an object")
    _check_content_type(parameters, f"{where}.parameters")
    for key in parameters:
        if key not in _OF_TENSORS:
            name = f"'{key}'" if is_word(key) else "an unknown key"
            raise UnusableRequest(
                f"{where}.parameters holds {name}; known keys: {', '.join(sorted(_OF_TENSORS))}"
            )
    size = parameters.get("binary_data_size")
    if size is not None and (type(size) is not int or size < 0):
        raise UnusableRequest(f"{where}.parameters: 'binary_data_size' must be a whole number")
    return size


def _check_content_type(parameters: dict[str, object], where: str) -> None:
    if parameters.get("content_type") not in _CONTENT_TYPES:
        raise UnusableRequest(
            f"{where}: 'content_type' must be one of those that leave strings as they are: "
            + ", ".join(name for name in _CONTENT_TYPES if name)
        )


class _Binary:
    """Takes tensors, one by one, from the bytes behind a request's JSON."""

    def __init__(self, data: memoryview | None) -> None:
        self._data = data

    def strings(self, size: int, where: str) -> list[object]:
        """The strings of the next `size` bytes, each behind its length; raises RequestError."""
        if self._data is None:
            raise MalformedRequest(
                f"{where} has 'binary_data_size', but the request has no header "
                "Inference-Header-Content-Length"
            )
        data, self._data = self._data[:size], self._data[size:]
        strings: list[object] = []
        at = 0
        while at < len(data):
            (length,) = _LENGTH.unpack_from(data, at) if at + 4 <= len(data) else (size,)
            at += 4 + length
            if at > len(data):
                break
            strings.append(utf8(bytes(data[at - length : at])))
        if at != size:
            raise MalformedRequest(f"{where} has another size than its 'binary_data_size'")
        return strings

    def check_empty(self) -> None:
        """Raise MalformedRequest where bytes are left."""
        if self._data:
            raise MalformedRequest("the body is longer than its binary tensors")
